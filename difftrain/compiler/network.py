"""Calling a network, and what it may answer with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

ANSWERS = ("sample", "last_hidden_state", "latents")  # fields that hold the tensor


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


def unwrap(answer) -> Tensor:
    """The tensor in an answer: the tensor itself, the first of a tuple, or a named field."""
    if isinstance(answer, Tensor):
        return answer
    if isinstance(answer, (tuple, list)):
        return unwrap(answer[0])
    for name in ANSWERS:
        if isinstance(getattr(answer, name, None), Tensor):
            return getattr(answer, name)
    names = ", ".join(f"`.{n}`" for n in ANSWERS)
    raise TypeError(
        f"the network must return a tensor, a tuple of tensors, or an object with {names}"
    )
