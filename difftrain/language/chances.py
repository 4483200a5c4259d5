"""How likely a law makes a value: its density, and the odds between two laws."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from difftrain.language import mistakes
from difftrain.language.calculus import NoDerivative, derivative
from difftrain.language.inverse import solved
from difftrain.language.numbers import Support, between, draws, support
from difftrain.language.numbers import value as number_of
from difftrain.language.term import Term, const, leaf, make, rebuild, walk
from difftrain.language.tree import Argument, Call
from difftrain.language.worlds import ALL, Frame, Problem

if TYPE_CHECKING:
    from difftrain.language.derive import Derivation


def density(self: Derivation, expr: Call, frame: Frame) -> Term:
    """`density(q, v)`: how likely the law of the draw q makes the value v."""
    law, wanted = expr.args
    return _likely(self, law, self.number(wanted.value, frame), frame)


def odds(self: Derivation, expr: Call, frame: Frame) -> Term:
    """`odds(p, q, v)`: how much more often v would come if what it is made of, the draw q and
    copies of it, were drawn as p is."""
    usual, moved, made = expr.args
    value = self.number(made.value, frame)
    drawn = _drawn(self, moved, frame)
    _reaches(_drawn(self, usual, frame), drawn, usual, moved)
    ratio = const(1)
    for at in _sources(self, value, drawn, made):
        ratio = ratio * _likely(self, usual, at, frame) / _likely(self, moved, at, frame)
    return ratio


def _reaches(usual: Term, moved: Term, law: Argument, other: Argument) -> None:
    """Every value of the usual law may come from the other as well. Raises Problem."""
    wanted, found = support(usual), support(moved)
    if not wanted or not found or wanted.whole != found.whole:
        return
    slack = 1e-9 * max(1.0, abs(wanted.low))
    below = [v for v in wanted.values if v < found.low - slack]
    above = [v for v in wanted.values if v > found.high + slack]
    lost = [(below[0], below[-1] if wanted.whole else found.low)] if below else []
    lost += [(above[0] if wanted.whole else found.high, above[-1])] if above else []
    if lost:
        raise Problem(mistakes.never_drawn(lost, (wanted.low, wanted.high), law, other))


def _sources(self: Derivation, value: Term, drawn: Term, made: Argument) -> list[Term]:
    """The values under a term that come from a law: of its draw, of copies, or given instead."""
    leaves = draws(drawn)
    if len(leaves) != 1:
        return [value]  # which has no density, as is then said
    (base,) = leaves
    found = []
    for part in walk(value):
        if part.op == "draw" and self.is_copy(part["name"], base["name"]):
            found.append(rebuild(drawn, lambda t, args, part=part: part if t is base else None))
        elif part.op == "input" and part["name"] == made.value.span.text:
            found.append(part)
    return found


def _drawn(self: Derivation, law: Argument, frame: Frame) -> Term:
    """What a draw is, whatever is given instead: a given value has no law."""
    world = replace(frame.world, plain=frozenset({ALL}))
    return self.number(law.value, Frame(frame.scope, frame.env, world))


def _likely(self: Derivation, law: Argument, at: Term, frame: Frame) -> Term:
    """The density of the law of a draw at a value."""
    drawn = _drawn(self, law, frame)
    leaves = draws(drawn)
    if len(leaves) != 1 or leaves[0]["law"] not in ("uniform", "normal", "integer"):
        raise Problem(mistakes.no_density(law, self.equations, frame.scope.label))
    (draw,) = leaves
    if draw["law"] == "integer":
        return _within(1 / draw.args[0], at, support(drawn))
    base = leaf("variable", "sample", name="base")
    body = rebuild(drawn, lambda term, args: base if term is draw else None)
    uniform = draw["law"] == "uniform"
    low, high = (number_of(a, {}) for a in draw.args) if uniform else (-math.inf, math.inf)
    if _turns(body, base, low, high):
        raise Problem(mistakes.no_density(law, self.equations, frame.scope.label))
    found = solved(body, base, at, low, high)
    try:
        rise = derivative(body, base)
    except NoDerivative:
        raise Problem(mistakes.no_density(law, self.equations, frame.scope.label)) from None
    slope = rebuild(rise, lambda term, args: found if term is base else None)
    share = _base_density(draw, found) / make("abs", slope)
    moves = any(term.op == "input" for term in walk(drawn))  # so its ends are no constants
    return share if moves else _within(share, at, support(drawn))


def _base_density(draw: Term, at: Term) -> Term:
    """How likely a uniform or normal draw is a value."""
    first, second = draw.args
    if draw["law"] == "uniform":
        return 1 / (second - first)
    bell = make("exp", -(((at - first) / second) ** 2) / 2)
    return bell / (second * math.sqrt(2 * math.pi))


def _within(share: Term, at: Term, ends: Support) -> Term:
    """A density, which is 0 outside the ends of its law, where values could lie there."""
    asked = support(at)
    if not ends or (asked and ends.low <= asked.low and asked.high <= ends.high):
        return share
    for test, end in (("ge", ends.low), ("le", ends.high)):
        share = make("where", make(test, at, const(end)), share, const(0))
    return share


def _turns(body: Term, moving: Term, low: float, high: float) -> bool:
    """Whether a map of one draw is known to give some value twice."""
    found = seen(body, moving, low, high)
    return not any(math.isnan(v) for v in found) and not runs_one_way(found)


def seen(body: Term, moving: Term, low: float, high: float) -> list[float]:
    """The values of a quantity at some points between two ends."""
    return [number_of(body, {moving: between(low, high, i / 16)}) for i in range(1, 16)]


def runs_one_way(found: list[float]) -> bool:
    """Whether values always rise or always fall."""
    return all(a < b for a, b in pairwise(found)) or all(a > b for a, b in pairwise(found))
