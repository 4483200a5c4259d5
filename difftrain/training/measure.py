"""What a compiled step takes: its tensors' shapes, the weights it trains, its arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from difftrain.compiler.layout import Layout, gather, layout
from difftrain.compiler.program import load
from difftrain.compiler.step import emit_step
from difftrain.language.options import Run
from difftrain.language.part import Part
from difftrain.language.spec import Objective, Spec
from difftrain.models import build, is_foreign, reads_names
from difftrain.models.foreign import reason
from difftrain.models.pretrained import Absent
from difftrain.models.tokenizer import END, START
from difftrain.training import state
from difftrain.training.bundle import (
    ARRAYS,
    Bundle,
    block,
    each_part,
    recipe,
    step_inputs,
    text_part,
)
from difftrain.training.captions import frozen
from difftrain.training.known import Known, found
from difftrain.training.own import importable
from difftrain.training.parts import (
    about,
    build_modules,
    codec_part,
    copy_of,
    nets_read,
    opened,
)
from difftrain.training.sources import DataError

COUNTED = "the whole emitted step with its backward passes, 2 for each multiply-add"


class Everywhere:
    """Stands in for torch's record of the module that works, which nested derivatives break."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self, *_) -> None: ...


class Counter(FlopCounterMode):
    """Counts the arithmetic as a whole."""

    def __init__(self, **options):
        super().__init__(**options)
        self.mod_tracker = Everywhere()


def measured(bundle: Bundle) -> Bundle:
    """The bundle with latents, state and FLOPs in its manifest, found without computing anything:
    the networks' tensors have shapes and no numbers. Raises PartError."""
    spec = bundle.read()
    objective, data = spec.objective(), block(spec, "data")
    batch, size, names = data["batch"], data["size"], nets_read(objective)
    known = _known(objective, data)
    with importable(bundle.texts):
        codec = build(codec_part(objective), **about(known))
        shape = codec.shape(size)
        with FakeTensorMode(allow_non_fake_inputs=True):
            modules = build_modules(objective, names, codec, known, size, _shapes)
            flops = _flops(spec, objective, modules, batch, shape, size, names)
    return bundle.saying(
        {
            "shapes": {**bundle.manifest["shapes"], "latents": list(shape)},
            "state": _state(layout(modules), modules.get("text"), _copies(names, modules, spec)),
            "flops": {"per sample": round(flops / batch), "counted": COUNTED},
        }
    )


def _known(objective: Objective, data: Run) -> Known:
    """What is known without the data: token tables have the rows of their two marks, as words come
    with data; the shape of arrays stands in their file. Raises Absent without that."""
    encoder = text_part(objective)
    named = isinstance(encoder, Part) and reads_names(encoder)
    words = () if encoder is None or named else (START, END)
    if data["source"].module != ARRAYS:
        return Known(words)
    try:
        arrays = opened(data, "train", "")
    except DataError as problem:
        raise Absent(str(problem)) from problem
    return replace(found(None, arrays, None), vocabulary=words)


def _copies(names: Sequence[str], modules: Mapping[str, nn.Module], spec: Spec) -> list[str]:
    """The buffers of averaged copies, and of further averages."""
    copies = [name for name in names if name not in modules]
    return [copy_of(name) for name in (*copies, *recipe(spec).further)]


def _shapes(part: Part | tuple[Part, ...], **context) -> nn.Module:
    """The module of a part, without numbers. One that is pretrained, or that looks at its first
    numbers, is built with them for that."""
    if not any(is_foreign(one) or one.options.get("weights") for one in each_part(part)):
        with suppress(DataDependentOutputException):
            return build(part, **context)
    with unset_fake_temporarily():
        module = build(part, **context).to("meta")
    return module.to_empty(device="cpu")


def _state(plan: Layout, text: nn.Module | None, copies: list[str]) -> dict[str, object]:
    """How many weights each trained module has."""
    sizes: dict[str, object] = {}
    for slot in plan.slots:
        sizes[slot.module] = sizes.get(slot.module, 0) + slot.size
    if "text" in sizes and getattr(text, "compact", None) is not None:
        sizes["text"] = f"{sizes['text']}, and {text.width} for each token of the captions"
    buffers = [*state.BUFFERS, *copies]
    return {"weights": sizes, "buffers": buffers, "numbers": [*state.COUNTERS, "scale"]}


def _flops(spec: Spec, objective: Objective, modules, count: int, shape, size: int, names) -> int:
    """The arithmetic of one step of `count` samples, which is the same in every precision; in fp32
    torch has a derivative of it everywhere. Attention is two matrix products each time.

    Raises Absent for a network from Python that needs numbers.
    """
    plain = replace(recipe(spec), precision="fp32")
    module = load(emit_step(objective, plain, step_inputs(objective)).source, "measured")
    plan = layout(modules)
    tables = {name: torch.empty(t.shape) for name, t in module.tables().items()}
    batch = {"x0": torch.empty(count, *shape), "index": torch.arange(count)}
    batch |= {"image": torch.empty(count, 3, size, size)} if "vision" in names else {}
    batch |= _text(modules["text"], count) if "text" in modules else {}
    first = state.fresh(gather(modules, plan, "cpu"), 0, 1, _copies(names, modules, spec))
    with sdpa_kernel(SDPBackend.MATH), Counter(display=False) as counter:
        try:
            module.step(first, batch, modules, plan, tables)
        except Exception as cause:
            part = objective.backbone.part
            if not is_foreign(part):
                raise
            raise Absent(f"`{part.module}` is not measured ({reason(cause)})") from cause
    return counter.get_total_flops()


def _text(text: nn.Module, count: int) -> dict[str, Tensor]:
    """What a step reads of text, which a frozen encoder has read before."""
    if frozen(text):
        shape = (text.length, text.width)
        return {"cond": torch.empty(count, *shape), "null": torch.empty(1, *shape)}
    ids = torch.zeros(count, text.length, dtype=torch.int64)
    return {"input_ids": ids, "null_ids": ids[:1]}
