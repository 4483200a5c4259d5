"""The step as a machine runs it best: compiled or as it is, found compiled or made anew."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from difftrain.compiler import kept, lowering
from difftrain.compiler.executable import Shelf
from difftrain.training.bundle import Bundle

if TYPE_CHECKING:
    from difftrain.training.run import Session

TRIAL = 3  # uncompiled steps that are timed before `auto` decides on a CPU


def say(line: str) -> None:
    """One line for the person who waits, beside the progress bar."""
    tqdm.write(line, file=sys.stderr)


def facts(bundle: Bundle, weights: Tensor, batch: int, size: int) -> kept.Facts:
    """What a compiled step of a bundle is only good for: a machine, the graph, the shapes."""
    shapes = {"batch": batch, "size": size, "weights": weights.numel()}
    return {**kept.machine(weights.device), "graph": bundle.manifest["graph"], **shapes}


@dataclass(frozen=True)
class Keeping:
    """Where a compiled step may be found and, with `store`, is put."""

    shelf: Shelf | None = None
    store: bool = False

    def give(self, facts: kept.Facts) -> bool:
        """Whether there is a compiled step for these facts; torch then has it."""
        data = self.shelf.take(facts) if self.shelf else None
        if data is not None:
            kept.give(data)
        return data is not None

    def told(self, facts: kept.Facts, given: bool, seconds: float) -> str:
        """One line on where the compiled step came from; it is put where it is to be kept."""
        took = f"{seconds:.1f} s to the first step"
        if kept.found():
            whence = "out of this file" if given else "compiled on this machine before"
            line = f"the compiled step is {whence}: {took}"
        else:
            line = f"the step was compiled: {took}"
        if self.shelf is None or given:
            return line
        if not self.store:
            return f"{line}; {_absent(facts)}, and `--store` puts it there"
        self.shelf.put(facts, kept.take())
        return f"{line}; it is now kept in `{self.shelf.path.name}`"


def _absent(facts: kept.Facts) -> str:
    return (
        f"this file has none for {facts['device']}, torch {facts['torch']} and these"
        f" {facts['batch']} samples of {facts['size']} px"
    )


class Stepper:
    """The step, called as it is emitted; how it runs is chosen once. A GPU replays it.

    On a CPU `auto` first times a few steps as they are. After the first compiled step nothing may
    be compiled again.
    """

    def __init__(self, session: Session):
        self.session, self.step = session, session.programs.step.step
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
        self.step = lowering.compiled(self.step) if choice.compiled else self.step
        if kind == "cuda":
            self.step = lowering.Replayed(self.step)

    def _first(self, *args) -> dict[str, Tensor]:
        """The first call of a compiled step, which compiles it or finds it compiled."""
        started, session = time.perf_counter(), self.session
        self.fresh = False
        data, weights = session.data, session.parts.weights
        good_for = facts(session.bundle, weights, data["batch"], data["size"])
        given = session.keeping.give(good_for)
        log = self.step(*args)
        if weights.device.type == "cuda":
            torch.cuda.synchronize()
        lowering.no_more_compiling()
        say(session.keeping.told(good_for, given, time.perf_counter() - started))
        return log
