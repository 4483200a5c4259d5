"""The modules and the data that a spec declares, built for a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from difftrain.compiler.layout import Layout, gather, layout
from difftrain.language.options import Run
from difftrain.language.part import Part
from difftrain.language.spec import Objective
from difftrain.models import build
from difftrain.models.errors import PartError
from difftrain.training.latents import Prepared, prepare
from difftrain.training.sources import DataError, Pictures, open_source


@dataclass(frozen=True, eq=False)
class Parts:
    """What is trained (`modules`, whose weights lie in `weights`), and what stands around it."""

    modules: Mapping[str, nn.Module]
    plan: Layout
    weights: Tensor
    codec: nn.Module
    text: nn.Module | None

    def null_ids(self, device) -> Tensor | None:
        """The ids [1, T] of the empty prompt."""
        return None if self.text is None else self.text.ids([""]).to(device)


def build_parts(objective: Objective, vocabulary: list[int], seed: int, device) -> Parts:
    """The modules of an objective on a device; random ones depend on the seed alone."""
    part = objective.backbone.part
    if part.module == "custom":
        raise PartError(
            "`backbone = custom` takes its network from Python, and a run of its own has none:"
            " name a backbone, such as `sd.unet(text = sd.clip)`"
        )
    torch.manual_seed(seed)
    codec = build(part.options["codec"])
    text = _text(part.options.get("text"), vocabulary)
    network = build(part, codec=codec, **({"text": text} if text is not None else {}))
    modules = {"student": network} | ({"text": text} if text is not None else {})
    for module in (codec, *modules.values()):
        module.to(device)
    plan = layout(modules)
    return Parts(modules, plan, gather(modules, plan, device), codec, text)


def _text(part, vocabulary: list[int]):
    """The text encoder: a small one of our own has the tokens in use, and is trained or useless."""
    if not isinstance(part, Part):
        return None
    cut = {} if part.options.get("weights") else {"vocabulary": vocabulary}
    text = build(part, **cut)
    return text if part.options.get("train") else text.requires_grad_(False)


def pictures(data: Run, split: str, override: str | None = None) -> Pictures:
    """A split of the declared source, or of the folder that stands in for it."""
    source = data["source"]
    if override is not None:
        return open_source("folder", override, split=split, caption=_caption(source, data))
    options = source.options
    split = options.get("split", split) if split == "train" else split
    return open_source(
        source.module, options.get("path", ""), caption=_caption(source, data), split=split
    )


def _caption(source: Part, data: Run) -> str:
    field = source.options.get("caption", "caption")
    return "captions" if data["captions"] == "any" and field == "caption" else field


def held_out(data: Run, override: str | None = None) -> Pictures | None:
    """The pictures that training does not see, where the source has some."""
    try:
        return pictures(data, "held_out", override)
    except DataError:
        return None


def encoded(
    found: Pictures, parts: Parts, size: int, cache: Path, device, say: Callable[[str], object]
) -> Prepared:
    """The data set as latents and token ids."""
    tokens = None if parts.text is None else (lambda texts, length: parts.text.ids(texts))
    length = 77 if parts.text is None else parts.text.length
    with torch.no_grad():
        return prepare(
            found, parts.codec, tokens, size, length=length, cache=cache, device=device, say=say
        )
