"""The step as a machine runs it best: compiled or as it is, found compiled or made anew; and what
it is fed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from difftrain.compiler import lowering
from difftrain.compiler.kept import Facts
from difftrain.models import is_foreign
from difftrain.training.bundle import each_part, text_part
from difftrain.training.keeping import facts
from difftrain.training.latents import signed
from difftrain.training.session import Session, say

READ = {  # of a batch: what the step calls it
    "latents": "x0",
    "index": "index",
    "input_ids": "input_ids",
    "cond": "cond",
    "image": "image",
}
TRIAL = 3  # uncompiled steps that are timed before `auto` decides on a CPU


def feeding(session: Session) -> Callable[[Mapping], dict[str, Tensor]]:
    """What makes of a batch that which the step reads, on the device."""
    device, empty = session.device, _empty(session)

    def feed(batch: Mapping) -> dict[str, Tensor]:
        fed = {ours: batch[name].to(device) for name, ours in READ.items() if name in batch}
        if "image" in fed:
            fed["image"] = signed(fed["image"])
        return {**fed, **empty}

    return feed


def _empty(session: Session) -> dict[str, Tensor]:
    """What the step reads of the empty text."""
    states, device = session.prepared.states, session.device
    if states is not None:
        return {"null": states.null.to(device)}
    null_ids = session.parts.null_ids(device)
    return {} if null_ids is None else {"null_ids": null_ids}


def _foreign(session: Session) -> bool:
    """Whether Python that is not difftrain's works in the step: it may read numbers back, which no
    CUDA graph can hold."""
    objective = session.bundle.read().objective()
    seen = objective.vision, *each_part(text_part(objective))
    return any(part and is_foreign(part) for part in (objective.backbone.part, *seen))


class Stepper:
    """The step, called as it is emitted; how it runs is chosen once. A GPU replays it,
    unless it is not compiled and has Python of the user's in it.

    On a CPU `auto` first times a few steps as they are. After the first compiled step nothing may
    be compiled again. In fp32 nothing is TF32; what a step of lower precision leaves in fp32, such
    as frozen encoders of pictures, is as torch has it.
    """

    def __init__(self, session: Session):
        self.session, self.step = session, session.programs.step.step
        plain = session.train["precision"] == "fp32"
        self.products = lowering.exact if plain else nullcontext
        self.seconds: list[float] = []
        self.left = session.steps - session.done
        self.fresh = False  # whether the next call is the first of a compiled step
        asked, device = session.train["compile"], session.device.type
        self.undecided = asked == "auto" and device == "cpu" and bool(lowering.cxx())
        if not self.undecided:
            self._decide(None)
            self._note(None)

    def __call__(self, *args) -> dict[str, Tensor]:
        with self.products():
            return self._called(*args)

    def _called(self, *args) -> dict[str, Tensor]:
        if self.undecided and len(self.seconds) == (TRIAL if self.left > TRIAL else 0):
            self._weigh(*args[:2])
        if self.fresh:
            return self._tried(*args) if self.seconds else self._first(*args)
        if self.undecided:
            return self._timed(*args)
        return self.step(*args)

    def _timed(self, *args) -> dict[str, Tensor]:
        started = time.perf_counter()
        log = self.step(*args)
        self.seconds.append(time.perf_counter() - started)
        return log

    def _weigh(self, state, batch: dict[str, Tensor]) -> None:
        """Decides what was left open, once that can be known."""
        if self.left > TRIAL:
            self._decide(min(self.seconds))  # the first steps also wake libraries up
        else:
            say("not compiled: too few steps are left to gain from it")
            self.undecided = False
        self._note(facts(self.session.bundle, state["weights"], batch))

    def _note(self, good_for: Facts | None) -> None:
        """Says what a step that is not compiled leaves undone."""
        if not self.fresh and (line := self.session.keeping.unused(good_for)):
            say(line)

    def _decide(self, seconds: float | None) -> None:
        session, self.undecided = self.session, False
        kind = session.device.type
        choice = lowering.choose(session.train["compile"], kind, self.left, seconds)
        say(choice.because)
        self.fresh = choice.compiled
        if kind == "cuda" and not choice.compiled and not _foreign(session):
            self.step = lowering.Replayed(self.step)

    def _tried(self, *args) -> dict[str, Tensor]:
        """The first call of a step that was compiled for speed alone: without that, as it was. What
        cannot be compiled has changed nothing."""
        plain = self.step
        try:
            return self._first(*args)
        except lowering.NotCompiled as cause:
            say(f"not compiled after all: {cause}")
            self.step = plain
            return plain(*args)

    def _first(self, state, batch: dict[str, Tensor], *rest) -> dict[str, Tensor]:
        """The first call of a compiled step, which compiles it or finds it compiled."""
        started, keeping, cuda = time.perf_counter(), self.session.keeping, batch["x0"].is_cuda
        good_for, self.fresh = facts(self.session.bundle, state["weights"], batch), False
        had = keeping.has(good_for)
        step = keeping.compiled(
            self.step, (state, batch, *rest), good_for, self.session.programs.forward
        )
        reading = time.perf_counter() - started
        self.step = lowering.Replayed(step) if cuda else step
        with lowering.compiling():
            log = self.step(state, batch, *rest)
        if cuda:
            torch.cuda.synchronize()
        lowering.no_more_compiling()
        say(keeping.told(good_for, had, time.perf_counter() - started, reading))
        return log
