"""The step as a machine runs it best: compiled or as it is, found compiled or made anew."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
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


def facts(bundle: Bundle, weights: Tensor, batch: Mapping[str, Tensor]) -> kept.Facts:
    """What a compiled step of a bundle is only good for: a machine, the graph, the shapes."""
    shapes = {name: list(value.shape) for name, value in batch.items()}
    shapes |= {"weights": list(weights.shape)}
    return {**kept.machine(weights.device), "graph": bundle.manifest["graph"], "shapes": shapes}


@dataclass(frozen=True)
class Keeping:
    """Where a compiled step may be found and, with `store`, is put."""

    shelf: Shelf | None = None
    store: bool = False

    def has(self, facts: kept.Facts) -> bool:
        """Whether the file has a compiled step for these facts."""
        return self.shelf is not None and self.shelf.has(facts)

    def compiled(self, step: Callable, args: tuple, facts: kept.Facts) -> Callable:
        """The step for arguments like these: as it is kept, or to be compiled."""
        if self.has(facts):
            return kept.give(self.shelf.take(facts), step, kept.outside(*args[2:4]))
        if self.shelf is None or not self.store:
            return lowering.compiled(step)
        made = kept.compiled(step, args)
        self.shelf.put(facts, kept.take(made, kept.outside(*args[2:4])))
        return made

    def told(self, facts: kept.Facts, had: bool, seconds: float, reading: float) -> str:
        """One line on where the step came from, the file having `had` it before or not, and on the
        seconds until its first call was done, those of `reading` it among them."""
        took = f"{seconds:.1f} s to the first step"
        if had:
            return f"the compiled step is out of this file: {took}, {reading:.1f} of them reading"
        whence = "was found compiled on this machine" if kept.found() else "was compiled"
        line = f"the step {whence}: {took}"
        if self.shelf is None:
            return line
        if self.store:
            return f"{line}; it is now kept in `{self.shelf.path.name}`"
        return (
            f"{line}; this file has none for {facts['device']}, torch {facts['torch']} and these"
            " shapes, and `--store` puts it there"
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
        if kind == "cuda" and not choice.compiled:
            self.step = lowering.Replayed(self.step)

    def _first(self, state, batch: dict[str, Tensor], *rest) -> dict[str, Tensor]:
        """The first call of a compiled step, which compiles it or finds it compiled."""
        started, keeping, cuda = time.perf_counter(), self.session.keeping, batch["x0"].is_cuda
        good_for, self.fresh = facts(self.session.bundle, state["weights"], batch), False
        had = keeping.has(good_for)
        step = keeping.compiled(self.step, (state, batch, *rest), good_for)
        reading = time.perf_counter() - started
        self.step = lowering.Replayed(step) if cuda else step
        log = self.step(state, batch, *rest)
        if cuda:
            torch.cuda.synchronize()
        lowering.no_more_compiling()
        say(keeping.told(good_for, had, time.perf_counter() - started, reading))
        return log
