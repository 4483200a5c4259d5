"""Calling networks, and modules that are applied to a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from difftrain.answer import unwrap


def call_network(net, x: Tensor, tau: Tensor, cond, **extra) -> Tensor:
    """The output [B, ...] of `net(x, tau, cond, **extra)`; tau [B] keeps its own precision. A
    condition of one row, such as the null one, stands for every sample."""
    return unwrap(net(x, tau, for_each(cond, len(x)), **extra))


def call_tapped(net, x: Tensor, tau: Tensor, cond, **extra) -> tuple[Tensor, Tensor]:
    """The output [B, ...] of a network and the tokens [B, T, D] that it returns beside it.

    Raises ValueError for a network that returns nothing beside its output.
    """
    answer = net(x, tau, for_each(cond, len(x)), **extra)
    if not isinstance(answer, tuple | list) or len(answer) < 2:
        raise ValueError(
            "the objective reads `tap`, and the network returned its output alone: return"
            " `(output, tokens)`"
        )
    return answer[0], answer[1]


def apply_module(module, x: Tensor) -> Tensor:
    """What a module makes of a value: tokens [B, T, D], or one number a sample [B] of [B]."""
    made = unwrap(module(x))
    return made.reshape(len(x)) if x.dim() == 1 else made


def for_each(cond, count: int):
    """The condition with `count` rows; what has one row has it for all."""
    if isinstance(cond, Mapping):
        return {name: for_each(part, count) for name, part in cond.items()}
    if isinstance(cond, Sequence):
        return type(cond)(for_each(part, count) for part in cond)
    if isinstance(cond, Tensor) and len(cond) == 1:
        return cond.expand(count, *cond.shape[1:])
    return cond
