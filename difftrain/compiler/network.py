"""Calling a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from difftrain.answer import unwrap


def call_network(net, x: Tensor, tau: Tensor, cond, **extra) -> Tensor:
    """The output [B, ...] of `net(x, tau, cond, **extra)`; tau [B] keeps its own precision. A
    condition of one row, such as the null one, stands for every sample."""
    return unwrap(net(x, tau, for_each(cond, len(x)), **extra))


def for_each(cond, count: int):
    """The condition with `count` rows; what has one row has it for all."""
    if isinstance(cond, Mapping):
        return {name: for_each(part, count) for name, part in cond.items()}
    if isinstance(cond, Sequence):
        return type(cond)(for_each(part, count) for part in cond)
    if isinstance(cond, Tensor) and len(cond) == 1:
        return cond.expand(count, *cond.shape[1:])
    return cond
