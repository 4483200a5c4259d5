"""Where sampling begins and ends: the times of an objective's process."""

from __future__ import annotations

from difftrain.language.forms import clock
from difftrain.language.numbers import draws, support, value
from difftrain.language.spec import Objective
from difftrain.language.term import Term, walk
from difftrain.language.worlds import HERE, Frame


def horizon(objective: Objective) -> tuple[str, float, float]:
    """("index", 0, N) for a table of N levels; else ("real", low, high), the ends of the law of t
    (of `time`, on a grid of times), or ("open", low, high) where the process's own law thins out
    towards `high`.

    A process says by its own law where it is defined: up to the end where that is bounded, only
    near it where it has a tail (the draw below it is a normal one).
    """
    tables = [t.args[0] for t in walk(objective.quantity("alpha")) if t.op == "pick"]
    if tables:
        return "index", 0, len(value(tables[0], {}))
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
