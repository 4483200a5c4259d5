"""The operations on tensors: one row each, beside those of `difftrain/language/operations.py`.

Samples are [B], fields [B, ...], tokens [B, T, D], tables [N]. The emitted step imports these.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor


def widen(x: Tensor, like: Tensor) -> Tensor:
    """x [B] as [B, 1, ..., 1], to go with a field."""
    return x.reshape(-1, *(1,) * (like.dim() - 1))


def real(x: Tensor, like: Tensor) -> Tensor:
    """Whole numbers [B] as real ones, in the precision of the data and at least in fp32."""
    return x.to(torch.promote_types(like.dtype, torch.float32))


def over_sample(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.dim()))


def mean(x: Tensor) -> Tensor:
    """The mean over all but the batch, [B]."""
    return x.mean(over_sample(x))


def total(x: Tensor) -> Tensor:
    """The sum over all but the batch, [B]."""
    return x.sum(over_sample(x))


def norm(x: Tensor) -> Tensor:
    """The root of the sum of squares over all but the batch, [B]."""
    return x.square().sum(over_sample(x)).sqrt()


def rms(x: Tensor) -> Tensor:
    """The root of the mean of squares over all but the batch, [B]."""
    return x.square().mean(over_sample(x)).sqrt()


def cosine(a: Tensor, b: Tensor, axis: int) -> Tensor:
    """Cosine similarity over the axis of the channels: the last one of tokens, axis 1 of data."""
    return torch.nn.functional.cosine_similarity(a, b, dim=axis)


CHANNELS = {"tokens": -1, "field": 1}  # the axis of the channels


def pool(x: Tensor) -> Tensor:
    """The mean over space, [B, C, 1, ...]; data without space are that already."""
    return x if x.dim() < 3 else x.mean(tuple(range(2, x.dim())), keepdim=True)


def numel(x: Tensor) -> Tensor:
    """How many numbers one sample has, float64 []."""
    return torch.tensor(float(x[0].numel()), dtype=torch.float64)


def pick(table: Tensor, index: Tensor) -> Tensor:
    """The entries of a table [N] at an index [B], or the one at a plain number. An index outside
    is an error, a negative one as well."""
    if not isinstance(index, Tensor):
        return table[int(index)]
    return table.index_select(0, index.long().reshape(-1)).reshape(index.shape)


def smaller(a, b) -> Tensor:
    """The smaller, element by element; one of them may be a number."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.minimum(a, b)
    return b.clamp(max=a) if isinstance(b, Tensor) else a.clamp(max=b)


def larger(a, b) -> Tensor:
    """The larger, element by element; one of them may be a number."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.maximum(a, b)
    return b.clamp(min=a) if isinstance(b, Tensor) else a.clamp(min=b)


def where(test: Tensor, a, b) -> Tensor:
    """a where the test holds, else b. Two plain numbers keep all their digits."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        a = torch.tensor(a, dtype=torch.float64)
    return torch.where(test, a, b)


def rows(test: Tensor, a, b):
    """Row by row, condition a where the test holds and b elsewhere. A condition is a tensor whose
    rows are samples, a mapping or sequence of such, or None; a may be a single row for all."""
    if b is None:
        return None
    if a is None:
        raise ValueError("`null` must be given: it is the condition of the rows that are dropped")
    if isinstance(b, Mapping):
        return {k: rows(test, a[k], v) for k, v in b.items()}
    if isinstance(b, Sequence):
        return type(b)(rows(test, x, y) for x, y in zip(a, b, strict=True))
    return torch.where(widen(test, b), a.to(b.dtype), b)


def count(n: int, device=None) -> Tensor:
    """0, 1, ..., n - 1 as float64 [n]."""
    return torch.arange(int(n), dtype=torch.float64, device=device)


def cumprod(x: Tensor) -> Tensor:
    """The running product of a table."""
    return torch.cumprod(x, 0)


def first(x: Tensor) -> Tensor:
    """The first entry of a table."""
    return x[0]


def last(x: Tensor) -> Tensor:
    """The last entry of a table."""
    return x[-1]


def zeros(x: Tensor) -> Tensor:
    """Zeros of this shape."""
    return torch.zeros_like(x)


HALVINGS = 60  # of a bisection: about all the digits that a double has


def solved(function: Callable, wanted: Tensor, low: float, high: float) -> Tensor:
    """Where a monotone function [B] -> [B] has the wanted values [B], by bisection between two
    ends, of which either may be infinite. No gradient."""
    with torch.no_grad():
        start = torch.full_like(wanted, 0.25), torch.full_like(wanted, 0.75)
        first, second = (function(between(low, high, s)) for s in start)
        rising = second > first
        left, right = torch.zeros_like(wanted), torch.ones_like(wanted)
        for _ in range(HALVINGS):
            middle = (left + right) / 2
            above = (function(between(low, high, middle)) < wanted) == rising
            left, right = torch.where(above, middle, left), torch.where(above, right, middle)
        return between(low, high, (left + right) / 2)


def between(low: float, high: float, share: Tensor) -> Tensor:
    """A point between two ends, of which either may be infinite; share [B] is in (0, 1)."""
    if math.isinf(low) and math.isinf(high):
        return torch.log(share / (1 - share))
    if math.isinf(high):
        return low + share / (1 - share)
    if math.isinf(low):
        return high - (1 - share) / share
    return low + (high - low) * share


def stop(x):
    """The value, without gradient."""
    return x.detach() if isinstance(x, Tensor) else x


def _tensor_function(function: Callable) -> Callable:
    """The function of a tensor, for plain numbers too."""

    def apply(x):
        return function(x) if isinstance(x, Tensor) else function(torch.tensor(float(x)))

    apply.__name__ = function.__name__
    return apply


# What the emitted step calls each function; infix operators are written as such.
FUNCTIONS: dict[str, Callable] = {
    "min": smaller,
    "max": larger,
    "where": where,
    "mean": mean,
    "sum": total,
    "norm": norm,
    "rms": rms,
    "cosine": cosine,
    "numel": numel,
    "pool": pool,
    "zeros": zeros,
    "count": count,
    "cumprod": cumprod,
    "first": first,
    "last": last,
    "pick": pick,
    "stop": stop,
    "widen": widen,
    "real": real,
}
ON_TENSORS = ("exp", "log", "sqrt", "sin", "cos", "tan", "atan", "acos", "erf", "sigmoid", "expm1")
ON_TENSORS += ("floor", "ceil", "abs")
INFIX: dict[str, tuple[str, Callable]] = {
    "add": ("+", operator.add),
    "sub": ("-", operator.sub),
    "mul": ("*", operator.mul),
    "div": ("/", operator.truediv),
    "pow": ("**", operator.pow),
    "lt": ("<", operator.lt),
    "le": ("<=", operator.le),
    "gt": (">", operator.gt),
    "ge": (">=", operator.ge),
    "eq": ("==", operator.eq),
    "ne": ("!=", operator.ne),
}
TORCH: dict[str, Callable] = {
    **FUNCTIONS,
    **{name: _tensor_function(getattr(torch, name)) for name in ON_TENSORS},
    **{name: function for name, (_, function) in INFIX.items()},
    "neg": operator.neg,
}
