"""Where a compiled step is kept, and what it is only good for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from difftrain.compiler import kept, lowering
from difftrain.compiler.executable import Shelf
from difftrain.compiler.texts import versions
from difftrain.compiler.whole import Step
from difftrain.training.bundle import Bundle

NETWORKS = ("diffusers", "transformers")


def facts(bundle: Bundle, weights: Tensor, batch: Mapping[str, Tensor]) -> kept.Facts:
    """What a compiled step of a bundle is only good for: a machine, the packages that networks come
    of, the graph, the shapes."""
    packages = {name: number for name, number in versions().items() if name in NETWORKS}
    shapes = {name: list(value.shape) for name, value in batch.items()}
    shapes |= {"weights": list(weights.shape)}
    what = {"graph": bundle.manifest["graph"], "shapes": shapes}
    return {**kept.machine(weights.device), **packages, **what}


@dataclass(eq=False)
class Keeping:
    """Where a compiled step may be found and, with `store`, is put, unless that was `refused`."""

    shelf: Shelf | None = None
    store: bool = False
    refused: str = ""

    def has(self, facts: kept.Facts) -> bool:
        """Whether the file has a compiled step for these facts."""
        return self.shelf is not None and self.shelf.has(facts)

    def unused(self, facts: kept.Facts | None) -> str:
        """What is said where a step is not compiled and the file has one for these facts, or was to
        have one; else nothing."""
        if facts is not None and self.has(facts):
            return "this file has the compiled step, and `--set train.compile=on` reads it"
        return "`--store` keeps nothing, since the step is not compiled" if self.store else ""

    def compiled(self, step: Step, args: tuple, facts: kept.Facts, forward: bool) -> Step:
        """The step for arguments like these: as it is kept, or to be compiled as one that
        differentiates the network `forward` or not."""
        if self.has(facts):
            data, device = self.shelf.take(facts), args[0]["weights"].device
            return kept.give(data, step, kept.outside(*args[2:4]), device)
        if self.shelf is None or not self.store:
            return lowering.compiled(step, forward)
        made = kept.compiled(step, args, forward)
        self._put(facts, made, kept.outside(*args[2:4]))
        return made

    def _put(self, facts: kept.Facts, made: Step, outside: Mapping[str, object]) -> None:
        """Puts a compiled step into the file; one that cannot be put there can still be run."""
        try:
            self.shelf.put(facts, kept.take(made, outside))
        except kept.NotKept as cause:
            self.refused = str(cause)
        except OSError as cause:
            self.refused = (cause.strerror or str(cause)).lower()

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
            name, why = self.shelf.path.name, self.refused
            where = f"cannot be kept in `{name}`: {why}" if why else f"is now kept in `{name}`"
            return f"{line}; it {where}"
        return (
            f"{line}; this file has none for {facts['device']}, torch {facts['torch']} and these"
            " shapes, and `--store` puts it there"
        )
