"""Terms as numbers: the support of a law, and values of a term over it, in plain Python floats.

Enough to decide where a determinant vanishes or a weight is unbounded, without a tensor library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product as combinations
from statistics import NormalDist

from difftrain.language.operations import OPERATIONS, apply
from difftrain.language.term import Term, walk

NORMAL = NormalDist()
QUANTILES = tuple(i / 32 for i in range(33))
COARSE = (0.03, 0.31, 0.64, 0.97)
ENDS = (0, 0.31, 0.64, 1)
HALVINGS = 60  # of a bisection: about all the digits that a double has
MOST = 10_000  # indices of a law that are looked at one by one


def quantile(draw: Term, args: list, u: float) -> float | bool:
    """The value of a base draw at quantile u in [0, 1]; u = 0 and 1 are the ends of its support."""
    if any(not isinstance(a, list) and math.isnan(a) for a in args):
        return math.nan
    match draw["law"]:
        case "uniform":
            low, high = args
            return low + (high - low) * u
        case "normal":
            mean, std = args
            return mean + std * (
                NORMAL.inv_cdf(u) if 0 < u < 1 else math.copysign(math.inf, u - 0.5)
            )
        case "integer":
            return min(math.floor(args[0] * u + 1e-6), math.floor(args[0]) - 1)
        case "bernoulli":
            return u >= 1 - args[0]
        case "choice":
            return _choose(args[0], u)
    return NORMAL.inv_cdf(min(max(u, 0.001), 0.999))  # noise: one element of it


def _choose(weights: list[float], u: float) -> int:
    total, reached = sum(weights), 0.0
    for i, weight in enumerate(weights):
        reached += weight
        if weight > 0 and reached >= u * total:
            return i
    return len(weights) - 1


def value(term: Term, known: dict[Term, object]) -> object:
    """The number (or list) of a term whose leaves are known or constant; nan where it has none."""
    return values([term], [known])[0][0]


def values(terms: list[Term], at: list[dict[Term, object]]) -> list[list]:
    """The numbers of terms at each point. What depends on no leaf is computed once."""
    parts = list(walk(*terms))
    leaves = {leaf for known in at for leaf in known}
    moving: set[Term] = set()
    still: dict[Term, object] = {}
    for part in parts:
        if part in leaves or any(a in moving for a in part.args):
            moving.add(part)
        else:
            still[part] = _compute(part, still)
    rows = []
    for known in at:
        done = {**known}
        for part in parts:
            if part in moving and part not in done:
                done[part] = _compute(part, _Both(done, still))
        rows.append([done[t] if t in moving else still[t] for t in terms])
    return rows


class _Both:
    """What is computed for one point, and what is the same at all."""

    def __init__(self, here: dict, everywhere: dict):
        self.here, self.everywhere = here, everywhere

    def __getitem__(self, part: Term):
        return self.here[part] if part in self.here else self.everywhere[part]


def _compute(part: Term, done) -> object:
    if part.op in ("const", "word"):
        return part.value
    if part.op == "inverse":
        return _solve(part, done)
    if part.op == "jvp" or part.op not in OPERATIONS or OPERATIONS[part.op].scalar is None:
        return math.nan
    try:
        return apply(part.op, *(done[a] for a in part.args))
    except ZeroDivisionError:
        return _limit(part, done)
    except (ValueError, OverflowError, IndexError, TypeError):
        return math.nan


def _solve(part: Term, done) -> float:
    """Where the body of an inverse has the wanted value."""
    body, _, wanted = part.args[:3]
    if math.isnan(done[wanted]):
        return math.nan
    return _bisected(part, done[wanted], tuple((t, done[t]) for t in draws(body)))


@lru_cache(maxsize=4096)  # the same few points are asked for again by every rule
def _bisected(part: Term, wanted: float, still: tuple[tuple[Term, object], ...]) -> float:
    body, variable = part.args[:2]
    low, high = (a.value for a in part.args[3:])

    def at(share: float) -> float:
        return value(body, {**dict(still), variable: between(low, high, share)})

    rising = at(0.75) > at(0.25)
    left, right = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (left + right) / 2
        left, right = (middle, right) if (at(middle) < wanted) == rising else (left, middle)
    return between(low, high, (left + right) / 2)


def between(low: float, high: float, share: float) -> float:
    """A point between two ends, of which either may be infinite; share is in (0, 1)."""
    if math.isinf(low) and math.isinf(high):
        return math.log(share / (1 - share))
    if math.isinf(high):
        return low + share / (1 - share)
    if math.isinf(low):
        return high - (1 - share) / share
    return low + (high - low) * share


def _limit(part: Term, done) -> float:
    """`1 / 0` is infinite and `0 / 0` has no value; a table takes this entry by entry."""
    args = [done[a] for a in part.args]
    if any(isinstance(a, list) for a in args):
        return math.nan
    top = args[0] if part.op == "div" else 1.0
    return math.nan if top == 0 or math.isnan(top) else math.copysign(math.inf, top)


def draws(*terms: Term) -> list[Term]:
    """The base draws under the terms, in a fixed order."""
    found = {t for t in walk(*terms) if t.op == "draw"}
    return sorted(found, key=lambda t: t["name"])


def points(*terms: Term, step: float = 1000.0, coarse=COARSE) -> list[dict[Term, object]]:
    """Values for the draws under the terms: a fine grid for one draw (every index of a discrete
    one), a coarse one for several. The ends of the support come first and last."""
    leaves = draws(*terms)
    step_leaf = {t: step for t in walk(*terms) if t.op == "input" and t["name"] == "step"}
    grid = QUANTILES if len(leaves) == 1 else coarse
    result = []
    for levels in combinations(*(_levels(leaf, grid, step_leaf) for leaf in leaves[:4])):
        known = dict(step_leaf)
        for leaf, u in zip(leaves, levels, strict=False):
            known[leaf] = quantile(leaf, [value(a, known) for a in leaf.args], u)
        for leaf in leaves[4:]:
            known[leaf] = quantile(leaf, [value(a, known) for a in leaf.args], 0.4)
        result.append(known)
    return result


def _levels(leaf: Term, grid, known) -> tuple[float, ...]:
    if leaf["law"] == "integer" and len(grid) > 4:
        n = value(leaf.args[0], known)
        if 1 <= n <= MOST:
            return tuple(i / n for i in range(int(n)))
    return grid


@dataclass(frozen=True)
class Support:
    """Values of a law in ascending order, its ends included (nan, where it has no values); `whole`
    where they are indices."""

    values: tuple[float, ...] = ()
    whole: bool = False

    def __bool__(self) -> bool:
        return bool(self.values)

    @property
    def low(self) -> float:
        return self.values[0] if self.values else math.nan

    @property
    def high(self) -> float:
        return self.values[-1] if self.values else math.nan

    @property
    def middle(self) -> float:
        return self.values[len(self.values) // 2]


def support(term: Term) -> Support:
    """The values that a term takes; none where they cannot be told before a run."""
    rows = values([term], points(term, coarse=ENDS))
    numbers = [row[0] for row in rows]
    if any(not isinstance(n, (int, float)) or math.isnan(n) for n in numbers):
        return Support()
    counted = any(leaf["law"] in ("integer", "choice") for leaf in draws(term))
    whole = counted and all(math.isfinite(n) and n == int(n) for n in numbers)
    return Support(tuple(sorted(set(numbers))), whole)


def constant(term: Term, at: list[dict[Term, object]]) -> float | None:
    """The number that the term equals at every point (to 1e-12), if there is one."""
    seen = [row[0] for row in values([term], at)]
    if not seen or any(not isinstance(v, (int, float)) or math.isnan(v) for v in seen):
        return None
    center = round(seen[len(seen) // 2], 12)
    return center if all(abs(v - center) <= 1e-12 * max(1, abs(center)) for v in seen) else None
