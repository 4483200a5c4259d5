"""Compiling a step before there is a run: its graph needs shapes, and no data and no training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from difftrain.compiler import kept, lowering
from difftrain.language.options import Run
from difftrain.training import averages, evaluate, state
from difftrain.training.bundle import Bundle, block, recipe, step_inputs, text_part
from difftrain.training.captions import frozen, null
from difftrain.training.keeping import facts
from difftrain.training.known import found
from difftrain.training.own import importable
from difftrain.training.parts import (
    Parts,
    build_parts,
    condition_field,
    copy_of,
    held_out,
    opened,
)
from difftrain.training.start import inherited


class NoTarget(Exception):
    """A machine that a step cannot be compiled for from here."""


def target(asked: str, bundle: Bundle) -> torch.device | None:
    """The device to compile the step for ahead; `auto` is what a run on this machine would compile
    for, where that is known before it begins. Raises NoTarget."""
    train = block(bundle.read(), "train")
    if asked == "none" or (asked == "auto" and train["compile"] == "off"):
        return None
    if asked == "cpu":
        return torch.device("cpu")
    here = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    if asked != "auto" and asked.lower() not in here.lower().split():
        has = f"its GPU is an {here}" if here else "it has no GPU"
        raise NoTarget(
            f"`--target {asked}` cannot be compiled for on this machine, since {has}: compile the"
            " spec there, or run the executable there with `--store`"
        )
    device = torch.device("cuda" if here and train["device"] != "cpu" else "cpu")
    return device if device.type == "cuda" or train["compile"] == "on" else None


def compiled_for(bundle: Bundle, device: torch.device) -> tuple[kept.Facts, bytes]:
    """The compiled step of a bundle, and what it is only good for; nothing is computed.

    Raises DataError where the data are not here, which the words of an encoder come from; NotKept,
    NoCompiler.
    """
    spec = bundle.read()
    objective = spec.objective()
    data, train = block(spec, "data"), block(spec, "train")
    lowering.choose("on", device.type, 0, None)
    condition = condition_field(objective)
    seen, unseen = opened(data, "train", condition), held_out(data, condition)
    known = inherited(train, found(text_part(objective), seen, unseen))
    with importable(bundle.texts):
        parts = build_parts(
            objective, known, train["seed"], device, size=data["size"], products=train["products"]
        )
        made = evaluate.programs(bundle, device)
        names = [*map(copy_of, parts.averages), *averages.tracked(recipe(spec))]
        first = state.fresh(parts.weights, train["seed"], 1, names, train["precision"])
        kind, image = state.FORWARDS[train["precision"]], step_inputs(objective).image
        batch = fed(parts, data, seen.texts, kind, image)
        args = (first, batch, parts.modules, parts.plan, made.tables["step"])
        step = kept.compiled(made.step.step, args, made.forward)
        taken = kept.take(step, kept.outside(parts.modules, parts.plan))
    return facts(bundle, parts.weights, batch), taken


def fed(
    parts: Parts, data: Run, captions: Iterable[str], kind: torch.dtype, image: bool = False
) -> dict[str, Tensor]:
    """What a step reads of a batch, all text being empty and every other number 0."""
    device, count, size = parts.weights.device, data["batch"], data["size"]
    shape = parts.codec.shape(size)
    read = {"x0": torch.zeros(count, *shape, device=device)}
    read |= {"index": torch.arange(count, device=device)}
    read |= {"image": torch.zeros(count, 3, size, size, device=device)} if image else {}
    return read | _text(parts, count, captions, kind)


def _text(
    parts: Parts, count: int, captions: Iterable[str], kind: torch.dtype
) -> dict[str, Tensor]:
    """Of a frozen encoder its states, where they are encoded ahead; else ids."""
    device = parts.weights.device
    states = null(parts.text, captions, kind, device) if frozen(parts.text) else None
    if states is not None:
        return {"cond": states.repeat(count, *[1] * (states.dim() - 1)), "null": states}
    null_ids = parts.null_ids(device)
    if null_ids is None:
        return {}
    return {"input_ids": null_ids.repeat(count, 1), "null_ids": null_ids}
