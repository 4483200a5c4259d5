"""Time grids: decreasing from noise to data, the last entry is the clean end.

A process of `count` indices has times 0 .. count - 1, of which 0 is already noisy: its clean end
is written -1. `steps` network evaluations need `steps + 1` entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from difftrain.language.spacing import DEFAULTS, Law, above, check, check_steps, chosen

HALVINGS = 100  # more than a float64 has digits, as intervals reach down to 0


def trailing(steps: int, count: int) -> Tensor:
    """Indices counted down from the last one: int64 [steps + 1], round(count - i count/steps) - 1.

    Begins at count - 1, as zero terminal SNR needs (arXiv:2305.08891 table 2).
    """
    check_steps(steps, count)
    stride = count - (count - count / steps)  # as numpy.arange rounds it, which decides ties
    times = count - torch.arange(steps, dtype=torch.float64) * stride
    return _indices(times.round() - 1)


def leading(steps: int, count: int, offset: int = 0) -> Tensor:
    """Multiples of floor(count / steps) plus `offset`, reversed: int64 [steps + 1].

    Begins below count - 1. Stable Diffusion 1 was published with offset 1.
    """
    check_steps(steps, count)
    return _indices((steps - 1 - torch.arange(steps)) * (count // steps) + offset)


def uniform(steps: int, count: int) -> Tensor:
    """Evenly spaced indices from count - 1 to 0, both included, rounded: int64 [steps + 1]."""
    check_steps(steps, count)
    return _indices(torch.linspace(count - 1, 0, steps, dtype=torch.float64))


def _indices(times: Tensor) -> Tensor:
    """The rounded times with the clean end after them."""
    return torch.cat([times.round().long(), torch.tensor([-1])])


def shifted(steps: int, k: float = 1.0, start: float = 1.0, end: float = 0.0) -> Tensor:
    """Times of a continuous process from `start` to `end`: float64 [steps + 1].

    k u / (1 + (k - 1) u) of the way back, over even u: k = 1 is the even grid, k > 1 spends more
    steps on noise (arXiv:2403.03206 eq. 23, where start = 1 and end = 0).
    """
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return end + (start - end) * k * u / (1 + (k - 1) * u)


def power(steps: int, low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Tensor:
    """Noise levels of arXiv:2206.00364 eq. 5, then 0: float64 [steps + 1], for t = sigma."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    levels = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return torch.cat([levels, levels.new_zeros(1)])


# ---- the grid that the options of a solver ask for


class Levels(Protocol):
    """alpha and sigma at times [N]: both [N]."""

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...


INDEX = {"trailing": trailing, "leading": leading, "uniform": uniform}
OPTIONS = ("steps", "grid", "times", *DEFAULTS)  # what of a solver's options makes its grid


def grid(
    law: Law, options: Mapping[str, object], levels: Levels, trained_shift: float = 1.0
) -> Tensor:
    """The times [N + 1] that the options of a solver ask for, on a process with this law.

    Indices; or even times, from the end of the law or, where that is open, from where sigma / alpha
    is `high`; or the times at which sigma / alpha falls from `high` to `low` by `power`. Times in
    `times` stand between the first and the clean end. `shift = auto` is the shift of the times that
    were trained. Raises Misfit as `check` does, and where `times` begin before the first.
    """
    check(law, options)
    if options.get("shift", "auto") == "auto":
        options = {**options, "shift": trained_shift}
    listed = options.get("times", ())
    steps = 1 if listed else options["steps"]
    whole = _named(law, {**DEFAULTS, **options, "steps": steps}, levels)
    between = torch.tensor(listed, dtype=whole.dtype)
    if bool((between >= whole[0]).any()):
        raise above(listed, f"below {whole[0].item():g}")
    return torch.cat([whole[:1], between, whole[1:]])


def _named(law: Law, options: Mapping[str, object], levels: Levels) -> Tensor:
    (kind, end, start), word, steps = law, chosen(law, options), options["steps"]
    if word in INDEX:
        return INDEX[word](steps, int(start))
    if word == "power":
        noise = _noise(options, *_reach(levels, end, start))
        return torch.cat([at_noise(levels, noise, end, start), noise.new_tensor([end])])
    if kind == "open":
        noise = torch.tensor([float(options["high"])], dtype=torch.float64)
        start = at_noise(levels, noise, end, start).item()
    return shifted(steps, options["shift"], start, end)


def _noise(options: Mapping[str, object], least: float, most: float) -> Tensor:
    """sigma / alpha at each step, within what the process reaches: [steps]."""
    steps, low, high = options["steps"], max(options["low"], least), min(options["high"], most)
    # a solver that starts afresh from every x0 gains nothing from a time at `low`
    afresh = "times" in options
    return power(steps + afresh, low, high, options["rho"])[:steps]


def _reach(levels: Levels, *ends: float) -> tuple[float, ...]:
    """sigma / alpha at the ends of a process, as far as it has a value there."""
    t = torch.tensor(ends, dtype=torch.float64)
    return tuple((levels.sigma(t) / levels.alpha(t)).tolist())


def at_noise(levels: Levels, noise: Tensor, low: float, high: float) -> Tensor:
    """The times at which sigma / alpha, which grows with t, is `noise` [N]: float64 [N], by
    bisection of low .. high, where `high` may be infinite."""
    below = torch.full_like(noise, low)
    above = torch.full_like(noise, high if math.isfinite(high) else 1.0)
    while math.isinf(high) and bool(_quieter(levels, above, noise).any()):
        above = 2 * above
    return bisected(levels, noise, below, above)


def bisected(levels: Levels, noise: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """The times at which sigma / alpha is `noise`, each between two others: all [N]."""
    for _ in range(HALVINGS):
        middle = (below + above) / 2
        quieter = _quieter(levels, middle, noise)
        below, above = torch.where(quieter, middle, below), torch.where(quieter, above, middle)
    return above


def _quieter(levels: Levels, t: Tensor, noise: Tensor) -> Tensor:
    """Whether sigma / alpha is below `noise`: no division, as alpha may be 0."""
    return levels.sigma(t) < noise * levels.alpha(t)
