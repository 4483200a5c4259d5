"""The flat state: every trained number in one buffer, and modules that see views of it.

One buffer each for weights, moments and the average makes the update a handful of kernels and keeps
the compiled step small. Names of modules and parameters survive in checkpoints.

Weights of matrix products come first: forward passes below fp32 read these from a copy in their own
precision, which the update writes. Weights of convolutions lie with the channel last, as GPUs want.
Those of a size that is no multiple of ALIGNED come after all others, in fp32, so that every other
one lies where a GPU reads it at once.

A step is given the views, not the buffer: what is compiled of a block then says nothing of where
its weights lie, so that equal blocks have equal kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ALIGNED = 8  # numbers of half precision that GPUs read at once: 16 bytes, from a multiple of 16

Views = dict[str, dict[str, Tensor]]  # the parameters of each module, by name


class Slot(NamedTuple):
    """Where one parameter lies in the buffer. Tracing reads a tuple twice as fast as an object."""

    module: str
    name: str
    shape: torch.Size
    start: int
    size: int
    last: bool = False  # whether the channel lies last

    @property
    def key(self) -> str:
        return f"{self.module}.{self.name}"

    def view(self, piece: Tensor) -> Tensor:
        """The parameter in its piece [size] of the buffer."""
        if len(self.shape) == 1:  # one operation less to compile for every bias
            return piece
        if not self.last:
            return piece.view(self.shape)
        out, channels, *sides = self.shape
        return piece.view(out, *sides, channels).movedim(-1, 1)

    def flat(self, value: Tensor) -> Tensor:
        """The piece [size] of a parameter, as `view` reads it."""
        return (value.movedim(1, -1) if self.last else value).reshape(-1)


@dataclass(frozen=True)
class Layout:
    """The slots of all trained parameters, in order; the first `products` numbers of the buffer
    are weights of matrix products. `tied` modules have a weight under two names."""

    slots: tuple[Slot, ...]
    products: int
    tied: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        return sum(s.size for s in self.slots)

    def views(self, *buffers: Tensor) -> Views:
        """The parameters of each module as views of the buffer [P], or of its two parts: that of
        matrix products and the rest."""
        parts: Views = {}
        for slot, view in self._each(buffers):
            parts.setdefault(slot.module, {})[slot.name] = view
        return parts

    def read(self, state: Mapping[str, Tensor]) -> dict[str, Views]:
        """What a step reads of a state: the `weights`, those of matrix products in the precision of
        forward passes, and every further average."""
        further = {name: self.views(state[name]) for name in state if name.startswith("average.")}
        return {"weights": self.views(*self.buffers(state)), **further}

    def buffers(self, state: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The buffer that forward passes read of a state, or its two parts."""
        if "half" not in state:
            return (state["weights"],)
        parts = state["half"][: self.products], state["weights"][self.products :]
        return tuple(part for part in parts if len(part))

    def flat(self, views: Views, *, cut: bool) -> tuple[Tensor, ...]:
        """The buffer [P] of views, or `cut` into its two parts."""
        flats = [slot.flat(views[slot.module][slot.name]) for slot in self.slots]
        parts = (flats[: self._first], flats[self._first :]) if cut else (flats,)
        return tuple(torch.cat(part) for part in parts if part)

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """The buffer by `module.parameter`, for checkpoints."""
        return {slot.key: view for slot, view in self._each((flat,))}

    def _each(self, buffers: Sequence[Tensor]) -> Iterator[tuple[Slot, Tensor]]:
        sizes = [s.size for s in self.slots]
        count = self._first if buffers[1:] else len(sizes)
        split = zip(buffers, (sizes[:count], sizes[count:]), strict=False)
        pieces = chain.from_iterable(buffer.split(part) for buffer, part in split)
        for slot, piece in zip(self.slots, pieces, strict=True):
            yield slot, slot.view(piece)

    @property
    def _first(self) -> int:
        """How many parameters are weights of matrix products, which come first."""
        return sum(s.start < self.products for s in self.slots)

    def load(self, flat: Tensor, named: Mapping[str, Tensor]) -> None:
        """Fills the buffer from a checkpoint. Raises KeyError for a missing name, ValueError for
        another shape."""
        for slot, view in self._each((flat,)):
            value = named[slot.key]
            if value.shape != slot.shape:
                raise ValueError(
                    f"`{slot.key}` is {list(value.shape)} in the checkpoint,"
                    f" and {list(slot.shape)} here"
                )
            view.copy_(value)

    def copy(self, modules: Mapping[str, nn.Module], views: Views) -> Callable:
        """The student as a function of its inputs, with other parameters."""
        return self.bind(modules, {"student": views["student"]})["student"]

    def bind(self, modules: Mapping[str, nn.Module], views: Views) -> dict[str, Callable]:
        """The modules as functions whose trained parameters are these."""
        return {n: bound(m, views.get(n, {}), n in self.tied) for n, m in modules.items()}


def bound(module: nn.Module, parameters: Mapping[str, Tensor], tied: bool) -> Callable:
    """The module with these parameters, as a function of its inputs. Looking for further names of
    a weight is half of the time that tracing takes, so that is done where it is `tied`."""
    if not parameters:
        return module

    def call(*args, **named):
        return functional_call(module, parameters, args, named, tie_weights=tied)

    return call


def layout(modules: Mapping[str, nn.Module]) -> Layout:
    """The layout of every parameter of the modules that wants a gradient: products, then others, of
    which those that are no multiple of ALIGNED come last."""
    found = sorted(_trained(modules), key=lambda one: (not one[0], one[-1].numel() % ALIGNED != 0))
    starts = [0, *accumulate(parameter.numel() for *_, parameter in found)]
    slots = (
        Slot(module, name, p.shape, start, p.numel(), last=product and p.dim() == 4)
        for (product, module, name, p), start in zip(found, starts, strict=False)
    )
    products = sum(p.numel() for product, *_, p in found if product)
    return Layout(tuple(slots), products, frozenset(n for n, m in modules.items() if _ties(m)))


def _ties(module: nn.Module) -> bool:
    """Whether a weight has two names."""
    names = list(module.named_parameters(remove_duplicate=False))
    return len(names) != len(list(module.parameters()))


def _trained(modules: Mapping[str, nn.Module]) -> Iterator[tuple[bool, str, str, nn.Parameter]]:
    """Each parameter that wants a gradient, by module and name, and whether it is a product's; the
    few of a size that is no multiple of ALIGNED are none."""
    for module, parts in modules.items():
        for name, parameter in parts.named_parameters():
            owner = parts.get_submodule(name.rpartition(".")[0])
            if parameter.requires_grad:
                product = isinstance(owner, PRODUCTS) and parameter.numel() % ALIGNED == 0
                yield product, module, name, parameter


def gather(modules: Mapping[str, nn.Module], plan: Layout, device) -> Tensor:
    """The buffer [P] in fp32 with the modules' own numbers, which then are views of it."""
    flat = torch.empty(plan.size, dtype=torch.float32, device=device)
    own = {f"{m}.{n}": p for m, parts in modules.items() for n, p in parts.named_parameters()}
    plan.load(flat, {s.key: own[s.key].detach() for s in plan.slots})
    for slot, view in plan.named(flat).items():
        own[slot].data = view
    return flat
