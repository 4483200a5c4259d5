"""Closed forms, written down independently of the library: paths, rows, weights, optima.

Data are Gaussian or a mixture of Gaussians, element by element, so that the optimal prediction
E[target | xt], the score and the smallest loss are known at every time. All in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Levels = tuple[Tensor, Tensor]


# ---- paths: alpha, sigma, their slopes, the law of t


@dataclass(frozen=True)
class Path:
    """A process as text and as numbers. `slopes` and `density` are None for a table."""

    text: str
    levels: Callable[[Tensor], Levels]
    times: tuple
    slopes: Callable[[Tensor], Levels] | None = None
    density: Callable[[Tensor], Tensor] | None = None

    def t(self) -> Tensor:
        return torch.tensor(self.times, dtype=torch.float64 if self.slopes else torch.int64)

    def logsnr(self, t: Tensor) -> Tensor:
        alpha, sigma = self.levels(t)
        return 2 * torch.log(alpha / sigma)

    def in_logsnr(self, t: Tensor, step: float = 1e-6) -> Tensor:
        """p(lambda) = p(t) / |dlambda/dt|, the slope by differences."""
        width = step * t
        rise = (self.logsnr(t + width) - self.logsnr(t - width)) / (2 * width)
        return self.density(t) / rise.abs()


def _table(index: Tensor) -> Levels:
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - beta, 0)[index.long()]
    return kept.sqrt(), (1 - kept).sqrt()


def _area(t: Tensor) -> Levels:
    """The integral of beta(t) = 0.1 + 19.9 t, and beta."""
    return 0.1 * t + 19.9 * t**2 / 2, 0.1 + 19.9 * t


def _vp(t: Tensor) -> Levels:
    area, _ = _area(t)
    return torch.exp(-area / 2), torch.sqrt(-torch.expm1(-area))


def _vp_slopes(t: Tensor) -> Levels:
    (alpha, sigma), (_, beta) = _vp(t), _area(t)
    return -beta * alpha / 2, beta * alpha**2 / (2 * sigma)


def _subvp(t: Tensor) -> Levels:
    area, _ = _area(t)
    return torch.exp(-area / 2), -torch.expm1(-area)


def _subvp_slopes(t: Tensor) -> Levels:
    (alpha, _), (_, beta) = _subvp(t), _area(t)
    return -beta * alpha / 2, beta * alpha**2


def _flat(low: float, high: float) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.full_like(t, 1 / (high - low))


def _normal(z: Tensor) -> Tensor:
    return torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def _log_normal(ratio: Tensor, mean: float, std: float) -> Tensor:
    return _normal((ratio.log() - mean) / std) / (std * ratio)


def _one(t: Tensor) -> Tensor:
    return torch.ones_like(t)


HALF_TURN = math.pi / 2
PATHS = {
    "ddpm": Path("ddpm(beta = scaled_linear, steps = 1000)", _table, (10, 400, 900)),
    "linear": Path(
        "linear",
        lambda t: (1 - t, t),
        (0.1, 0.5, 0.9),
        lambda t: (-_one(t), _one(t)),
        _flat(0, 1),
    ),
    "gvp": Path(
        "gvp",
        lambda t: (torch.cos(HALF_TURN * t), torch.sin(HALF_TURN * t)),
        (0.1, 0.5, 0.9),
        lambda t: (
            -HALF_TURN * torch.sin(HALF_TURN * t),
            HALF_TURN * torch.cos(HALF_TURN * t),
        ),
        _flat(0, 1),
    ),
    "vp": Path("vp", _vp, (0.1, 0.4, 0.7), _vp_slopes, _flat(1e-5, 1)),
    "subvp": Path("subvp", _subvp, (0.2, 0.4, 0.7), _subvp_slopes, _flat(1e-5, 1)),
    "ve": Path(
        "ve",
        lambda t: (_one(t), 0.01 * 5000**t),
        (0.3, 0.5, 0.7),
        lambda t: (torch.zeros_like(t), math.log(5000) * 0.01 * 5000**t),
        _flat(1e-5, 1),
    ),
    "edm": Path(
        "edm",
        lambda t: (_one(t), t),
        (0.15, 0.5, 3.0),
        lambda t: (torch.zeros_like(t), _one(t)),
        lambda t: _log_normal(t, -1.2, 1.2),
    ),
    "trig": Path(
        "trig(data = 0.5)",
        lambda t: (t.cos(), 0.5 * t.sin()),
        (0.3, 0.8, 1.4),
        lambda t: (-t.sin(), 0.5 * t.cos()),
        lambda t: _log_normal(0.5 * t.tan(), -1, 1.4) * 0.5 / t.cos() ** 2,
    ),
}


# ---- rows: target = a x0 + b eps


def row(prediction: str, path: Path, t: Tensor) -> Levels:
    """(a, b) of a prediction type at t."""
    alpha, sigma = path.levels(t)
    zero, one = torch.zeros_like(sigma), torch.ones_like(sigma)
    match prediction:
        case "epsilon":
            return zero, one
        case "sample":
            return one, zero
        case "v_prediction":
            return -sigma, alpha
        case "flow":
            return path.slopes(t)
        case "score":
            return zero, -1 / sigma
    raise KeyError(prediction)


PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow", "score")
CIRCLES = ("ddpm", "gvp", "vp")  # alpha^2 + sigma^2 = 1


def legal(process: str, prediction: str) -> bool:
    """Whether the pair has a meaning at every time of its law."""
    match prediction:
        case "v_prediction":
            return process in CIRCLES
        case "flow":
            return process != "ddpm"  # a table has no slope
    return True


# ---- weights: of (eps_hat - eps)^2, as functions of the snr

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "min_snr(5)": lambda snr: snr.clamp(max=5) / snr,
    "soft_min_snr(5)": lambda snr: 5 / (snr + 5),
    "p2(k = 1, g = 1)": lambda snr: 1 / (1 + snr),
    "debiased": lambda snr: snr**-0.5,
    "truncated_snr": lambda snr: snr.clamp(min=1) / snr,
}
WRAPPED = "edm_precondition(0.5)"


@dataclass(frozen=True)
class Level:
    """Everything about one triple of process, prediction type and weight at times t [T]."""

    process: str
    prediction: str
    weighted: str
    t: Tensor

    @property
    def path(self) -> Path:
        return PATHS[self.process]

    @property
    def levels(self) -> Levels:
        return self.path.levels(self.t)

    @property
    def row(self) -> Levels:
        return row(self.prediction, self.path, self.t)

    @property
    def det(self) -> Tensor:
        (alpha, sigma), (a, b) = self.levels, self.row
        return alpha * b - sigma * a

    @property
    def wrapping(self) -> tuple[Tensor, Tensor, Tensor]:
        """c_in, c_out, c_skip."""
        alpha, sigma = self.levels
        if self.weighted != WRAPPED:
            return torch.ones_like(sigma), torch.ones_like(sigma), torch.zeros_like(sigma)
        size = sigma**2 + (0.5 * alpha) ** 2
        return size**-0.5, 0.5 * sigma * size**-0.5, 0.25 * alpha / size

    @property
    def weight(self) -> Tensor:
        """Of (pred - target)^2."""
        alpha, sigma = self.levels
        if self.weighted == WRAPPED:
            return 1 / self.wrapping[1] ** 2
        if not self.weighted:
            return torch.ones_like(sigma)
        return WEIGHTS[self.weighted]((alpha / sigma) ** 2) * (alpha / self.det) ** 2


# ---- data


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians with these shares, means and one standard deviation."""

    shares: tuple[float, ...]
    means: tuple[float, ...]
    std: float

    def _parts(self) -> tuple[Tensor, Tensor]:
        return tuple(torch.tensor(v, dtype=torch.float64) for v in (self.shares, self.means))

    def log_density(self, x: Tensor, levels: Levels) -> Tensor:
        """log p(xt), element by element; levels broadcast against x."""
        return torch.logsumexp(self._joint(x, levels), 0)

    def _joint(self, x: Tensor, levels: Levels) -> Tensor:
        """log of share and density of each component, [K, ...]."""
        alpha, sigma = levels
        variance = (alpha * self.std) ** 2 + sigma**2
        parts = [
            math.log(share)
            - (x - alpha * mean) ** 2 / (2 * variance)
            - torch.log(2 * math.pi * variance) / 2
            for share, mean in zip(self.shares, self.means, strict=True)
        ]
        return torch.stack([part.expand_as(x) for part in parts])

    def clean(self, x: Tensor, levels: Levels) -> Tensor:
        """E[x0 | xt = x]."""
        alpha, sigma = levels
        pull = alpha * self.std**2 / ((alpha * self.std) ** 2 + sigma**2)
        means = torch.stack([mean + pull * (x - alpha * mean) for mean in self.means])
        return (torch.softmax(self._joint(x, levels), 0) * means).sum(0)

    def score(self, x: Tensor, levels: Levels) -> Tensor:
        """The gradient of log p(xt), by differentiation."""
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.log_density(x, levels).sum(), x)[0]

    def nodes(self, count: int) -> tuple[Tensor, Tensor]:
        """Points of x0 and their weights: Gauss-Hermite of each component, [K * count]."""
        points, weights = hermite(count)
        shares, means = self._parts()
        return (means[:, None] + self.std * points).flatten(), (shares[:, None] * weights).flatten()

    def remaining(self, levels: Levels, count: int) -> Tensor:
        """E Var[x0 | xt] at levels [T], by quadrature over xt alone."""
        alpha, sigma = (level[:, None, None] for level in levels)
        points, weights = hermite(count)
        shares, means = self._parts()
        x = alpha * means[:, None] + ((alpha * self.std) ** 2 + sigma**2).sqrt() * points
        square = (shares[:, None] * weights * self.clean(x, (alpha, sigma)) ** 2).sum((1, 2))
        return (shares * (means**2 + self.std**2)).sum() - square


def hermite(count: int) -> tuple[Tensor, Tensor]:
    """Points and weights of the standard normal law; two points are exact to the third degree."""
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(points), torch.from_numpy(weights / weights.sum())


GAUSSIAN = Mixture((1.0,), (0.3,), 0.5)
MIXTURE = Mixture((0.4, 0.6), (-0.7, 0.5), 0.4)


@dataclass(frozen=True)
class Nodes:
    """Every pair of x0 and eps of a quadrature at every time: rows [T * N] of shape [T * N, 1, 1],
    with their weights and the place of their time."""

    x0: Tensor
    eps: Tensor
    weight: Tensor
    place: Tensor

    @classmethod
    def of(cls, data: Mixture, times: int, count: int) -> "Nodes":
        (x0, clean), (eps, noise) = data.nodes(count), hermite(count)
        pairs = torch.cartesian_prod(torch.arange(len(x0)), torch.arange(len(eps)))
        rows = pairs.repeat(times, 1)
        place = torch.arange(times).repeat_interleave(len(pairs))
        weight = clean[rows[:, 0]] * noise[rows[:, 1]]
        return cls(x0[rows[:, 0], None, None], eps[rows[:, 1], None, None], weight, place)

    def mean(self, values: Tensor) -> Tensor:
        """The expectation of values [T * N] at each time, [T]."""
        times = int(self.place.max()) + 1
        return torch.zeros(times, dtype=values.dtype).index_add(0, self.place, self.weight * values)
