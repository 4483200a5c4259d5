"""A solver as a table: how each input of the network follows from what came before.

Solvers are linear in x, the estimates and the noise. Walked once on basis vectors, in float64, a
solver shows its coefficients; what is exported then needs no schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from difftrain.export.errors import ExportError
from difftrain.sampling.model import Levels, Sampler
from difftrain.sampling.solvers import Pair, start

DEEPEST = 3  # evaluations that a row may look back over, beside its own
EXACT = 1e-9  # of the size of what is solved for
ESTIMATES = ("x0_hat", "eps_hat")
Walk = Callable  # (model, x, grid, draws) -> x


@dataclass(frozen=True)
class Noise:
    """A draw by its number, and its weight: draw 0 is the start."""

    weight: float
    draw: int


@dataclass(frozen=True)
class Row:
    """One evaluation at t (and the earlier time r), and what follows from it:

    x' = x * x + sum of x0_hat[k] * x0_hat k evaluations ago + the same of eps_hat + noise.
    """

    t: float
    r: float
    x: float
    x0_hat: tuple[float, ...]
    eps_hat: tuple[float, ...]
    noise: Noise | None = None


@dataclass(frozen=True)
class Table:
    """The rows of all evaluations, behind a start of weighted noise. `kept` says how many earlier
    x0_hat and eps_hat the rows look back to; `whole` whether times are indices."""

    start: tuple[Noise, ...]
    rows: tuple[Row, ...]
    kept: tuple[int, int]
    whole: bool

    @property
    def draws(self) -> tuple[int, ...]:
        """The numbers of the draws behind the start, in order."""
        rows = [row.noise for row in self.rows if row.noise]
        return tuple(sorted({n.draw for n in (*self.start, *rows)} - {0}))

    @property
    def times(self) -> torch.dtype:
        """The type in which networks are told times."""
        return torch.int64 if self.whole else torch.float32

    def columns(self) -> tuple[str, ...]:
        """The names of the numbers in a row of `tensor`."""
        past = [f"{n} {k} ago" for n, c in zip(ESTIMATES, self.kept, strict=True) for k in _to(c)]
        return ("x", *ESTIMATES, *past, "noise")

    def tensor(self) -> Tensor:
        """The weights of all rows, fp32 [N, 4 + kept]: x, this x0_hat and eps_hat, the kept ones,
        noise."""
        return torch.tensor([self.weights(row) for row in self.rows], dtype=torch.float32)

    def weights(self, row: Row) -> list[float]:
        """The weights of one row."""
        pairs = list(zip((row.x0_hat, row.eps_hat), self.kept, strict=True))
        past = [w for own, count in pairs for w in _filled(own[1:], count)]
        now = [_filled(own, 1)[0] for own, _ in pairs]
        return [row.x, *now, *past, row.noise.weight if row.noise else 0.0]


def _to(count: int) -> range:
    return range(1, count + 1)


def _filled(weights: tuple[float, ...], count: int) -> list[float]:
    return [*weights, *(0.0,) * count][:count]


def replay(
    table: Table, ask: Callable[[Tensor, Row], Pair], noise: Callable[[int], Tensor]
) -> Tensor:
    """What a table makes of `noise(draw)` [B, ...] and the estimates that `ask(x, row)` gives, in
    their precision."""
    x = sum(n.weight * noise(n.draw) for n in table.start)
    seen: list[Pair] = []
    for row in table.rows:
        seen.insert(0, ask(x, row))
        x = row.x * x + _mixed(row, seen)
        x = x + row.noise.weight * noise(row.noise.draw) if row.noise else x
    return x


def _mixed(row: Row, seen: list[Pair]) -> Tensor:
    """The estimates, this one first, by the weights of a row."""
    terms = [w * seen[k][0] for k, w in enumerate(row.x0_hat)]
    terms += [w * seen[k][1] for k, w in enumerate(row.eps_hat)]
    return sum(terms)


# ---- walking on basis vectors


def table(walk: Walk, levels: Levels, grid: Tensor, name: str, guess: bool = False) -> Table:
    """The table of a solver on a grid, levels in float64. `guess`: the network is shown its
    estimate before. Raises ExportError for a solver that is not linear or looks back too far."""
    counted = _Basis(1)
    counted.walked(walk, levels, grid)
    basis = _Basis(counted.used)
    end = basis.walked(walk, levels, grid)
    following = [*basis.inputs[1:], end]
    rows = tuple(_row(basis, i, x, name) for i, x in enumerate(following))
    deep = max(len(row.x0_hat) for row in rows), max(len(row.eps_hat) for row in rows)
    kept = max(deep[0] - 1, int(guess)), max(deep[1] - 1, 0)
    first = (Noise(float(basis.inputs[0][k]), draw) for draw, k in basis.noises.items())
    found = Table(tuple(n for n in first if n.weight), rows, kept, not grid.is_floating_point())
    _check(found, walk, levels, grid, name)
    return found


@dataclass
class _Basis:
    """A model and its draws whose every answer is a basis vector [1, width] of its own."""

    width: int
    inputs: list[Tensor] = field(default_factory=list)  # of the network
    times: list[tuple[float, float]] = field(default_factory=list)
    estimates: list[tuple[int, int]] = field(default_factory=list)  # places of x0_hat and eps_hat
    noises: dict[int, int] = field(default_factory=dict)  # draw: place
    used: int = 0

    def walked(self, walk: Walk, levels: Levels, grid: Tensor) -> Tensor:
        """What the solver ends with, [width]."""
        model = _asking(levels, self._estimate, 1)
        like = torch.zeros(1, self.width, dtype=torch.float64)
        return walk(model, start(model, like, grid, self), grid, self)[0]

    def noise(self, step: int, like: Tensor) -> Tensor:
        if step not in self.noises:
            self.noises[step] = self._place()
        return self._unit(self.noises[step])

    def _estimate(self, inputs: Mapping[str, Tensor], *_) -> dict[str, Tensor]:
        self.inputs.append(inputs["xt"][0])
        self.times.append((inputs["t"].item(), inputs["r"].item()))
        self.estimates.append((self._place(), self._place()))
        return dict(zip(ESTIMATES, map(self._unit, self.estimates[-1]), strict=True))

    def _place(self) -> int:
        self.used += 1
        return self.used - 1

    def _unit(self, place: int) -> Tensor:
        unit = torch.zeros(1, self.width, dtype=torch.float64)
        unit[0, place % self.width] = 1
        return unit


def _asking(levels: Levels, estimate: Callable, count: int) -> Sampler:
    """A model that estimates by a function of the inputs of the network."""
    return Sampler(levels.level, levels.tables, estimate, {}, {}, torch.arange(count))


# ---- the recurrence


def _row(basis: _Basis, i: int, after: Tensor, name: str) -> Row:
    """The row of evaluation i, which looks back as little as it can. Raises ExportError."""
    for depth in range(min(i, DEEPEST) + 1):
        row = _solved(basis, i, after, depth)
        if row is not None:
            return row
    raise _other(name)


def _other(name: str) -> ExportError:
    return ExportError(
        f"the solver `{name}` is not linear in x, the estimates and the noise, or looks back over"
        f" more than {DEEPEST} evaluations: export with another solver"
    )


def _solved(basis: _Basis, i: int, after: Tensor, depth: int) -> Row | None:
    """x' = a x + estimates + noise, if that is exact."""
    x, seen = basis.inputs[i], basis.estimates[i - depth : i + 1][::-1]
    before = torch.stack(basis.inputs[: i + 1]).abs().amax(0)
    fresh = {d: k for d, k in basis.noises.items() if not before[k] and after[k]}
    if len(fresh) > 1:
        return None
    outside = torch.ones_like(x)
    outside[[k for pair in seen for k in pair] + list(fresh.values())] = 0
    scale = _ratio(after * outside, x * outside)
    rest = after - scale * x
    if (rest * outside).norm() > EXACT * after.norm():
        return None
    noise = next((Noise(float(rest[k]), d) for d, k in fresh.items()), None)
    own = (_cut(rest[[pair[n] for pair in seen]], after) for n in (0, 1))
    return Row(*basis.times[i], scale, *own, noise)


def _ratio(after: Tensor, x: Tensor) -> float:
    """a with after = a x, by least squares; 0 where either is nothing."""
    size = x.square().sum()
    return float((after * x).sum() / size) if size > 0 and after.any() else 0.0


def _cut(weights: Tensor, like: Tensor) -> tuple[float, ...]:
    """The weights without what is rounding, and without zeros behind the last one."""
    least = EXACT * 1e-3 * like.abs().max()
    values = [0.0 if abs(w) <= least else w for w in weights.tolist()]
    while values and not values[-1]:
        values.pop()
    return tuple(values)


# ---- proof


def _check(found: Table, walk: Walk, levels: Levels, grid: Tensor, name: str) -> None:
    """Walks the solver and the table side by side where estimates are anything. Raises
    ExportError."""
    made = torch.Generator().manual_seed(0)
    drawn = {d: torch.randn(2, 8, generator=made, dtype=torch.float64) for d in (0, *found.draws)}

    class Draws:
        def noise(self, step: int, like: Tensor) -> Tensor:
            return drawn.get(step, torch.ones_like(like))

    def estimate(inputs: Mapping[str, Tensor], *_) -> dict[str, Tensor]:
        x0_hat, eps_hat = _odd(inputs["xt"], inputs["t"], inputs["r"])
        return {"x0_hat": x0_hat, "eps_hat": eps_hat}

    def ask(x: Tensor, row: Row) -> Pair:
        return _odd(x, *(torch.full((2,), v, dtype=torch.float64) for v in (row.t, row.r)))

    model = _asking(levels, estimate, 2)
    theirs = walk(model, start(model, drawn[0], grid, Draws()), grid, Draws())
    ours = replay(found, ask, drawn.__getitem__)
    if not torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6):
        raise _other(name)


def _odd(x: Tensor, t: Tensor, r: Tensor) -> Pair:
    """Estimates [B, n] that are linear in nothing, larger than data, and steady for large x."""
    x, t, r = torch.atan(x), torch.atan(t.double())[:, None], torch.atan(r.double())[:, None]
    return 3 * torch.sin(x + t), 2 * torch.cos(x / 2 + r)
