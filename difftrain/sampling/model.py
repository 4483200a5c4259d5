"""A trained objective as solvers see it: levels, and guided estimates at (xt, t)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from difftrain.compiler.draws import Draws
from difftrain.sampling.solvers import guided


@dataclass(frozen=True, eq=False)
class Sampler:
    """Implements `solvers.Model` on emitted programs. Conditions are [B, T, D], or None."""

    estimate: Callable  # compute(inputs, draw, nets, tables) of estimates.py
    level: Callable  # the same of levels.py
    nets: Mapping[str, Callable]
    tables: Mapping[str, Mapping[str, Tensor]]
    cond: Tensor | None
    null: Tensor | None
    guidance: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """The share of data at t [B]."""
        return self._level("alpha", t)

    def sigma(self, t: Tensor) -> Tensor:
        """The share of noise at t [B]."""
        return self._level("sigma", t)

    def estimates(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x0_hat, eps_hat) at x [B, ...] and t [B], guided."""
        if self.guidance == 1 or self.cond is None:
            return self._both(x, t, self.cond)
        return guided(self._both, self.cond, self.null, self.guidance)(x, t)

    def flow(self, x: Tensor, t: Tensor) -> Tensor:
        """The ODE tangent at (x, t): alpha' * x0_hat + sigma' * eps_hat."""
        x0_hat, eps_hat = self.estimates(x, t)
        moving = t.detach().clone().requires_grad_()
        with torch.enable_grad():
            slopes = [
                torch.autograd.grad(self._level(name, moving).sum(), moving)[0]
                for name in ("alpha", "sigma")
            ]
        rise, fall = (s.reshape(-1, *(1,) * (x.dim() - 1)) for s in slopes)
        return rise * x0_hat + fall * eps_hat

    def _both(self, x: Tensor, t: Tensor, cond) -> tuple[Tensor, Tensor]:
        inputs = {"xt": x, "t": t, "cond": cond, "null": None, "step": torch.zeros(())}
        values = self.estimate(inputs, self._draws(t), self.nets, self.tables["estimates"])
        return values["x0_hat"], values["eps_hat"]

    def _level(self, name: str, t: Tensor) -> Tensor:
        inputs = {"t": t, "step": torch.zeros(())}
        value = self.level(inputs, self._draws(t), {}, self.tables["levels"])[name]
        return (
            value if isinstance(value, Tensor) else torch.full_like(t, value, dtype=torch.float32)
        )

    def _draws(self, t: Tensor) -> Draws:
        return Draws(0, 0, torch.arange(len(t), device=t.device))
