"""Networks that are given their guidance: which input it is, and what a wanted scale makes it."""

from __future__ import annotations

import math

from difftrain.language.finding import Finding, Label
from difftrain.language.numbers import draws, value
from difftrain.language.spec import Objective
from difftrain.language.term import Term
from difftrain.language.tree import Expr
from difftrain.language.worlds import Frame, Problem


def own_guidance(objective: Objective) -> dict[str, tuple[float, float]]:
    """Input of the network -> (a, b): at guidance g (Imagen form) it is given a * g + b.

    A block says `has_guidance = 1 + w`, the guidance that is in its network at w; the network is
    guided if it is given that w. Raises Problem for guidance that no input could set.
    """
    derivation = objective.derivation()
    found = {}
    for expr, scope in objective.equations.guided.values():
        term = derivation.number(expr, Frame(scope, {}, derivation.home))
        leaves = draws(term)
        if len(leaves) != 1:
            raise Problem(_unclear(expr))
        (draw,) = leaves
        if draw["name"] in objective.backbone.interface.inputs:
            found[draw["name"]] = _undone(term, draw, expr)
    return found


def _undone(term: Term, draw: Term, expr: Expr) -> tuple[float, float]:
    """(a, b) with draw = a * term + b."""
    start, one, two = (value(term, {draw: x}) for x in (0.0, 1.0, 2.0))
    slope = one - start
    if not slope or not math.isclose(two, start + 2 * slope, rel_tol=1e-9, abs_tol=1e-12):
        raise Problem(_unclear(expr))
    return 1 / slope, -start / slope


def _unclear(expr: Expr) -> Finding:
    return Finding(
        "DIF310",
        f"`{expr.span.text}` does not say how to ask the network for a guidance scale",
        Label(expr.span),
        because="it has to be a multiple of one drawn input, plus a number",
        help="write `has_guidance = 1 + w` with `w ~ …`, or leave `has_guidance` out",
    )
