"""How often a noise level is trained, and how much it counts: p(lambda) and w(lambda) as numbers.

lambda is logsnr. A row (a, b), a weight w_p on (pred - target)^2 and a law of t make
`w(lambda) = 2 w_p (det / alpha)^2 p(lambda)` with `p(lambda) = p(t) / |dlambda/dt|`; the loss is
then 1/2 the integral of w(lambda) |eps - eps_hat|^2 (arXiv:2303.00848 eq. 6). Nothing here needs
tensors.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from difftrain.language.calculus import NoDerivative, derivative
from difftrain.language.numbers import QUANTILES, draws, quantile, value, values
from difftrain.language.term import Term, walk

NEEDED = ("t", "alpha", "sigma", "snr", "logsnr", "det", "weight")
STEP = 1000.0  # where a law or a weight depends on `step`
SAMPLES = 2048
WINDOW = SAMPLES // 32
INNER = tuple((i + 0.5) / 48 for i in range(48))


@dataclass(frozen=True)
class Row:
    """One noise level: p(lambda), the weight of (pred - target)^2, and w(lambda)."""

    t: float
    alpha: float
    sigma: float
    snr: float
    logsnr: float
    density: float
    weight: float
    w: float


@dataclass(frozen=True)
class Curve:
    """Rows in the order of t. `kind` says how p(lambda) was found: "exact" (a monotone map of one
    draw), "steps" (an index: mass over the distance to the level before), "sampled" (counted)."""

    kind: str
    rows: tuple[Row, ...]
    terms: Mapping[str, Term]

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest lambda; infinite where the law reaches an end."""
        if self.kind == "exact":
            (draw,) = _moving(self.terms)
            low, high = sorted(_levels_of(self, draw, (0.0, 1.0)))
            return _open_end(low), _open_end(high)
        levels = [row.logsnr for row in self.rows]
        return min(levels), max(levels)


def _open_end(level: float) -> float:
    """A level beyond what doubles can tell from pure data or pure noise counts as infinite."""
    return level if abs(level) < 60 else math.copysign(math.inf, level)


def curve(terms: Mapping[str, Term], quantiles: Sequence[float] = INNER) -> Curve:
    """The curve of the terms named in NEEDED. Where it is exact, its rows are at `quantiles`."""
    moving = _moving(terms)
    if len(moving) == 1 and _monotone(terms["logsnr"], moving[0]):
        if moving[0]["law"] in ("integer", "choice"):
            return Curve("steps", _steps(terms, moving[0]), terms)
        try:
            return Curve("exact", _in_order(_exact(terms, moving[0], quantiles)), terms)
        except NoDerivative:
            pass  # a continuous draw that is cut into steps is counted like any other
    return Curve("sampled", _sampled(terms, moving), terms)


def _moving(terms: Mapping[str, Term]) -> list[Term]:
    return draws(*(terms[n] for n in NEEDED))


def _known(terms: Sequence[Term]) -> dict[Term, object]:
    return {t: STEP for t in walk(*terms) if t.op == "input" and t["name"] == "step"}


def _at(draw: Term, quantiles: Sequence[float]) -> list[dict[Term, object]]:
    known = _known([draw])
    args = [value(a, known) for a in draw.args]
    return [{**known, draw: quantile(draw, args, u)} for u in quantiles]


def _monotone(logsnr: Term, draw: Term) -> bool:
    """Whether lambda always falls or always rises with the draw."""
    if draw["law"] not in ("uniform", "normal", "integer", "choice"):
        return False
    grid = _indices(draw) if draw["law"] in ("integer", "choice") else _at(draw, QUANTILES)
    levels = [row[0] for row in values([logsnr], [{**_known([logsnr]), **k} for k in grid])]
    steps = [b - a for a, b in pairwise(levels)]
    return all(s < 0 for s in steps) or all(s > 0 for s in steps)


def _row(numbers: Sequence[float], density: float) -> Row:
    t, alpha, sigma, snr, logsnr, det, weight = numbers
    w = 2 * weight * (det / alpha) ** 2 * density if alpha else math.nan
    return Row(t, alpha, sigma, snr, logsnr, density, weight, w)


def _in_order(rows) -> tuple[Row, ...]:
    return tuple(sorted(rows, key=lambda row: row.t))


def _exact(terms: Mapping[str, Term], draw: Term, quantiles: Sequence[float]) -> tuple[Row, ...]:
    wanted = [terms[n] for n in NEEDED] + [derivative(terms["logsnr"], draw)]
    at = [{**_known(wanted), **known} for known in _at(draw, quantiles)]
    numbers = values(wanted, at)
    density = [_density(draw, known) / abs(row[-1]) for known, row in zip(at, numbers, strict=True)]
    return tuple(_row(n[:-1], p) for n, p in zip(numbers, density, strict=True))


def _density(draw: Term, known: dict[Term, object]) -> float:
    """The density of a uniform or normal draw where it stands."""
    first, second = (value(a, known) for a in draw.args)
    if draw["law"] == "uniform":
        return 1 / (second - first)
    z = (known[draw] - first) / second
    return math.exp(-z * z / 2) / (second * math.sqrt(2 * math.pi))


def _indices(draw: Term) -> list[dict[Term, object]]:
    """Every value of a discrete draw that has mass, as what is known."""
    known = _known([draw])
    return [{**known, draw: i} for i, mass in enumerate(_masses(draw, known)) if mass > 0]


def _masses(draw: Term, known: dict[Term, object]) -> list[float]:
    amount = value(draw.args[0], known)
    if draw["law"] == "integer":
        return [1 / int(amount)] * int(amount)
    return [mass / sum(amount) for mass in amount]


def _steps(terms: Mapping[str, Term], draw: Term) -> tuple[Row, ...]:
    wanted = [terms[n] for n in NEEDED]
    masses = [m for m in _masses(draw, _known([draw])) if m > 0]
    at = [{**_known(wanted), **known} for known in _indices(draw)]
    pairs = sorted(zip(values(wanted, at), masses, strict=True), key=lambda pair: pair[0][0])
    levels = [numbers[4] for numbers, _ in pairs]
    gaps = [abs(b - a) for a, b in pairwise(levels)]
    gaps = [gaps[0], *gaps]  # nothing stands before the first level
    return tuple(_row(n, mass / gap) for (n, mass), gap in zip(pairs, gaps, strict=True))


def _sampled(terms: Mapping[str, Term], moving: list[Term]) -> tuple[Row, ...]:
    """Levels counted over a fixed low-discrepancy sequence; weights are means over a window."""
    wanted = [terms[n] for n in NEEDED]
    numbers = values(wanted, [_sample(moving, wanted, i) for i in range(SAMPLES)])
    numbers.sort(key=lambda row: row[4])
    rows = []
    for i in range(WINDOW, SAMPLES - WINDOW, WINDOW // 2):
        near = numbers[i - WINDOW : i + WINDOW + 1]
        width = near[-1][4] - near[0][4]
        if width > 0:
            weight = sum(n[6] for n in near) / len(near)
            rows.append(_row([*numbers[i][:6], weight], 2 * WINDOW / SAMPLES / width))
    return _in_order(rows)


def _sample(moving: list[Term], wanted: list[Term], i: int) -> dict[Term, object]:
    """Point i of the additive recurrence with the generalised golden ratio of the dimension."""
    ratio = 2.0
    for _ in range(32):
        ratio = (1 + ratio) ** (1 / (len(moving) + 1))
    known = _known(wanted + moving)
    for k, draw in enumerate(moving, 1):
        u = (0.5 + (i + 1) * ratio**-k) % 1
        known[draw] = quantile(draw, [value(a, known) for a in draw.args], u)
    return known


# ---- two curves


@dataclass(frozen=True)
class Likeness:
    """`second = factor * first` up to a relative `spread` (0: everywhere the same multiple);
    `pairs` holds (lambda, first, second)."""

    factor: float
    spread: float
    pairs: tuple[tuple[float, float, float], ...]


def compare(first: Curve, second: Curve) -> Likeness | None:
    """How w(lambda) of two curves differ where both train; None where they share no level."""
    levels = [r.logsnr for r in (second if first.kind == "exact" else first).rows]
    pairs = [
        (level, a, b)
        for level, a, b in zip(
            levels, _values_at(first, levels), _values_at(second, levels), strict=True
        )
        if math.isfinite(a) and math.isfinite(b) and (a, b) != (0, 0)
    ]
    if not pairs:
        return None
    if any(a == 0 or b == 0 for _, a, b in pairs):
        return Likeness(math.nan, math.inf, tuple(pairs))
    ratios = sorted(b / a for _, a, b in pairs)
    middle = ratios[len(ratios) // 2]
    spread = max(ratios[-1] / middle, middle / ratios[0]) - 1
    return Likeness(middle, spread, tuple(pairs))


def _values_at(line: Curve, levels: list[float]) -> list[float]:
    """w at levels of lambda; nan where the curve has none."""
    if line.kind == "exact":
        return _solved(line, levels)
    known = sorted((r.logsnr, r.w) for r in line.rows if math.isfinite(r.logsnr) and r.w > 0)
    return [_between(known, level) for level in levels]


def _between(known: list[tuple[float, float]], level: float) -> float:
    """Log-linear interpolation."""
    i = bisect_left(known, (level, -math.inf))
    if i < len(known) and math.isclose(known[i][0], level, rel_tol=1e-12, abs_tol=1e-12):
        return known[i][1]
    if i == 0 or i == len(known):
        return math.nan
    (x0, y0), (x1, y1) = known[i - 1], known[i]
    share = (level - x0) / (x1 - x0)
    return math.exp((1 - share) * math.log(y0) + share * math.log(y1))


def _solved(line: Curve, levels: list[float]) -> list[float]:
    """w at levels, with the draw that gives each found by bisection of its quantile."""
    (draw,) = _moving(line.terms)
    start, end = _levels_of(line, draw, (0.0, 1.0))
    low, high = [0.0] * len(levels), [1.0] * len(levels)
    for _ in range(52):
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        for i, found in enumerate(_levels_of(line, draw, middle)):
            beyond = (found < levels[i]) == (end < start)
            low[i], high[i] = (low[i], middle[i]) if beyond else (middle[i], high[i])
    rows = _exact(line.terms, draw, [(a + b) / 2 for a, b in zip(low, high, strict=True)])
    return [r.w if _near(r, level) else math.nan for r, level in zip(rows, levels, strict=True)]


def _near(row: Row, level: float) -> bool:
    return math.isclose(row.logsnr, level, rel_tol=1e-7, abs_tol=1e-7)


def _levels_of(line: Curve, draw: Term, quantiles: Sequence[float]) -> list[float]:
    logsnr = line.terms["logsnr"]
    at = [{**_known([logsnr]), **known} for known in _at(draw, quantiles)]
    return [found for (found,) in values([logsnr], at)]
