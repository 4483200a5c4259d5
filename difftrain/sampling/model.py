"""A trained objective as solvers see it: levels, and guided estimates at (xt, t)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from difftrain.compiler.draws import Draws
from difftrain.sampling.solvers import Pair, column

Tables = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Levels:
    """alpha and sigma of an objective at times [B], by its emitted levels.py."""

    level: Callable  # compute(inputs, draw, nets, tables)
    tables: Tables

    def alpha(self, t: Tensor) -> Tensor:
        """The share of data at t [B], in t's precision."""
        return self._level("alpha", t)

    def sigma(self, t: Tensor) -> Tensor:
        """The share of noise at t [B], in t's precision."""
        return self._level("sigma", t)

    def slopes(self, t: Tensor) -> Pair:
        """The time derivatives of both at t [B]."""
        t = t.contiguous()  # one expanded number cannot carry a derivative for each sample
        ones = torch.ones_like(t)
        return torch.func.jvp(lambda t: (self.alpha(t), self.sigma(t)), (t,), (ones,))[1]

    def _level(self, name: str, t: Tensor) -> Tensor:
        inputs = {"t": t, "time": t, "step": torch.zeros(())}
        draws = _draws(torch.arange(t.shape[0], device=t.device))
        value = self.level(inputs, draws, {}, self.tables)
        level = value[name]
        return level if isinstance(level, Tensor) else torch.full_like(t, level, dtype=_real(t))


@dataclass(frozen=True, eq=False)
class Sampler(Levels):
    """Implements `solvers.Model` for the samples of `index` [B], on emitted programs.

    Conditions are [B, ...], the empty one [1, ...]; None where there are none. A guidance w makes
    u + w (c - u) of the estimate c and a weaker one u (arXiv:2205.11487 eq. 2, where 1 is none):
    that of the `guide` (arXiv:2406.02507), or the network's own under the empty condition.
    """

    estimate: Callable  # compute of estimates.py
    estimate_tables: Tables
    nets: Mapping[str, Callable]
    index: Tensor
    cond: Tensor | None = None
    null: Tensor | None = None
    guidance: float = 1.0
    given: Mapping[str, float] = field(default_factory=dict)  # further inputs of the network
    last: dict[str, Tensor] = field(default_factory=dict)  # the estimate of the evaluation before
    interval: tuple[float, ...] = ()  # of sigma / alpha, where guidance is on; empty: everywhere
    rescale: float = 0.0  # how far guided predictions get the deviation of those before
    guide: Sampler | None = None  # a weaker model of the same samples

    def estimates(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Pair:
        """(x0_hat, eps_hat) at x [B, ...] and t [B], guided; of the way from t down to r [B], where
        the network is told both."""
        return self._guided(x, t, t if r is None else r)

    def flow(self, x: Tensor, t: Tensor) -> Tensor:
        """The ODE tangent at x [B, ...] and t [B]: alpha' x0_hat + sigma' eps_hat."""
        return self.average(x, t, t)

    def average(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The mean of the tangent from t [B] down to r [B], where the network is told both."""
        x0_hat, eps_hat = self.estimates(x, t, r)
        rise, fall = (column(slope, x) for slope in self.slopes(t))
        return rise * x0_hat + fall * eps_hat

    def _guided(self, x: Tensor, t: Tensor, r: Tensor) -> Pair:
        plain = self.guidance == 1 or (self.guide is None and self.cond is None)
        found = self._both(x, t, r, self.cond) if plain else self._pushed(x, t, r)
        self.last["guess"] = found[0]
        return found

    def _pushed(self, x: Tensor, t: Tensor, r: Tensor) -> Pair:
        """The estimates, away from the weaker ones: each network is asked once."""
        strong, weak = self._twice(x, t, r) if self.guide is None else self._beside(x, t, r)
        w = column(self._strength(t), x).to(x.dtype)
        mixed = tuple(u + w * (c - u) for c, u in zip(strong, weak, strict=True))
        return self._rescaled(strong, mixed, t) if self.rescale else mixed

    def _twice(self, x: Tensor, t: Tensor, r: Tensor) -> tuple[Pair, Pair]:
        """The estimates with the condition and with the empty one, as one batch of 2 B."""
        both = torch.cat([self.cond, self.null.expand_as(self.cond)])
        values = self._both(torch.cat([x, x]), torch.cat([t, t]), torch.cat([r, r]), both)
        return tuple(zip(*((v[: x.shape[0]], v[x.shape[0] :]) for v in values), strict=True))

    def _beside(self, x: Tensor, t: Tensor, r: Tensor) -> tuple[Pair, Pair]:
        """The estimates, and those of the guide at the same place."""
        return self._both(x, t, r, self.cond), self.guide.estimates(x, t, r)

    def _strength(self, t: Tensor) -> Tensor:
        """The guidance at t [B], 1 outside low < sigma / alpha <= high (arXiv:2404.07724): [B]."""
        scale = torch.full_like(t, self.guidance, dtype=_real(t))
        if not self.interval:
            return scale
        (low, high), alpha, sigma = self.interval, self.alpha(t), self.sigma(t)
        return torch.where((sigma > low * alpha) & (sigma <= high * alpha), scale, 1.0)

    def _rescaled(self, strong: Pair, mixed: Pair, t: Tensor) -> Pair:
        """Guided estimates whose prediction row_a x0_hat + row_b eps_hat has, for a share `rescale`
        of it, the deviation of the prediction before (arXiv:2305.08891 eq. 15-16)."""
        names = ("alpha", "sigma", "row_a", "row_b")
        alpha, sigma, a, b = (column(self._level(n, t), mixed[0]) for n in names)
        before, after = ((a * x0 + b * eps).to(x0.dtype) for x0, eps in (strong, mixed))
        deviations = (column(p.flatten(1).std(dim=1), p) for p in (before, after))
        added = self.rescale * (torch.div(*deviations) - 1) * after / (alpha * b - sigma * a)
        (x0_hat, eps_hat), kind = mixed, mixed[0].dtype
        return (x0_hat - sigma * added).to(kind), (eps_hat + alpha * added).to(kind)

    def _both(self, x: Tensor, t: Tensor, r: Tensor, cond: Tensor | None) -> Pair:
        inputs = {"xt": x, "t": t, "time": t, "r": r, "cond": cond, "null": None}
        inputs |= {n: torch.full_like(t, v, dtype=_real(t)) for n, v in self.given.items()}
        guess = self.last.get("guess", torch.zeros_like(x[: self.index.shape[0]]))
        inputs["guess"] = guess.repeat(x.shape[0] // guess.shape[0], *(1,) * (x.dim() - 1))
        inputs["step"] = torch.zeros(())
        draws = _draws(self.index.repeat(t.shape[0] // self.index.shape[0]))
        values = self.estimate(inputs, draws, self.nets, self.estimate_tables)
        return values["x0_hat"], values["eps_hat"]


def _real(t: Tensor) -> torch.dtype:
    """The type of numbers that go with times, which may be indices."""
    return t.dtype if t.is_floating_point() else torch.float32


def _draws(index: Tensor) -> Draws:
    """What an objective still draws beside xt and t, by sample."""
    return Draws(0, 0, index)
