"""What a compiled step takes: its tensors' shapes, the weights it trains, its arithmetic."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from difftrain.compiler.layout import Layout, gather, layout
from difftrain.language.part import Part
from difftrain.models import build
from difftrain.models.text import TextEncoder
from difftrain.models.tokenizer import END, START
from difftrain.training import state
from difftrain.training.bundle import Bundle, block, text_part

COUNTED = "the whole emitted step with its backward passes, 2 for each multiply-add"


def measured(bundle: Bundle) -> Bundle:
    """The bundle with latents, state and FLOPs in its manifest, found without computing anything:
    the network's tensors have shapes and no numbers. Raises PartError."""
    spec = bundle.read()
    part, words = spec.objective().backbone.part, text_part(spec.objective())
    batch, size = (block(spec, "data")[n] for n in ("batch", "size"))
    codec = build(part.options["codec"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        text = words and _text(words)
        network = _shapes(part, codec=codec, **({"text": text} if text else {}))
        modules = {"student": network} | ({"text": text} if text else {})
        flops = _flops(bundle, modules, batch, codec.shape(size))
    return bundle.saying(
        {
            "shapes": {**bundle.manifest["shapes"], "latents": list(codec.shape(size))},
            "state": _state(layout(modules), text),
            "flops": {"per sample": round(flops / batch), "counted": COUNTED},
        }
    )


def _shapes(part: Part, **context) -> nn.Module:
    """The module of a part, without numbers; a pretrained one is read from its files for that."""
    if not part.options.get("weights"):
        return build(part, **context)
    with unset_fake_temporarily():
        module = build(part, **context).to("meta")
    return module.to_empty(device="cpu")


def _text(part: Part) -> TextEncoder:
    """The text encoder; a small one has the rows of its two marks, as words come with data."""
    cut = {} if part.options.get("weights") else {"vocabulary": [START, END]}
    text = _shapes(part, **cut)
    return text if part.options.get("train") else text.requires_grad_(False)


def _state(plan: Layout, text: TextEncoder | None) -> dict[str, object]:
    """How many weights each trained module has."""
    sizes: dict[str, object] = {}
    for slot in plan.slots:
        sizes[slot.module] = sizes.get(slot.module, 0) + slot.size
    if "text" in sizes and text.compact is not None:
        sizes["text"] = f"{sizes['text']}, and {text.width} for each token of the captions"
    return {"weights": sizes, "buffers": [*state.BUFFERS], "numbers": [*state.COUNTERS, "scale"]}


def _flops(bundle: Bundle, modules, size: int, shape: tuple[int, ...]) -> int:
    """The arithmetic of one step of `size` samples. Attention is two matrix products each time."""
    module, plan = bundle.module("step.py"), layout(modules)
    tables = {name: torch.empty(t.shape) for name, t in module.tables().items()}
    batch = {"x0": torch.empty(size, *shape), "index": torch.arange(size)}
    if "text" in modules:
        length = modules["text"].length
        batch |= {"input_ids": torch.zeros(size, length, dtype=torch.int64)}
        batch |= {"null_ids": torch.zeros(1, length, dtype=torch.int64)}
    first = state.fresh(gather(modules, plan, "cpu"), 0, 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module.step(first, batch, modules, plan, tables)
    return counter.get_total_flops()
