"""A trained objective as solvers see it: levels, and guided estimates at (xt, t)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from difftrain.compiler.draws import Draws
from difftrain.sampling.solvers import Pair, guided

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
        value = self.level(inputs, _draws(torch.arange(len(t), device=t.device)), {}, self.tables)
        level = value[name]
        return level if isinstance(level, Tensor) else torch.full_like(t, level, dtype=_real(t))


@dataclass(frozen=True, eq=False)
class Sampler(Levels):
    """Implements `solvers.Model` for the samples of `index` [B], on emitted programs.

    Conditions are [B, ...], the empty one [1, ...]; None where there are none.
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
        rise, fall = (c.reshape(-1, *(1,) * (x.dim() - 1)) for c in self.slopes(t))
        return rise * x0_hat + fall * eps_hat

    def _guided(self, x: Tensor, t: Tensor, r: Tensor) -> Pair:
        def at(x: Tensor, t: Tensor, cond: Tensor | None) -> Pair:
            return self._both(x, t, r.repeat(len(t) // len(r)), cond)

        plain = self.guidance == 1 or self.cond is None
        ask = guided(at, self.cond, self.null, self.guidance) if not plain else None
        found = at(x, t, self.cond) if plain else ask(x, t)
        self.last["guess"] = found[0]
        return found

    def _both(self, x: Tensor, t: Tensor, r: Tensor, cond: Tensor | None) -> Pair:
        inputs = {"xt": x, "t": t, "time": t, "r": r, "cond": cond, "null": None}
        inputs |= {n: torch.full_like(t, v, dtype=_real(t)) for n, v in self.given.items()}
        guess = self.last.get("guess", torch.zeros_like(x[: len(self.index)]))
        inputs["guess"] = guess.repeat(len(x) // len(guess), *(1,) * (x.dim() - 1))
        inputs["step"] = torch.zeros(())
        draws = _draws(self.index.repeat(len(t) // len(self.index)))
        values = self.estimate(inputs, draws, self.nets, self.estimate_tables)
        return values["x0_hat"], values["eps_hat"]


def _real(t: Tensor) -> torch.dtype:
    """The type of numbers that go with times, which may be indices."""
    return t.dtype if t.is_floating_point() else torch.float32


def _draws(index: Tensor) -> Draws:
    """What an objective still draws beside xt and t, by sample."""
    return Draws(0, 0, index)
