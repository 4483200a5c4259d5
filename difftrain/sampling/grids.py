"""Time grids: decreasing from noise to data, the last entry is the clean end.

A process of `count` indices has times 0 .. count - 1, of which 0 is already noisy: its clean end
is written -1. `steps` network evaluations need `steps + 1` entries.
"""

import torch
from torch import Tensor


def trailing(steps: int, count: int) -> Tensor:
    """Indices counted down from the last one: int64 [steps + 1], round(count - i count/steps) - 1.

    Begins at count - 1, as zero terminal SNR needs (arXiv:2305.08891 table 2).
    """
    _check(steps, count)
    return _indices(count - torch.arange(steps, dtype=torch.float64) * (count / steps) - 1)


def leading(steps: int, count: int, offset: int = 0) -> Tensor:
    """Multiples of floor(count / steps) plus `offset`, reversed: int64 [steps + 1].

    Begins below count - 1. Stable Diffusion 1 was published with offset 1.
    """
    _check(steps, count)
    return _indices((steps - 1 - torch.arange(steps)) * (count // steps) + offset)


def uniform(steps: int, count: int) -> Tensor:
    """Evenly spaced indices from count - 1 to 0, both included, rounded: int64 [steps + 1]."""
    _check(steps, count)
    return _indices(torch.linspace(count - 1, 0, steps, dtype=torch.float64))


def _check(steps: int, count: int) -> None:
    if not 1 <= steps <= count:
        raise ValueError(
            f"`steps = {steps}` does not fit a process of {count} steps: use 1 to {count}"
        )


def _indices(times: Tensor) -> Tensor:
    """The rounded times with the clean end after them."""
    return torch.cat([times.round().long(), torch.tensor([-1])])


def shifted(steps: int, k: float = 1.0, start: float = 1.0, end: float = 0.0) -> Tensor:
    """Times of a continuous process: float64 [steps + 1], k u / (1 + (k - 1) u) over even u.

    u runs from `start` to `end`; k = 1 is the even grid. k > 1 spends more steps on noise and is
    meant for times in [0, 1] (arXiv:2403.03206 eq. 23).
    """
    u = torch.linspace(start, end, steps + 1, dtype=torch.float64)
    return k * u / (1 + (k - 1) * u)


def power(steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """Noise levels of arXiv:2206.00364 eq. 5, then 0: float64 [steps + 1], for t = sigma."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)])
