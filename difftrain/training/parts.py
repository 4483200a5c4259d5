"""The modules and the data that a spec declares, built for a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from difftrain.compiler.heads import LogVariance, Projection
from difftrain.compiler.layout import Layout, gather, layout
from difftrain.compiler.lowering import exact
from difftrain.compiler.step import modules_read
from difftrain.language.options import Run
from difftrain.language.part import Part
from difftrain.language.spec import Objective
from difftrain.models import build, is_foreign
from difftrain.models.eight import turned
from difftrain.models.errors import PartError
from difftrain.training.arrays import Arrays, open_arrays
from difftrain.training.bundle import ARRAYS, differentiated, each_part, text_part
from difftrain.training.captions import frozen, states
from difftrain.training.known import Known
from difftrain.training.latents import Prepared, prepare
from difftrain.training.sources import DataError, Pictures, open_source
from difftrain.training.state import AVERAGE

RAW = Part("codec", "raw", {})  # of a backbone that declares no codec
SAMPLING = ("student",)  # the nets that sampling calls


@dataclass(frozen=True, eq=False)
class Parts:
    """What is trained or frozen (`modules`; the trained weights lie in `weights`), and what stands
    around it. `averages` names the further averaged copies of the network; `kept` holds frozen
    weights that nothing but a checkpoint knows."""

    modules: Mapping[str, nn.Module]
    plan: Layout
    weights: Tensor
    codec: nn.Module
    text: nn.Module | None
    known: Known = Known()
    averages: tuple[str, ...] = ()
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def null_ids(self, device) -> Tensor | None:
        """The ids [1, T] of the empty prompt."""
        return None if self.text is None else self.text.ids([""]).to(device)

    def nets(self, weights: Tensor, state: Mapping[str, Tensor]) -> dict[str, Callable]:
        """Every net as a function: the network with these weights [P], averaged copies with those
        of a state."""
        plan = self.plan
        buffers = {n: state[copy_of(n)] for n in self.averages}
        copies = {n: plan.copy(self.modules, plan.views(flat)) for n, flat in buffers.items()}
        return plan.bind(self.modules, plan.views(weights)) | copies


def copy_of(name: str) -> str:
    """The buffer of the state that holds an averaged copy."""
    return f"{AVERAGE}.{name}"


# ---- modules


def build_parts(
    objective: Objective,
    known: Known,
    seed: int,
    device,
    *,
    size: int = 64,
    sampling: bool = False,
    products: str = "same",
) -> Parts:
    """The modules of an objective on a device; random ones depend on the seed, and those of a GPU
    on its kind. For `sampling` only what it needs. Raises PartError for `products` that cannot
    be."""
    _named(objective.backbone.part)
    torch.manual_seed(seed)
    names = SAMPLING if sampling else nets_read(objective)
    codec = build(codec_part(objective), **about(known))
    modules = build_modules(objective, names, codec, known, size, partial(drawn, device))
    for module in (codec, *modules.values()):
        module.to(device)
    if products == "fp8":
        turned(modules["student"])
    plan, text = layout(modules), modules.get("text")
    kept = {} if text is None else _kept(text_part(objective), text)
    averages = tuple(n for n in names if n not in modules)
    weights = gather(modules, plan, device)
    return Parts(modules, plan, weights, codec, text, known, averages, kept)


def nets_read(objective: Objective) -> tuple[str, ...]:
    """The names of the nets and heads that the loss calls, the network first."""
    names, _ = modules_read(objective)
    return ("student", *(n for n in names if n != "student"))


def build_modules(
    objective: Objective,
    names: Sequence[str],
    codec: nn.Module,
    known: Known,
    size: int,
    make: Callable[..., nn.Module] = build,
) -> dict[str, nn.Module]:
    """The modules of these names and the encoder, as `make` builds a part. Raises PartError."""
    text = _text(text_part(objective), known, make)
    context = {"codec": codec, "size": size, "forward_mode": differentiated(objective)}
    context |= {"text": text} if text is not None else {}
    context |= {"shape": known.shape} if known.shape else {}
    modules = {"student": make(objective.backbone.part, **context)}
    modules |= {"text": text} if text is not None else {}
    if "teacher" in names:
        modules["teacher"] = _frozen(make(teacher_part(objective), **context))
    if "vision" in names:
        grid = _tap(modules["student"], "tap_grid")
        modules["vision"] = _frozen(make(_vision(objective), grid=grid))
    if "project" in names:
        width = _tap(modules["student"], "tap_width")
        modules["project"] = Projection(width, getattr(modules.get("vision"), "width", width))
    if "logvar" in names:
        modules["logvar"] = LogVariance()
    return modules


def drawn(device, part: Part | tuple[Part, ...], **context) -> nn.Module:
    """The module of a part; a random network of ours is drawn on the device that it is for, where a
    GPU takes milliseconds for what a CPU takes seconds for. Other modules are moved there."""
    network = isinstance(part, Part) and part.kind == "backbone" and not is_foreign(part)
    random = network and not part.options.get("weights")
    with torch.device(device) if random else nullcontext():
        return build(part, **context)


def teacher_part(objective: Objective) -> Part:
    """The frozen network: that of the objective it was trained on. Where none is named it is the
    student's, which is then shown xt, t and the condition alone."""
    if objective.teacher:
        return objective.teacher.backbone.part
    part, plain = objective.backbone.part, {"times": ("t",), "inputs": (), "dropout": 0.0}
    return replace(part, options={n: plain.get(n, v) for n, v in part.options.items()})


def codec_part(objective: Objective) -> Part:
    """The declared codec; without one, what is trained on is the data."""
    part = objective.backbone.part.options.get("codec")
    return part if isinstance(part, Part) else RAW


def about(known: Known) -> dict[str, object]:
    """What a codec may take from the data."""
    return {"shape": known.shape, "mean": known.mean, "std": known.std}


def _named(part: Part) -> None:
    if part.module == "custom":
        raise PartError(
            "`backbone = custom` takes its network from Python, and a run of its own has none:"
            " name a backbone, such as `sd.unet(text = sd.clip)`"
        )


def _text(part, known: Known, make: Callable) -> nn.Module | None:
    """The encoder: a small one of our own has the tokens in use, and is trained or useless."""
    if part is None:
        return None
    text = make(part, vocabulary=known.vocabulary)
    trained = isinstance(part, tuple) or part.options.get("train")  # those joined know it already
    return text if trained else _frozen(text)


def _vision(objective: Objective) -> Part:
    if objective.vision is None:
        raise PartError(
            "the objective reads `vision`, and does not say what that is: add `vision =` and the"
            " name of an encoder of pictures"
        )
    return objective.vision


def _tap(network: nn.Module, name: str):
    """What a network says of the tokens that it returns beside its output."""
    if not hasattr(network, name):
        raise PartError(
            "the objective reads `tap`, and the backbone returns no tokens: say which, as in"
            " `tap = 1`"
        )
    return getattr(network, name)


def _frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


def _kept(declared, text: nn.Module) -> dict[str, Tensor]:
    """The frozen weights of encoders that are read from nowhere, by name."""
    several = isinstance(declared, tuple)
    homeless = tuple(
        f"encoders.{i}." if several else ""
        for i, part in enumerate(each_part(declared))
        if not part.options.get("weights")
    )
    frozen = {n: p for n, p in text.named_parameters() if not p.requires_grad}
    return {f"text.{n}": p for n, p in frozen.items() if n.startswith(homeless)}


@contextmanager
def visiting(module: nn.Module, device) -> Iterator[None]:
    """Inside, a module is on a device; afterwards it is where it was."""
    tensors = chain(module.parameters(), module.buffers())
    home = next((tensor.device for tensor in tensors), device)
    try:
        module.to(device)
        yield
    finally:
        module.to(home)


# ---- data


def condition_field(objective: Objective) -> str:
    """The field of a record that samples are conditioned on; nothing for none."""
    encoders = each_part(text_part(objective))
    return encoders[0].options.get("field", "caption") if encoders else ""


def opened(
    data: Run, split: str, condition: str = "caption", override: str | None = None
) -> Pictures | Arrays:
    """A split of the declared source, or of the path that stands in for it, with the
    field that samples are conditioned on ("" for none)."""
    source = data["source"]
    options = source.options
    caption = _caption(source, data, condition)
    if override is None:
        split = options.get("split", split) if split == "train" else split
    path = options.get("path", "") if override is None else override
    if source.module == ARRAYS:
        return open_arrays(path, options["x"], caption=caption, split=split)
    kind = source.module if override is None else "folder"
    return open_source(kind, path, caption=caption, split=split)


def _caption(source: Part, data: Run, condition: str) -> str:
    """The field's name in this source, which may call captions otherwise."""
    if condition != "caption":
        return condition
    named = source.options.get("caption", condition)
    return "captions" if data["captions"] == "any" and named == condition else named


def held_out(
    data: Run, condition: str = "caption", override: str | None = None
) -> Pictures | Arrays | None:
    """What training does not see, where the source has some."""
    try:
        return opened(data, "held_out", condition, override)
    except DataError:
        return None


def encoded(
    found: Pictures | Arrays,
    parts: Parts,
    size: int,
    cache: Path,
    device,
    say: Callable[[str], object],
    images: bool = False,
    ahead: torch.dtype | None = None,
) -> Prepared:
    """The data set as latents and token ids, and as pictures where the step reads them. With the
    type `ahead` also the states of its text in that, if the encoder is frozen and memory allows.

    What no step needs any more, the codec and such an encoder, waits on the CPU."""
    if images and isinstance(found, Arrays):
        raise DataError(f"the objective reads `image`, and `{found.name}` holds no pictures")
    tokens = None if parts.text is None else (lambda texts, length: parts.text.ids(texts))
    where = {"cache": cache, "device": device, "say": say}
    with torch.no_grad(), exact():
        parts.codec.to(device)
        prepared = prepare(found, parts.codec, tokens, size, images=images, **where)
        parts.codec.to("cpu")
        if ahead is None or not frozen(parts.text):
            return prepared
        made = states(parts.text, found.texts, ahead, **where)
    if made is not None:
        parts.text.to("cpu")
    return replace(prepared, states=made)
