"""Laws that are put on another quantity than t: `logsnr ~ normal(0, 2)` says what t is drawn from.

t is then the time at which the quantity has the drawn value.
"""

from __future__ import annotations

from difftrain.language.scope import Equations, parts
from difftrain.language.tree import Argument, Call, Draw, Name, Statement

TIME, INVERSE = "t", "inverse"


def on_time(body: list[Statement], equations: Equations) -> list[Statement]:
    """The statements with each law on a quantity that t decides as a law of t."""
    return [_moved(s) if _decided(s, equations) else s for s in body]


def _decided(node: Statement, equations: Equations) -> bool:
    """Whether a draw is of something that has an equation already, which leads to t."""
    if not isinstance(node, Draw) or node.name == TIME:
        return False
    return TIME in _read(node.name, equations, set())


def _read(name: str, equations: Equations, seen: set[str]) -> set[str]:
    """The quantities that a defined one is computed from, itself included."""
    (first, *_) = equations.versions.get(name, (None,))
    seen.add(name)
    if first is not None and first.form == "=":
        inner = [".".join(e.path) for e in parts(first.value) if isinstance(e, (Name, Call))]
        for read in {first.scope.locals.get(n, n) for n in inner} - seen:
            _read(read, equations, seen)
    return seen


def _moved(node: Draw) -> Draw:
    quantity = Name((node.name,), node.head)
    args = (Argument(None, quantity, node.head), Argument(None, node.law, node.law.span))
    return Draw(TIME, Call((INVERSE,), args, node.span, node.head), node.span, node.head)
