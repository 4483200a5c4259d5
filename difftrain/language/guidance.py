"""Networks that are given their guidance: which input it is, and what a wanted scale makes it."""

from __future__ import annotations

from difftrain.language.numbers import draws, value
from difftrain.language.spec import Objective
from difftrain.language.worlds import Frame


def own_guidance(objective: Objective) -> dict[str, tuple[float, float]]:
    """Input of the network -> (a, b): at guidance g (Imagen form) it is given a * g + b.

    A block says `has_guidance = 1 + w`, the guidance that is in its network at w; the network is
    guided if it is given that w.
    """
    derivation = objective.derivation()
    found = {}
    for expr, scope in objective.equations.guided.values():
        term = derivation.number(expr, Frame(scope, {}, derivation.home))
        (draw,) = draws(term)
        if draw["name"] in objective.backbone.interface.inputs:
            at = [value(term, {draw: x}) for x in (0.0, 1.0)]
            slope = at[1] - at[0]
            found[draw["name"]] = (1 / slope, -at[0] / slope)
    return found
