"""Solvers: plain functions `(model, x, grid, draws) -> x` from noise to data.

`x` is [B, ...], a draw at `grid[0]`; `grid` [N + 1] decreases and ends at the clean data. Levels
are computed in the precision of the grid, and networks asked in that of x.
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
from difftrain.sampling.grids import bisected

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
    sigma = _levels(model, grid.to(like.device)[0], like)[1]
    return sigma.to(like.dtype) * draws.noise(0, like)


def ddim(model: Model, x: Tensor, grid: Tensor, draws: Draws, eta: float = 0.0) -> Tensor:
    """Data [B, ...] by `ddim_move` along the grid (arXiv:2010.02502 section 4.1).

    The last entry of the grid stands for alpha = 1, sigma = 0, whatever the process has there (an
    index process has nothing): the result is the last x0_hat.
    """
    grid = grid.to(x.device)
    for step, (t, s) in enumerate(pairwise(grid[:-1]), 1):
        noise = draws.noise(step, x) if eta else torch.zeros_like(x)
        estimates = model.estimates(x, _rows(t, x))
        x = ddim_move(estimates, _levels(model, t, x), _levels(model, s, x), noise, eta)
    return model.estimates(x, _rows(grid[-2], x))[0]


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


def ancestral(
    model: Model, x: Tensor, grid: Tensor, draws: Draws, variance: str = "small"
) -> Tensor:
    """Data [B, ...] by drawing x_s from q(x_s | x_t, x0_hat), the ancestor of x_t.

    arXiv:2006.11239 algorithm 2, its two variances written for any alpha and sigma: `small` is that
    of q itself, right where the data are one point (and `ddim` with eta = 1); `large` that for
    data of variance 1, beta_t where alpha^2 + sigma^2 = 1. The last step is to the last x0_hat.
    """
    grid = grid.to(x.device)
    for step, (t, s) in enumerate(pairwise(grid[:-1]), 1):
        (a_t, s_t), (a_s, s_s) = _levels(model, t, x), _levels(model, s, x)
        kept = a_t / a_s
        added = (s_t**2 - (kept * s_s) ** 2).clamp(min=0)  # the variance of q(x_t | x_s)
        share = (s_s / s_t) ** 2
        spread = share if variance == "small" else (a_s**2 + s_s**2) / (a_t**2 + s_t**2)
        mean = kept * share * x + a_s * added / s_t**2 * model.estimates(x, _rows(t, x))[0]
        x = (mean + (added * spread).sqrt() * draws.noise(step, x)).to(x.dtype)
    return model.estimates(x, _rows(grid[-2], x))[0]


def euler(model: Model, x: Tensor, grid: Tensor, draws: Draws) -> Tensor:
    """Data [B, ...] by x_s = x_t + (s - t) flow(x_t, t), for continuous processes; draws nothing.

    On alpha = 1, sigma = t it is the Euler method of arXiv:2206.00364 (algorithm 1 without its
    correction); on the linear process that of arXiv:2209.03003. First order in the step.
    """
    for t, s in pairwise(grid.to(x.device)):
        x = x + (s - t) * model.flow(x, _rows(t, x))
    return x


def heun(
    model: Model,
    x: Tensor,
    grid: Tensor,
    draws: Draws,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = 1e6,
    s_noise: float = 1.0,
) -> Tensor:
    """Data [B, ...] by the mean of the flows at both ends of each step.

    arXiv:2206.00364 algorithm 2 for every continuous process (algorithm 1, which draws nothing,
    where s_churn = 0): the second flow is that of (x_s, s), asked for anew, and the last step is an
    Euler step, as the flow may have no value at the clean end. Second order in the step without
    churn, 2 N - 1 evaluations.
    """
    churned = churn(model, grid, s_churn, s_min, s_max) if s_churn else grid[:-1]
    grid, churned = grid.to(x.device), churned.to(x.device)
    for step, (t, s) in enumerate(pairwise(grid), 1):
        noisier = churned[step - 1]
        if s_churn and step > 1:  # nothing is noisier than the start
            x = _noised(model, x, t, noisier, s_noise * draws.noise(step, x))
        slope = model.flow(x, _rows(noisier, x))
        ahead = x + (s - noisier) * slope
        if step < len(grid) - 1:
            ahead = x + (s - noisier) * (slope + model.flow(ahead, _rows(s, x))) / 2
        x = ahead
    return x


def churn(model: Model, grid: Tensor, s_churn: float, s_min: float, s_max: float) -> Tensor:
    """The times [N] that the steps begin at once noise is added: sigma / alpha is larger by a share
    of min(s_churn / N, sqrt(2) - 1) where it lies in s_min .. s_max (arXiv:2206.00364 algorithm 2).

    Nowhere above the start of the grid, which is as noisy as the network knows.
    """
    times = grid[:-1]
    noise = model.sigma(times) / model.alpha(times)
    within = (noise >= s_min) & (noise <= s_max)
    raised = (1 + min(s_churn / len(times), math.sqrt(2) - 1)) * noise
    return torch.where(within, bisected(model, raised, times, times[:1].expand_as(times)), times)


def _noised(model: Model, x: Tensor, t: Tensor, noisier: Tensor, noise: Tensor) -> Tensor:
    """x of the time t with as much noise as belongs to a noisier one: [B, ...]."""
    (a_t, s_t), (a, s) = _levels(model, t, x), _levels(model, noisier, x)
    kept = a / a_t
    return (kept * x + (s**2 - (kept * s_t) ** 2).clamp(min=0).sqrt() * noise).to(x.dtype)


def jump(model: Model, x: Tensor, grid: Tensor, draws: Draws) -> Tensor:
    """Data [B, ...] by x_r = x_t - (t - r) u(x_t, t, r), u being the average flow between them.

    For networks with two times (arXiv:2505.13447 eq. 12), which make one step as well as many.
    Draws nothing.
    """
    for t, r in pairwise(grid.to(x.device)):
        x = x - (t - r) * model.average(x, _rows(t, x), _rows(r, x))
    return x


def multistep(model: Model, x: Tensor, grid: Tensor, draws: Draws) -> Tensor:
    """Data [B, ...] by estimating x0 and noising it again, to ever earlier times.

    arXiv:2303.01469 algorithm 1, for networks whose `x0_hat` is the clean end of the path through
    (x, t): x_s = alpha_s x0_hat + sigma_s noise. A network trained with boundary factors of its
    own, c_skip x + c_out x0_hat, is read the same way: away from the clean end they are 0 and 1
    (arXiv:2310.04378: c_skip is below 7e-6 at every time that is trained).
    """
    grid = grid.to(x.device)
    for step, (t, s) in enumerate(pairwise(grid[:-1]), 1):
        alpha, sigma = _levels(model, s, x)
        x0_hat = model.estimates(x, _rows(t, x))[0]
        x = (alpha * x0_hat + sigma * draws.noise(step, x)).to(x.dtype)
    return model.estimates(x, _rows(grid[-2], x))[0]


def euler_maruyama(
    model: Model, x: Tensor, grid: Tensor, draws: Draws, scale: float = 1.0
) -> Tensor:
    """Data [B, ...] by the reverse stochastic equation, `scale` times as noisy as a usual one.

    dx = (flow - g^2 score / 2) dt + g dB has the same marginals for every g (arXiv:2011.13456
    appendix D.1). Here g^2 = 2 scale W sigma with W = alpha sigma' - sigma alpha': alpha times that
    of the forward process, so that it is finite where alpha is 0; the term of the score is then
    scale W eps_hat, which divides by nothing. The last step, and all with scale = 0, are Euler's.
    First order, in law.
    """
    grid = grid.to(x.device)
    for step, (t, s) in enumerate(pairwise(grid[:-1]), 1):
        x = _stochastic(model, x, t, s - t, scale, draws.noise(step, x))
    return euler(model, x, grid[-2:], draws)


def _stochastic(
    model: Model, x: Tensor, t: Tensor, h: Tensor, scale: float, noise: Tensor
) -> Tensor:
    """One step of length h < 0 from the time t: [B, ...]."""
    x0_hat, eps_hat = model.estimates(x, _rows(t, x))
    alpha, sigma = _levels(model, t, x)
    rise, fall = (column(slope, x) for slope in model.slopes(t.expand(len(x))))
    spread = scale * (alpha * fall - sigma * rise)
    drift = rise * x0_hat + (fall + spread) * eps_hat
    return (x + h * drift + (-2 * h * spread * sigma).sqrt() * noise).to(x.dtype)


def dpm_solver_pp(
    model: Model, x: Tensor, grid: Tensor, draws: Draws, scale: float = 0.0
) -> Tensor:
    """Data [B, ...] by the exact solution for an x0_hat that is linear in log(alpha / sigma).

    arXiv:2211.01095 algorithm 2 (DPM-Solver++(2M)), and with scale = 1 the stochastic form of its
    appendix (SDE-DPM-Solver++(2M)): g^2 is `scale` times that of the forward process. The line goes
    through this estimate and the one before. The first step knows one estimate, and the last goes
    to the last x0_hat. Second order where steps are even in that logarithm: with noise, in law.
    """
    grid = grid.to(x.device)
    lead, before = 0, None
    for step, (t, s) in enumerate(pairwise(grid[:-1]), 1):
        (a_t, s_t), (a_s, s_s) = _levels(model, t, x), _levels(model, s, x)
        x0_hat = model.estimates(x, _rows(t, x))[0]
        length = _log_ratio(a_s, s_s) - _log_ratio(a_t, s_t)
        fall = a_t * s_s / (s_t * a_s)  # exp(-length), 0 from pure noise
        if before:  # 1 / (2 r) of the paper; 0 after a step from pure noise, which has no end
            lead = length / (2 * before[1]) * (x0_hat - before[0])
        noise = draws.noise(step, x) if scale else torch.zeros_like(x)
        moved = s_s / s_t * fall**scale * x + a_s * (1 - fall ** (1 + scale)) * (x0_hat + lead)
        x = (moved + s_s * (1 - fall ** (2 * scale)).sqrt() * noise).to(x.dtype)
        before = x0_hat, length
    return model.estimates(x, _rows(grid[-2], x))[0]


def _log_ratio(alpha: Tensor, sigma: Tensor) -> Tensor:
    """log(alpha / sigma)."""
    return alpha.log() - sigma.log()


def _rows(time: Tensor, x: Tensor) -> Tensor:
    """A time of the grid for every row, as networks are told it: a real one in x's precision."""
    return time.expand(len(x)).to(x.dtype if time.is_floating_point() else time.dtype)


def _levels(model: Model, time: Tensor, x: Tensor) -> Pair:
    """alpha and sigma at a time of the grid, in its precision, shaped to multiply x."""
    t = time.expand(len(x))
    return column(model.alpha(t), x), column(model.sigma(t), x)


def column(values: Tensor, like: Tensor) -> Tensor:
    """values [B] as [B, 1, ...]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
