"""An objective that is checked: its quantities, data for it, and its compiled programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from difftrain.compiler.draws import Draws
from difftrain.compiler.objective import OPTIONAL, Objective
from difftrain.compiler.program import Program
from difftrain.language.derive import INPUTS
from difftrain.language.scope import DERIVED
from difftrain.language.spec import Objective as Declared
from difftrain.language.term import Term, walk
from difftrain.language.worlds import Problem

ROWS, STEP, SEED = 3, 7, 5


def quantities(declared: Declared) -> dict[str, Term]:
    """The named quantities that have a value of their own, after all redefinitions."""
    derivation, terms = declared.derivation(), {}
    for name in (*declared.equations.versions, *DERIVED):
        with suppress(Problem):  # such as the slope of a table: lint speaks of those that are read
            terms[name] = derivation.read(name)
    plain = {n: t for n, t in terms.items() if isinstance(t, Term)}
    if reads_tap(plain["loss"]):
        return plain
    return {n: t for n, t in plain.items() if not reads_tap(t)}


def reads_tap(term: Term) -> bool:
    """Whether networks must return tokens beside their output."""
    return any(t.op == "tap" for t in walk(term))


def module_names(terms: Iterable[Term]) -> set[str]:
    """What modules the terms read."""
    return {t["name"] for t in walk(*terms) if t.op == "module"}


@dataclass(eq=False)
class Subject:
    """An objective that is checked, with its condition and the null one, a row each, or None."""

    objective: Objective
    cond: Tensor | None = None
    null: Tensor | None = None

    @cached_property
    def terms(self) -> dict[str, Term]:
        return quantities(self.objective.declared)

    @property
    def loss(self) -> Term:
        return self.terms["loss"]

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.objective.parameters() if p.requires_grad]

    def given(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Data of a shape: what the objective reads and does not draw, ROWS samples of it."""
        made = torch.Generator().manual_seed(0)

        def some(*size: int) -> Tensor:
            return torch.randn(ROWS, *size, generator=made, dtype=torch.float64)

        given = {"x0": some(*shape)}
        if self.cond is not None:
            given["cond"] = _spread(self.cond, some(*(1,) * (self.cond.dim() - 1)))
            given["null"] = self.null
        read = {t["name"] for t in walk(*self.terms.values()) if t.op == "input"}
        others = sorted(read - given.keys() - {*OPTIONAL, "step"})
        return given | {n: some(*shape) for n in others if INPUTS.get(n) == "field"}

    def program(self, given: Mapping, wanted: Iterable[str], fixed: Iterable[str] = ()) -> Program:
        free = [n for n in given if n not in (*OPTIONAL, "x0", *fixed)]
        return self.objective.program(tuple(wanted), free, tuple(fixed))

    def run(self, given: Mapping, wanted: Iterable[str], fixed: Iterable[str] = ()) -> dict:
        """Quantities of the compiled program."""
        program = self.program(given, wanted, fixed)
        tables = program.tables("cpu", torch.float64)
        return program.compute(inputs(given), draws(given), self.objective.nets, tables)

    def evaluate(self, given: Mapping, wanted: Iterable[str], **key) -> dict[str, Tensor]:
        """Quantities through the objective's own door."""
        return self.objective.evaluate(tuple(wanted), given, **{"step": STEP, "seed": SEED, **key})


def _spread(row: Tensor, noise: Tensor) -> Tensor:
    """ROWS conditions from one: real ones differ a little, labels are the same."""
    rows = row.expand(ROWS, *row.shape[1:])
    return rows + 0.3 * noise if row.is_floating_point() else rows.clone()


def inputs(given: Mapping) -> dict:
    """What a program is given at STEP."""
    step = torch.tensor(STEP, dtype=torch.float64)
    return {**dict.fromkeys(OPTIONAL), "step": step, **given}


def draws(given: Mapping) -> Draws:
    """The draws of STEP, in float64."""
    return Draws(SEED, STEP, torch.arange(len(given["x0"])), torch.float64)
