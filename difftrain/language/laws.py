"""Laws that are put on another quantity than t: `logsnr ~ normal(0, 2)` says what t is drawn from.

t is then the time at which the quantity has the drawn value.
"""

from __future__ import annotations

from difftrain.language.finding import Finding, Label
from difftrain.language.scope import Equations, parts
from difftrain.language.tree import Argument, Call, Define, Draw, Name, Statement

TIME, INVERSE = "t", "inverse"
SHAPES = ("zeros", "numel", "noise")  # what reads the shape of its argument alone


def on_time(body: list[Statement], equations: Equations, found: list[Finding]) -> list[Statement]:
    """The statements with each law on a quantity that t decides as a law of t."""
    moved = [_moved(s) if _decided(s, equations) else s for s in body]
    laws = [s for s in moved if isinstance(s, Define | Draw) and s.name == TIME]
    if len(laws) > 1 and any(law not in body for law in laws):
        first, second = laws[:2]
        text, also = "`t` has two laws in one objective", Label(first.head, "the first one")
        because = "a law of a quantity that `t` decides is a law of `t`"
        at, hint = Label(second.head), "delete one"
        found.append(Finding("DIF109", text, at, (also,), because, hint))
    return moved


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
        read = parts(first.value, SHAPES)
        inner = [".".join(e.path) for e in read if isinstance(e, (Name, Call))]
        for other in {first.scope.locals.get(n, n) for n in inner} - seen:
            _read(other, equations, seen)
    return seen


def _moved(node: Draw) -> Draw:
    quantity = Name((node.name,), node.head)
    args = (Argument(None, quantity, node.head), Argument(None, node.law, node.law.span))
    return Draw(TIME, Call((INVERSE,), args, node.span, node.head), node.span, node.head)
