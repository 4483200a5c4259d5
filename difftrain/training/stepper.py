"""The step as a machine runs it best: compiled or as it is, found compiled or made anew."""

from __future__ import annotations

import time
from contextlib import nullcontext

import torch
from torch import Tensor

from difftrain.compiler import lowering
from difftrain.training.keeping import facts
from difftrain.training.session import Session, say

TRIAL = 3  # uncompiled steps that are timed before `auto` decides on a CPU


class Stepper:
    """The step, called as it is emitted; how it runs is chosen once. A GPU replays it.

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
        elif self.left <= TRIAL:
            say("not compiled: too few steps are left to gain from it")

    def __call__(self, *args) -> dict[str, Tensor]:
        with self.products():
            return self._called(*args)

    def _called(self, *args) -> dict[str, Tensor]:
        if self.undecided and len(self.seconds) == TRIAL:
            self._decide(min(self.seconds))  # the first steps also wake libraries up
        if self.fresh:
            return self._first(*args)
        if self.undecided:
            return self._timed(*args)
        return self.step(*args)

    def _timed(self, *args) -> dict[str, Tensor]:
        started = time.perf_counter()
        log = self.step(*args)
        self.seconds.append(time.perf_counter() - started)
        return log

    def _decide(self, seconds: float | None) -> None:
        session, self.undecided = self.session, False
        kind = session.device.type
        choice = lowering.choose(session.train["compile"], kind, self.left, seconds)
        say(choice.because)
        self.fresh = choice.compiled
        if kind == "cuda" and not choice.compiled:
            self.step = lowering.Replayed(self.step)

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
        log = self.step(state, batch, *rest)
        if cuda:
            torch.cuda.synchronize()
        lowering.no_more_compiling()
        say(keeping.told(good_for, had, time.perf_counter() - started, reading))
        return log
