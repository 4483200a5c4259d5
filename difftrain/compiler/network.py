"""Calling networks, and modules that are applied to a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from difftrain.answer import unwrap


def call_network(net, x: Tensor, tau: Tensor, cond, **extra) -> Tensor:
    """The output [B, ...] of `net(x, tau, cond, **extra)`; tau [B] keeps its own precision. A
    condition of one row, such as the null one, stands for every sample, and so does one number."""
    return unwrap(_asked(net, x, tau, cond, extra))


def call_tapped(net, x: Tensor, tau: Tensor, cond, **extra) -> tuple[Tensor, Tensor]:
    """The output [B, ...] of a network and the tokens [B, T, D] that it returns beside it.

    Raises ValueError for a network that returns nothing beside its output.
    """
    answer = _asked(net, x, tau, cond, extra)
    if not isinstance(answer, tuple | list) or len(answer) < 2:
        raise ValueError(
            "the objective reads `tap`, and the network returned its output alone: return"
            " `(output, tokens)`"
        )
    return answer[0], answer[1]


def _asked(net, x: Tensor, tau, cond, extra: Mapping):
    told = {name: _spread(value, x) for name, value in extra.items()}
    return net(x, _spread(tau, x), for_each(cond, x.shape[0]), **told)


def _spread(value, x: Tensor):
    """One number for the whole batch as [B], at least in fp32."""
    if isinstance(value, int | float):
        value = x.new_tensor(value, dtype=torch.promote_types(x.dtype, torch.float32))
    return value.expand(x.shape[0]) if isinstance(value, Tensor) and value.dim() == 0 else value


def apply_module(module, x: Tensor) -> Tensor:
    """What a module makes of a value: tokens [B, T, D], or one number a sample [B] of [B]."""
    made = unwrap(module(x))
    return made.reshape(x.shape[0]) if x.dim() == 1 else made


def for_each(cond, count: int):
    """The condition with `count` rows; what has one row has it for all."""
    if isinstance(cond, Mapping):
        return {name: for_each(part, count) for name, part in cond.items()}
    if isinstance(cond, Sequence):
        return type(cond)(for_each(part, count) for part in cond)
    if isinstance(cond, Tensor) and cond.shape[0] == 1:
        return cond.expand(count, *cond.shape[1:])
    return cond
