"""Weights of other runs: what a run begins from, and what teaches it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from difftrain.language.options import Run
from difftrain.language.part import Interface, Part
from difftrain.language.spec import Objective
from difftrain.models import is_foreign
from difftrain.models.errors import PartError
from difftrain.models.foreign import reason
from difftrain.training import state
from difftrain.training.folder import checkpoint_at
from difftrain.training.known import Known, told
from difftrain.training.latents import Prepared, Say
from difftrain.training.parts import Parts, visiting
from difftrain.training.state import CheckpointError


def inherited(train: Run, own: Known) -> Known:
    """What the modules take from the data, as the run has it that this one begins from or learns
    from; so equal tokens and classes have equal ids."""
    run = train["start_from"] or train["teacher"]
    if not run:
        return own
    theirs = told(state.averaged(checkpoint_at(Path(run)))[1])
    alike = {type(word) for word in own.vocabulary} == {type(word) for word in theirs.vocabulary}
    merged = replace(theirs, vocabulary=theirs.vocabulary if alike else own.vocabulary)
    return merged if theirs.shape == own.shape else replace(own, vocabulary=merged.vocabulary)


def begin(objective: Objective, parts: Parts, train: Run, resumed: bool, say: Say) -> None:
    """Fills the teacher, and in a new run the weights that other runs have for it."""
    if not resumed and train["start_from"]:
        _take(train["start_from"], parts, say)
    if "teacher" not in parts.modules:
        return
    if train["teacher"]:
        _teach(train["teacher"], parts, say, text=not resumed and not train["start_from"])
    elif not (objective.teacher or objective).backbone.part.options.get("weights"):
        raise PartError(
            "the objective reads `teacher`, and nothing says where its weights are: say"
            ' `train { teacher = "runs/…" }`, or give its backbone `weights`'
        )


def _take(run: str, parts: Parts, say: Say) -> None:
    """Copies every averaged weight that has the same name and shape here."""
    theirs, _ = state.averaged(checkpoint_at(Path(run)))
    own = {**parts.plan.named(parts.weights), **parts.kept}
    taken = _copy(theirs, own)
    if not any(name.startswith("student.") for name in taken):
        raise CheckpointError(
            f"nothing in `{run}` fits the network of this spec: begin from a run with the same"
            " backbone"
        )
    count, total = (sum(own[n].numel() for n in names) for names in (taken, own))
    say(f"begins from {run}: {count:,} of {total:,} weights{_new(own, taken)}")


def _teach(run: str, parts: Parts, say: Say, text: bool) -> None:
    """Copies the averaged weights of a run into the teacher: all of its network's, or none; and
    where `text` says so, into the encoder, which the teacher reads."""
    theirs, _ = state.averaged(checkpoint_at(Path(run)))
    found = {n.removeprefix("student."): v for n, v in theirs.items() if n.startswith("student.")}
    own = dict(parts.modules["teacher"].named_parameters())
    odd = next((n for n in found if n not in own or own[n].shape != found[n].shape), None)
    if odd or not found:
        there = f"`{odd}` {list(found[odd].shape)}" if odd else "no network"
        here = f" and here it is {list(own[odd].shape)}" if odd in own else ""
        raise CheckpointError(
            f"`{run}` does not fit the teacher of this spec, since it has {there}{here}: say"
            " `teacher =` and the objective that it was trained on"
        )
    taken = _copy(found, own)
    if text:
        encoder = {**parts.plan.named(parts.weights), **parts.kept}
        _copy(theirs, {n: v for n, v in encoder.items() if n.startswith("text.")})
    say(f"the teacher is {run}{_new(own, taken)}")


def _copy(theirs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """The names of the weights that are in both with one shape; ours are then theirs."""
    names = [n for n, value in own.items() if n in theirs and theirs[n].shape == value.shape]
    with torch.no_grad():
        for name in names:
            own[name].copy_(theirs[name])
    return names


def _new(own: Mapping[str, Tensor], taken: list[str]) -> str:
    """The weights that were not taken, in words."""
    new = [name for name in own if name not in set(taken)]
    listed = ", ".join(f"`{name}`" for name in new[:3]) + (", …" if len(new) > 3 else "")
    return f"; new are {listed}" if new else ""


# ---- networks from Python


@torch.no_grad()
def try_out(objective: Objective, parts: Parts, prepared: Prepared, index: bool) -> None:
    """Calls a network from Python once, so that what is wrong with it is told before anything is
    written; `index` says whether its times are indices. Raises PartError."""
    part = objective.backbone.part
    if not is_foreign(part) or prepared.latents is None:
        return
    device = parts.weights.device
    x = prepared.latents[:2].to(device)
    t = torch.zeros(len(x), device=device, dtype=torch.int64 if index else torch.float32)
    cond = None
    if prepared.tokens is not None:
        texts = [record.caption for record in prepared.pictures.records[:2]]
        with visiting(parts.text, device):
            cond = parts.text(prepared.tokens(texts).to(device))
    extra = _extra(objective.backbone.interface, x, t)
    _answered(part, parts.modules["student"], x, t, cond, extra)


def _extra(interface: Interface, x: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Further times and inputs by their last name."""
    names = [name.rpartition(".")[2] for name in (*interface.times[1:], *interface.inputs)]
    return {name: x if name == "guess" else t for name in names}


def _answered(part: Part, network: nn.Module, x: Tensor, t: Tensor, cond, extra) -> None:
    shown = "none" if cond is None else list(cond.shape)
    named = "".join(f", {name} {list(value.shape)}" for name, value in extra.items())
    called = f"x {list(x.shape)}, t {list(t.shape)}, cond {shown}{named}"
    try:
        answer = network(x, t, cond, **extra)
    except Exception as cause:  # a network of the user's may do anything
        raise PartError(
            f"the network of `{part.module}` fails for {called} ({reason(cause)}): mend it"
        ) from cause
    first = answer[0] if isinstance(answer, tuple) else answer
    if not isinstance(first, Tensor) or first.shape != x.shape:
        given = list(first.shape) if isinstance(first, Tensor) else f"a {type(first).__name__}"
        raise PartError(
            f"the network of `{part.module}` answers with {given} for {called}: it must answer with"
            " the shape of x"
        )
