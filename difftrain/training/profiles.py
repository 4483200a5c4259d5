"""How averages weigh the past: power-function profiles, and one put together from others.

An average whose decay at update n is (1 - 1/n)^(gamma + 1) holds, after T updates, the weights of
update k with the share that p(t) = (gamma + 1) t^gamma / T^(gamma + 1) has between k - 1 and k. Its
width `std` is the deviation of p, relative to T. arXiv:2312.02696 section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from difftrain.language.numbers import value
from difftrain.language.term import Term, walk

WIDEST = 12**-0.5  # every update weighs the same: gamma = 0
TRIED = (1, 3, 10, 1_000, 1_000_000)  # updates at which a decay has to be a power function
FAR = 0.1  # of the norm of a profile: what is farther off is another profile
WIDTHS = np.arange(2, 58) / 200  # that are tried to tell what can be had


@dataclass(frozen=True)
class Profile:
    """The profile of width `std` after so many updates."""

    updates: int
    std: float


def exponent(std: float) -> float:
    """The exponent gamma of a profile of width `std`: arXiv:2312.02696 alg. 2."""
    return float(np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max())


def width(decay: Term) -> float | None:
    """The width of the average with this decay, in `step`; None where it is no power function."""
    inputs = [t for t in walk(decay) if t.op == "input"]
    half, *rest = (value(decay, dict.fromkeys(inputs, n)) for n in (2, *TRIED))
    if not 0 < half <= 0.5:
        return None
    power = -math.log2(half)
    expected = [(1 - 1 / n) ** power for n in TRIED]
    if not all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(rest, expected, strict=True)):
        return None
    return math.sqrt(power / (power + 2)) / (power + 1)


def inner(a: Sequence[Profile], b: Sequence[Profile]) -> np.ndarray:
    """The integrals [A, B] of the products of two profiles: arXiv:2312.02696 alg. 3."""
    t_a, g_a = _columns(a)
    t_b, g_b = (v.T for v in _columns(b))
    shorter, longer = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    later = np.where(t_a < t_b, g_b, g_a)  # the exponent of the one that goes on longer
    scale = (g_a + 1) * (g_b + 1) / (g_a + g_b + 1)
    return scale * (shorter / longer) ** later / longer


def _columns(profiles: Sequence[Profile]) -> tuple[np.ndarray, np.ndarray]:
    """The updates [N, 1] and the exponents [N, 1]."""
    updates = np.array([p.updates for p in profiles], dtype=np.float64)
    gammas = {std: exponent(std) for std in {p.std for p in profiles}}
    return updates[:, None], np.array([gammas[p.std] for p in profiles])[:, None]


def shares(given: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """What each of the given averages [N] adds to the wanted one, and how far their profile is then
    from the wanted one, relative to its norm.

    Least squares as in arXiv:2312.02696 alg. 3, with the sum held at 1: the networks there have
    weights of fixed norm, and here what stands still has to stay as it is.
    """
    gram, side = inner(given, given), inner(given, [wanted])[:, 0]
    norms = np.sqrt(np.diag(gram))  # profiles of norm 1 keep the equations well conditioned
    ones = 1 / norms
    system = np.block([[gram / np.outer(norms, norms), ones[:, None]], [ones, 0.0]])
    found = np.linalg.solve(system, np.append(side / norms, 1.0))[:-1] / norms
    whole = inner([wanted], [wanted]).item()
    square = (whole - 2 * side @ found + found @ gram @ found) / whole
    return found, math.sqrt(max(square, 0.0))


def reach(given: Sequence[Profile], updates: int) -> tuple[float, float]:
    """The least and the largest width that the given averages can be put together to."""
    near = [std for std in WIDTHS if shares(given, Profile(updates, std))[1] <= FAR]
    tracked = [p.std for p in given if p.updates == updates]
    return min(near + tracked), max(near + tracked)
