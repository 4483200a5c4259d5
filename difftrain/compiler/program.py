"""Graph to program: the emitted source, loaded, with its tables in place."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from hashlib import sha256
from types import ModuleType

import torch
from torch import Tensor

from difftrain.compiler.emit import emit
from difftrain.graph.build import build
from difftrain.graph.graph import Graph
from difftrain.graph.passes import run
from difftrain.language.spec import Objective


@dataclass(eq=False)
class Program:
    """A compiled set of quantities: its graph before and after the passes, and its source."""

    derived: Graph
    graph: Graph
    source: str
    compute: Callable
    make_tables: Callable
    _placed: dict = field(default_factory=dict)

    def tables(self, device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tables on a device: fp32 unless everything is float64, whatever the net has."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        key = (str(device), wide)
        if key not in self._placed:
            made = self.make_tables()
            self._placed[key] = {k: v.to(device, wide) for k, v in made.items()}
        return self._placed[key]


def load(source: str, name: str = "step") -> ModuleType:
    """The module of an emitted source. It can be imported under its name, as tracing wants."""
    title = f"difftrain_{name}_{sha256(source.encode()).hexdigest()[:12]}"
    module = sys.modules[title] = ModuleType(title)
    exec(compile(source, f"<{title}>", "exec"), module.__dict__)
    return module


def compile_quantities(
    objective: Objective,
    wanted: Iterable[str],
    given: Iterable[str] = (),
    fixed: Iterable[str] = (),
) -> Program:
    """The program of the wanted quantities, `given` and `fixed` ones being inputs: see
    `graph.build`. Raises SpecError."""
    derived = build(objective, tuple(wanted), tuple(given), tuple(fixed))
    graph = run(derived)
    title = f"{objective.name or 'objective'}: {', '.join(wanted)}, as difftrain compiled it."
    source = emit(graph, title)
    module = load(source)
    return Program(derived, graph, source, module.compute, module.tables)
