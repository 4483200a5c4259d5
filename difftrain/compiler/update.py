"""What the emitted step does with a gradient: clip it, move the flat state, average the weights.

Everything is a tensor on the device; nothing here reads a number back.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GROWTH_EVERY = 2000  # updates without overflow after which the fp16 loss scale doubles
SCALES = (2.0**-14, 2.0**24)


def clipped(gradient: Tensor, norm: Tensor, limit: float) -> Tensor:
    """The gradient [P], shortened to the limit where its norm is above it."""
    return gradient * torch.clamp(limit / (norm + 1e-6), max=1.0)


def learning_rate(count: Tensor, peak: float, warmup: int, cosine: Tensor | None = None) -> Tensor:
    """The rate of update `count` (from 1): a linear rise, then constant, or times half a cosine
    that ends at 0 after `cosine` updates."""
    rate = peak * torch.clamp(count / max(warmup, 1), max=1.0)
    if cosine is not None:
        rate = rate * 0.5 * (1 + torch.cos(torch.pi * torch.clamp(count / cosine, max=1.0)))
    return rate


def adamw(
    state: dict[str, Tensor],
    gradient: Tensor,
    count: Tensor,
    rate: Tensor,
    averaging: Callable,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    fine: Tensor | None = None,
) -> None:
    """Moves weights, their copy in half precision, moments, average and the count of updates, in
    place: arXiv:1711.05101 alg. 2.

    `fine` (a bool) says whether the gradient is finite; where it is not, nothing moves.
    """
    weights = state["weights"]
    first = torch.lerp(gradient, state["first"], beta1)
    second = torch.lerp(gradient.square(), state["second"], beta2)
    change = first / (1 - beta1**count)
    change = change / ((second / (1 - beta2**count)).sqrt() + eps)
    moved = weights - rate * (change + weight_decay * weights)
    average = nearer(state["average"], moved, averaging, count)
    new = {"weights": moved, "first": first, "second": second, "average": average}
    new |= {"half": moved} if "half" in state else {}
    for name, value in {**new, "updates": state["updates"] + 1}.items():
        state[name].copy_(value if fine is None else torch.where(fine, value, state[name]))


def nearer(average: Tensor, weights: Tensor, decay: Callable, count: Tensor) -> Tensor:
    """The average [P] after update `count`. Late in a run fp32 has few digits of what comes in,
    so that is computed in float64; as a view it is made once, and not again for every weight."""
    share = 1 - decay(count.double())
    if isinstance(share, Tensor):
        share = share.as_strided((), ())
    return average + share * (weights - average)


def follow(
    state: dict[str, Tensor],
    name: str,
    decay: Callable,
    count: Tensor,
    fine: Tensor | None = None,
) -> None:
    """Moves a further average [P] towards the weights, in place; after an overflow it stays."""
    moved = nearer(state[name], state["weights"], decay, count)
    state[name].copy_(moved if fine is None else torch.where(fine, moved, state[name]))


def rescale(state: dict[str, Tensor], fine: Tensor) -> None:
    """Half the loss scale after an overflow, twice after a long time without one, in place."""
    calm = torch.where(fine, state["calm"] + 1, 0)
    grown = torch.where(calm >= GROWTH_EVERY, 2.0, 1.0)
    state["scale"].mul_(torch.where(fine, grown, 0.5)).clamp_(*SCALES)
    state["calm"].copy_(calm % GROWTH_EVERY)
