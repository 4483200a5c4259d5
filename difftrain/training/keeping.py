"""Where a compiled step is kept, and what it is only good for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from difftrain.compiler import kept, lowering
from difftrain.compiler.executable import Shelf
from difftrain.compiler.whole import Step
from difftrain.training.bundle import Bundle


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

    def compiled(self, step: Step, args: tuple, facts: kept.Facts, forward: bool) -> Step:
        """The step for arguments like these: as it is kept, or to be compiled as one that
        differentiates the network `forward` or not."""
        if self.has(facts):
            data, device = self.shelf.take(facts), args[0]["weights"].device
            return kept.give(data, step, kept.outside(*args[2:4]), device)
        if self.shelf is None or not self.store:
            return lowering.compiled(step, forward)
        made = kept.compiled(step, args, forward)
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
