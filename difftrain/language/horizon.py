"""Where sampling begins and ends: the times of a process; and how much they were shifted."""

from __future__ import annotations

import math
from collections.abc import Iterator

from difftrain.language.forms import clock
from difftrain.language.numbers import draws, support, value
from difftrain.language.scope import Equation, parts
from difftrain.language.spec import Objective
from difftrain.language.term import Term, walk
from difftrain.language.tree import Argument, Call, Expr
from difftrain.language.worlds import HERE, Frame


def horizon(objective: Objective) -> tuple[str, float, float]:
    """("index", 0, N) for a table of N levels; else ("real", low, high), the ends of the law of t
    (of `time`, on a grid of times), or ("open", low, high) where the process's own law thins out
    towards `high`. An end without a value is nan.

    A process says by its own law where it is defined: up to the end where that is bounded, only
    near it where it has a tail (the draw below it is a normal one).
    """
    tables = [t.args[0] for t in walk(objective.quantity("alpha")) if t.op == "pick"]
    if tables:
        levels = value(tables[0], {})
        return "index", 0, len(levels) if isinstance(levels, list) else math.nan
    if clock(objective.equations) == "time":
        grid = support(objective.quantity("time"))
        return "real", 0.0, grid.high
    law = own_law(objective)
    ends = support(law)
    if any(draw["law"] == "normal" for draw in draws(law)):
        return "open", ends.low, ends.high
    trained = support(objective.quantity("t")) or ends  # none where it takes a run to tell
    return "real", trained.low, trained.high


def own_law(objective: Objective) -> Term:
    """The law of t in the process, whatever the objective draws t from."""
    equations = objective.equations
    versions = [*equations.replaced, *equations.versions["t"][:1]]
    own = [e for e in versions if e.name == "t" and e.scope.label == "process"]
    derivation = objective.derivation()
    if not own:
        return derivation.read("t")
    if own[-1].form == "~":
        return derivation.law(own[-1])
    return derivation.number(own[-1].value, Frame(own[-1].scope, {}, HERE))


def own_shift(objective: Objective, count: float = math.nan) -> float:
    """How much the times that are trained are shifted towards noise, by each `shift(t, k)` on the
    way to t; of latents of `count` numbers, where k reads that. nan where it cannot be told."""
    derivation, found = objective.derivation(), 1.0
    for equation, strength in _shifts(objective):
        term = derivation.number(strength, Frame(equation.scope, {}, HERE))
        sizes = [t for t in walk(term) if t.op == "numel"]
        found *= value(term, dict.fromkeys(sizes, count))
    return found


def _shifts(objective: Objective) -> Iterator[tuple[Equation, Expr]]:
    """Every k of the library's `shift(t, k)` in the equations of t, with its equation."""
    for equation in objective.equations.versions.get("t", ()):
        for call in parts(equation.value):
            if isinstance(call, Call) and call.path == (SHIFT,) and _shipped(call, equation):
                yield equation, _strength(call.args)


SHIFT = "shift"  # of specs/std/function.diff


def _shipped(call: Call, equation: Equation) -> bool:
    definition = equation.scope.home.find("function", call.path)
    return definition is not None and definition.shipped


def _strength(args: tuple[Argument, ...]) -> Expr:
    """The argument k of `shift(t, k)`."""
    named = [a.value for a in args if a.name == "k"]
    return named[0] if named else [a.value for a in args if a.name is None][-1]
