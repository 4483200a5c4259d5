"""Solvers: plain functions `(model, x, grid, draws) -> x` from noise to data.

`x` is [B, ...], a draw at `grid[0]`; `grid` [N + 1] decreases and ends at the clean data.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from difftrain.compiler import random
from difftrain.compiler.draws import Draws as Streams

Pair = tuple[Tensor, Tensor]


class Model(Protocol):
    """What sampling needs of a trained objective; guidance is already inside it.

    Estimates and flows answer in the precision of x; alpha and sigma may be finer.
    """

    def alpha(self, t: Tensor) -> Tensor:
        """The data coefficient of the process at t [B]: [B]."""

    def sigma(self, t: Tensor) -> Tensor:
        """The noise coefficient of the process at t [B]: [B]."""

    def slopes(self, t: Tensor) -> Pair:
        """The time derivatives of alpha and sigma at t [B]: both [B]."""

    def estimates(self, x: Tensor, t: Tensor) -> Pair:
        """`x0_hat` and `eps_hat` at x [B, ...], t [B]: both [B, ...]."""

    def flow(self, x: Tensor, t: Tensor) -> Tensor:
        """The ODE tangent `flow_hat` at x [B, ...], t [B]: [B, ...]."""

    def average(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The mean of the tangent from t [B] down to r [B], of a network that knows both."""


@dataclass(frozen=True)
class Draws:
    """Noise of a sampling run, keyed by (seed, sample, step): the batch split does not matter.

    `law(like, draws)` gives noise [B, ...] of another law than the standard normal one: that of
    the objective's `eps`.
    """

    seed: int
    index: Tensor  # int64 [B], the number of each sample
    law: Callable[[Tensor, Streams], Tensor] | None = None

    def noise(self, step: int, like: Tensor) -> Tensor:
        """Noise [B, ...] for the move to `grid[step]`; 0 is the start."""
        index = self.index.to(like.device)
        if self.law:
            return self.law(like, Streams(self.seed, step, index, like.dtype))
        return random.normal("sample", self.seed, step, index, like.shape[1:], like.dtype)


def start(model: Model, like: Tensor, grid: Tensor, draws: Draws) -> Tensor:
    """Pure noise at `grid[0]`, sigma eps: shape and dtype of `like` [B, ...]."""
    t = _beside(grid, like)[0].expand(len(like))
    return _column(model.sigma(t), like).to(like.dtype) * draws.noise(0, like)


def ddim(model: Model, x: Tensor, grid: Tensor, draws: Draws, eta: float = 0.0) -> Tensor:
    """Data [B, ...] by `ddim_move` along the grid (arXiv:2010.02502 section 4.1).

    The last entry of the grid stands for alpha = 1, sigma = 0, whatever the process has there (an
    index process has nothing): the result is the last x0_hat.
    """
    grid = _beside(grid, x)
    for step in range(1, len(grid) - 1):
        t, s = (time.expand(len(x)) for time in grid[step - 1 : step + 1])
        noise = draws.noise(step, x) if eta else torch.zeros_like(x)
        x = ddim_move(model.estimates(x, t), _levels(model, t, x), _levels(model, s, x), noise, eta)
    return model.estimates(x, grid[-2].expand(len(x)))[0]


def ddim_move(estimates: Pair, here: Pair, there: Pair, noise: Tensor, eta: float) -> Tensor:
    """One move from levels (a_t, s_t) to (a_s, s_s): [B, ...].

    x_s = a_s x0_hat + sqrt(s_s^2 - v) eps_hat + sqrt(v) noise (arXiv:2010.02502 eq. 12) with
    v = eta^2 (s_s / s_t)^2 (s_t^2 - s_s^2 a_t^2 / a_s^2): eq. 16 where a^2 + s^2 = 1, and right for
    every process. eta = 1 is the posterior of ancestral sampling, the smaller of its variances.
    """
    (x0_hat, eps_hat), (a_t, s_t), (a_s, s_s) = estimates, here, there
    v = eta**2 * (s_s / s_t) ** 2 * (s_t**2 - (s_s * a_t / a_s) ** 2).clamp(min=0)
    moved = a_s * x0_hat + (s_s**2 - v).clamp(min=0).sqrt() * eps_hat + v.sqrt() * noise
    return moved.to(x0_hat.dtype)


def euler(model: Model, x: Tensor, grid: Tensor, draws: Draws) -> Tensor:
    """Data [B, ...] by x_s = x_t + (s - t) flow(x_t, t), for continuous processes; draws nothing.

    On alpha = 1, sigma = t it is the Euler method of arXiv:2206.00364 (algorithm 1 without its
    correction); on the linear process that of arXiv:2209.03003. First order in the step.
    """
    for t, s in pairwise(_beside(grid, x)):
        x = x + (s - t) * model.flow(x, t.expand(len(x)))
    return x


def heun(model: Model, x: Tensor, grid: Tensor, draws: Draws) -> Tensor:
    """Data [B, ...] by the mean of the flows at both ends of each step; draws nothing.

    arXiv:2206.00364 algorithm 1 without churn, for every continuous process: the second flow is
    that of (x_s, s), asked for anew, and the last step is an Euler step, as the flow may have no
    value at the clean end. Second order in the step, 2 N - 1 evaluations.
    """
    grid = _beside(grid, x)
    for step in range(1, len(grid)):
        t, s = grid[step - 1 : step + 1]
        slope = model.flow(x, t.expand(len(x)))
        if step < len(grid) - 1:
            ahead = x + (s - t) * slope
            slope = (slope + model.flow(ahead, s.expand(len(x)))) / 2
        x = x + (s - t) * slope
    return x


def jump(model: Model, x: Tensor, grid: Tensor, draws: Draws) -> Tensor:
    """Data [B, ...] by x_r = x_t - (t - r) u(x_t, t, r), u being the average flow between them.

    For networks with two times (arXiv:2505.13447 eq. 12), which make one step as well as many.
    Draws nothing.
    """
    for t, r in pairwise(_beside(grid, x)):
        x = x - (t - r) * model.average(x, t.expand(len(x)), r.expand(len(x)))
    return x


def multistep(model: Model, x: Tensor, grid: Tensor, draws: Draws) -> Tensor:
    """Data [B, ...] by estimating x0 and noising it again, to ever earlier times.

    arXiv:2303.01469 algorithm 1, for networks whose `x0_hat` at any time lies on the path's clean
    end: x_s = alpha_s x0_hat + sigma_s noise. The function that latent consistency distillation
    trains, c_skip x + c_out x0_hat, differs from x0_hat by a factor of 7e-6 at most.
    """
    grid = _beside(grid, x)
    for step in range(1, len(grid) - 1):
        t, s = (time.expand(len(x)) for time in grid[step - 1 : step + 1])
        a, b = _levels(model, s, x)
        x = (a * model.estimates(x, t)[0] + b * draws.noise(step, x)).to(x.dtype)
    return model.estimates(x, grid[-2].expand(len(x)))[0]


def euler_maruyama(
    model: Model, x: Tensor, grid: Tensor, draws: Draws, scale: float = 1.0
) -> Tensor:
    """Data [B, ...] by the reverse stochastic equation, its noise `scale` times a standard one.

    Every g gives the same marginals (arXiv:2011.13456 appendix D.1, arXiv:2401.08740 eq. 6):
    dx = (flow - g^2 score / 2) dt + g dB. Here g^2 = 2 scale W sigma with W = alpha sigma' - sigma
    alpha': that of the forward process times alpha, which is finite where alpha is 0, and the term
    of the score becomes W scale eps_hat. scale = 0 is Euler's method. The last step draws nothing.
    """
    grid = _beside(grid, x)
    for step in range(1, len(grid) - 1):
        t, s = grid[step - 1 : step + 1]
        moved = _stochastic(model, x, t.expand(len(x)), s - t, scale, draws.noise(step, x))
        x = moved.to(x.dtype)
    return euler(model, x, grid[-2:], draws)


def _stochastic(
    model: Model, x: Tensor, t: Tensor, h: Tensor, scale: float, noise: Tensor
) -> Tensor:
    """One step of length h < 0 from t [B]: [B, ...]."""
    x0_hat, eps_hat = model.estimates(x, t)
    (a, s), (da, ds) = (
        [_column(c, x) for c in pair]
        for pair in ((model.alpha(t), model.sigma(t)), model.slopes(t))
    )
    spread = scale * (a * ds - s * da)
    drift = da * x0_hat + (ds + spread) * eps_hat
    return x + h * drift + (2 * spread * s * -h).sqrt() * noise


def dpm_solver_pp(model: Model, x: Tensor, grid: Tensor, draws: Draws) -> Tensor:
    """Data [B, ...] by the exact solution for an x0_hat that is linear in log(alpha / sigma).

    arXiv:2211.01095 algorithm 2 (DPM-Solver++(2M)): the line goes through this estimate and the
    one before. The last step is the last x0_hat, as in `ddim`, whose step the first one is. Second
    order in the step; draws nothing.
    """
    grid = _beside(grid, x)
    before = length = None
    for t, s in pairwise(grid[:-1]):
        here, there = (_levels(model, time.expand(len(x)), x) for time in (t, s))
        x0_hat = model.estimates(x, t.expand(len(x)))[0]
        h = _log_ratio(there) - _log_ratio(here)
        # 1 / (2 r) of the paper; 0 after a step from pure noise, which is infinitely long
        lead = 0 if before is None else (h / (2 * length)).to(x.dtype) * (x0_hat - before)
        (a_t, s_t), (a_s, s_s) = here, there
        moved = s_s / s_t * x + (a_s - s_s * a_t / s_t) * (x0_hat + lead)
        x, before, length = moved.to(x.dtype), x0_hat, h
    return model.estimates(x, grid[-2].expand(len(x)))[0]


def _log_ratio(levels: Pair) -> Tensor:
    """log(alpha / sigma)."""
    return levels[0].log() - levels[1].log()


def guided(
    evaluate: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]],
    cond: Tensor,
    null: Tensor,
    scale: float,
    interval: tuple[float, float] = (-math.inf, math.inf),
) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """`evaluate` under classifier-free guidance, as a function of (x, t): u + scale (c - u).

    `evaluate(x, t, cond)` gives quantities affine in the prediction ([B, ...] each, as x0_hat,
    eps_hat, flow_hat are); both conditions run as one batch of 2 B. scale = 1 is no guidance
    (arXiv:2205.11487 eq. 2), and so is a time outside `interval` (arXiv:2404.07724).
    """
    both = torch.cat([cond, null.expand_as(cond)])
    low, high = interval

    def at(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        values = evaluate(torch.cat([x, x]), torch.cat([t, t]), both)
        w = torch.where((t >= low) & (t <= high), scale, 1.0)
        return tuple(_mix(*value.chunk(2), w) for value in values)

    return at


def _mix(c: Tensor, u: Tensor, w: Tensor) -> Tensor:
    return u + _column(w, u).to(u.dtype) * (c - u)


def _beside(grid: Tensor, x: Tensor) -> Tensor:
    """The grid on x's device; real times in x's precision, indices as they are."""
    return grid.to(x.device, x.dtype if grid.is_floating_point() else grid.dtype)


def _levels(model: Model, t: Tensor, x: Tensor) -> Pair:
    """alpha and sigma at t [B], shaped to multiply x."""
    return _column(model.alpha(t), x), _column(model.sigma(t), x)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """values [B] as [B, 1, ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
