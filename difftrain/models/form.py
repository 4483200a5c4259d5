"""The sizes and the switches of a transformer, and which of them go together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from difftrain.models.errors import PartError

LATENT = 4  # channels, where no codec says
CHOICES = {
    "norm": ("layer", "rms"),
    "mlp": ("gelu", "swiglu"),
    "attention": ("auto", "fused", "math"),
    "clock": ("index", "noise", "data"),
}


@dataclass(frozen=True)
class Form:
    """The sizes and the switches of a transformer."""

    depth: int = 28
    width: int = 1152
    heads: int = 16
    patch: int = 2
    channels: int = LATENT
    classes: int = 0  # of a class condition; 0: there is none
    states: int = 0  # the width of a text condition; 0: there is none
    norm: str = "layer"
    mlp: str = "gelu"
    rotary: bool = False
    qk_norm: bool = False
    attention: str = "auto"
    forward_mode: bool = False
    tap: int = 0
    dropout: float = 0.0
    time_scale: float = 1.0
    clock: str = "index"
    times: tuple[str, ...] = ("t",)
    inputs: tuple[str, ...] = ()

    @property
    def further(self) -> tuple[str, ...]:
        """The numbers [B] that are embedded beside t."""
        return (*self.times[1:], *(name for name in self.inputs if name != "guess"))

    @property
    def way(self) -> dict[str, bool]:
        """How to `attend`: by a fused kernel, which has no forward-mode derivative, by matrix
        products alone, or by what is the fastest that has one."""
        fused = self.attention == "fused" or self.attention == "auto" and not self.forward_mode
        return {"fused": fused, "math": self.attention == "math"}

    @property
    def taken(self) -> int:
        """The channels that go in: an earlier estimate stands beside x."""
        return self.channels * (2 if "guess" in self.inputs else 1)


def possible(form: Form, shape: tuple[int, ...]) -> None:
    """Refuses what does not go together, in words."""
    for name, known in CHOICES.items():
        if (value := getattr(form, name)) not in known:
            raise PartError(f"`{name}` cannot be `{value}`: it is one of {', '.join(known)}")
    for wrong, message in _conflicts(form, shape):
        if wrong:
            raise PartError(message)


def _conflicts(form: Form, shape: tuple[int, ...]) -> Iterator[tuple[bool, str]]:
    depth, width, heads = form.depth, form.width, form.heads
    others = [name for name in form.inputs if name not in ("w", "guess")]
    none = [name for name in ("depth", "width", "heads", "patch") if getattr(form, name) < 1]
    yield bool(none), f"a transformer needs {_ticked(none)} of 1 at least"
    yield (
        len(shape) != 3,
        f"a transformer cuts pictures into patches, and these data are {list(shape)}: "
        "use a backbone for them",
    )
    yield (
        width % heads != 0,
        f"a width of {width} cannot be split over {heads} heads: use a multiple of {heads}",
    )
    yield (
        width % 4 != 0,
        f"a width of {width} cannot be shared by the positions of two sides: use a multiple of 4",
    )
    yield (
        form.rotary and width // heads % 4 != 0,
        f"heads of {width // heads} numbers cannot be turned by two sides: use a multiple of 4",
    )
    yield (
        form.tap not in range(depth + 1),
        f"there is no block {form.tap} to tap: the blocks are 1 to {depth}",
    )
    yield (
        form.attention == "fused" and form.forward_mode,
        "`attention = fused` has no forward-mode derivative, which this objective takes: "
        "leave it `auto`",
    )
    yield bool(others), f"a transformer cannot be given {_ticked(others)}: it takes `w` and `guess`"


def _ticked(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
