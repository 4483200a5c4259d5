"""The operations of the language: one row each, with the shape and the number that it gives.

A new tensor operation is one row here and one row of `difftrain/compiler/operations.py`.
Everything else that looks like a function is text of the standard library.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

ORDER = ("scalar", "sample", "field")


class KindError(Exception):
    """Shapes that do not go together; message and help are in the words of the language."""

    def __init__(self, message: str, help: str = ""):
        self.help = help
        super().__init__(message)


@dataclass(frozen=True)
class Operation:
    """`kind` maps the kinds of the arguments to the kind of the result; `scalar` computes it on
    plain numbers (element by element on tables), where that has a meaning."""

    arity: int
    kind: Callable[..., str]
    scalar: Callable | None = None
    doc: str = ""


NAMES = {
    "scalar": "one number",
    "table": "a table",
    "sample": "one number per sample",
    "field": "a value shaped like the data",
    "tokens": "tokens",
    "module": "a module",
    "condition": "a condition",
    "word": "a word",
    "text": "a text",
    "function": "a function",
}


def _join(*kinds: str) -> str:
    """The kind of an element-wise operation: scalars spread, samples spread over fields."""
    for kind in kinds:
        if kind not in ("scalar", "sample", "field", "tokens", "table"):
            text = f"a number is needed here, and this is {NAMES.get(kind, kind)}"
            raise KindError(text, "write a quantity or a number")
    wide = {k for k in kinds if k in ("table", "tokens", "field")}
    if len(wide) > 1:
        text = " and ".join(sorted(NAMES[k] for k in wide)) + " do not go together"
        raise KindError(text, "reduce one of them first, with `mean` or `sum`")
    if "table" in wide and "sample" in kinds:
        text = "a table and one number per sample do not go together"
        raise KindError(text, "write `pick(table, t)` for an entry of the table")
    return wide.pop() if wide else max(kinds, key=ORDER.index)


def _reduce(kind: str, *_: str) -> str:
    if kind not in ("field", "tokens"):
        text = f"this reduces a value shaped like the data, and is given {NAMES[kind]}"
        raise KindError(text, "leave the reduction out" if kind in ORDER else "")
    return "sample"


def _same(kind: str, *_: str) -> str:
    return kind


def _alike(*kinds: str) -> str:
    for kind in kinds:
        if kind not in ("field", "tokens"):
            text = f"this compares values shaped like the data, and is given {NAMES[kind]}"
            raise KindError(text, "compare two of them, as in `cosine(pred, target)`")
    return _join(*kinds)


def _table(*_: str) -> str:
    return "table"


def _scalar(*_: str) -> str:
    return "scalar"


def _pick(table: str, index: str) -> str:
    if table != "table":
        text = f"`pick` takes an entry of a table, and is given {NAMES[table]}"
        raise KindError(text, "write `pick(table, index)`")
    return index


def elementwise(function):
    """The function on numbers, spread over lists (tables)."""

    def spread(*args):
        if not any(isinstance(a, list) for a in args):
            return function(*args)
        size = max(len(a) for a in args if isinstance(a, list))
        columns = [a if isinstance(a, list) else [a] * size for a in args]
        return [function(*row) for row in zip(*columns, strict=True)]

    return spread


def _power(a, b):
    if abs(b) > 64:
        a = float(a)  # whole numbers would grow without end
    value = a**b
    if isinstance(value, complex):
        raise ValueError("a fractional power of a negative number")
    return value


def _count(n):
    if n > 1_000_000:
        raise ValueError("a table of more than a million entries")
    return [float(i) for i in range(int(n))]


def _sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _exp(x):
    return math.exp(x) if x < 709 else math.inf


def _log(x):
    return -math.inf if x == 0 else math.log(x)


def _row(arity, function, kind=_join, doc=""):
    return Operation(arity, kind, elementwise(function) if function else None, doc)


OPERATIONS: dict[str, Operation] = {
    "add": _row(2, operator.add),
    "sub": _row(2, operator.sub),
    "mul": _row(2, operator.mul),
    "div": _row(2, operator.truediv),
    "pow": _row(2, _power),
    "neg": _row(1, operator.neg),
    "lt": _row(2, operator.lt),
    "le": _row(2, operator.le),
    "gt": _row(2, operator.gt),
    "ge": _row(2, operator.ge),
    "eq": Operation(2, lambda a, b: "scalar" if "word" in (a, b) else _join(a, b), operator.eq),
    "ne": Operation(2, lambda a, b: "scalar" if "word" in (a, b) else _join(a, b), operator.ne),
    "where": Operation(
        3,
        lambda test, a, b: a if a == b and a in ("condition", "word") else _join(test, a, b),
        elementwise(lambda test, a, b: a if test else b),
    ),
    "min": _row(2, min, doc="the smaller"),
    "max": _row(2, max, doc="the larger"),
    "abs": _row(1, abs, doc="the absolute value"),
    "exp": _row(1, _exp, doc="e to the power"),
    "log": _row(1, _log, doc="the natural logarithm"),
    "sqrt": _row(1, math.sqrt, doc="the square root"),
    "sin": _row(1, math.sin, doc="the sine"),
    "cos": _row(1, math.cos, doc="the cosine"),
    "tan": _row(1, math.tan, doc="the tangent"),
    "atan": _row(1, math.atan, doc="the inverse tangent"),
    "acos": _row(1, math.acos, doc="the inverse cosine"),
    "erf": _row(1, math.erf, doc="the error function"),
    "sigmoid": _row(1, _sigmoid, doc="1 / (1 + exp(-x))"),
    "expm1": _row(1, math.expm1, doc="exp(x) - 1, exact near 0"),
    "floor": _row(1, math.floor, doc="the next integer below"),
    "ceil": _row(1, math.ceil, doc="the next integer above"),
    "mean": Operation(1, _reduce, doc="the mean over all but the batch"),
    "sum": Operation(1, _reduce, doc="the sum over all but the batch"),
    "norm": Operation(1, _reduce, doc="the root of the sum of squares over all but the batch"),
    "rms": Operation(1, _reduce, doc="the root of the mean of squares over all but the batch"),
    "cosine": Operation(2, _alike, doc="the cosine similarity over channels"),
    "numel": Operation(1, _scalar, doc="how many numbers one sample has"),
    "pool": Operation(1, _same, doc="the mean over space, [B, C, 1, 1]"),
    "zeros": Operation(1, _same, lambda x: 0, "zeros of this shape"),
    "count": Operation(1, _table, _count, "0, 1, ..., n - 1"),
    "cumprod": Operation(
        1, _table, lambda x: list(accumulate(x, operator.mul)), "the running product of a table"
    ),
    "first": Operation(1, _scalar, lambda x: x[0], "the first entry of a table"),
    "last": Operation(1, _scalar, lambda x: x[-1], "the last entry of a table"),
    "pick": Operation(2, _pick, lambda x, i: x[int(i)], "the entry of a table at an index"),
    "stop": Operation(1, _same, lambda x: x, "the value, without gradient"),
}
LAWS: dict[str, str] = {
    "uniform": "uniform(low, high)",
    "normal": "normal(mean, std)",
    "integer": "integer(n): 0 .. n - 1",
    "bernoulli": "bernoulli(p): true or false",
    "choice": "choice(weights): an index, as often as its weight says",
    "noise": "noise(like): standard normal, of this shape",
}
CONSTANTS = {"pi": math.pi, "true": True, "false": False}


def apply(op: str, *args):
    """The number (or list) that the operation gives. Raises what Python's arithmetic raises."""
    return OPERATIONS[op].scalar(*args)


__all__ = ["CONSTANTS", "LAWS", "NAMES", "OPERATIONS", "KindError", "Operation", "apply"]
