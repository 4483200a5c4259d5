"""How the times of a solver are spaced, by its options: what fits a process, and what contradicts
itself. What is laid out is in `sampling.grids`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

from difftrain.language.domains import is_number
from difftrain.language.part import written

Law = tuple[str, float, float]  # "index", "real" or "open", and the ends: see `horizon`
Options = Mapping[str, object]

INDEX = ("trailing", "leading", "uniform")
USUAL = {"index": "trailing", "real": "even", "open": "power"}  # `grid = auto`
NAMES = {"index": "an index", "real": "continuous", "open": "continuous"}
DEFAULTS = {"shift": "auto", "low": 0.002, "high": 80, "rho": 7}  # of specs/std/run.diff
READ = {"even": ("shift",), "power": ("low", "high", "rho")}


class Misfit(ValueError):
    """Options that fit no process, or not this one: `option` is the one to change."""

    def __init__(self, option: str, message: str, hint: str):
        self.option, self.message, self.hint = option, message, hint
        super().__init__(f"{message}: {hint}")


def chosen(law: Law, options: Options) -> str:
    """The word for the grid: what the options say, or what is usual for the process."""
    word = options.get("grid", "auto")
    return USUAL[law[0]] if word == "auto" else word


def check(law: Law, options: Options) -> None:
    """Raises Misfit, in the words of the options, for what does not fit the process."""
    (kind, low, high), word = law, chosen(law, options)
    options = {**DEFAULTS, **options}
    fitting = INDEX if kind == "index" else tuple(READ)
    if word not in fitting:
        text = f"`grid = {written(word)}` does not fit this process, whose time is {NAMES[kind]}"
        raise Misfit("grid", text, "use " + " or ".join(f"`{name}`" for name in fitting))
    read = {*READ.get(word, ()), *(("high",) if kind == "open" else ())}
    for name, usual in DEFAULTS.items():
        if name not in read and options[name] != usual:
            raise Misfit(name, f"`{name}` does nothing on the grid `{word}`", "leave it out")
    _check_numbers({n: options[n] for n in ("steps", *DEFAULTS) if n in ("steps", *read)})
    if word == "power" and options["low"] >= options["high"]:
        hint = "swap them, as sigma / alpha falls from `high` to `low`"
        raise Misfit("low", "`low` is not below `high`", hint)
    if times := _listed(options, kind == "index"):
        if word == "leading":  # whose only step begins at 0
            text = "`grid = leading` begins at 0, and so above no `times`"
            raise Misfit("grid", text, "use `trailing`")
        _check_listed(times, options["steps"], low, high, kind == "index")
    elif kind == "index":
        check_steps(options["steps"], int(high))


def _check_numbers(options: Options) -> None:
    """Raises Misfit for what lays out no grid: a solver of one's own may say anything."""
    for name, value in options.items():
        if name == "shift" and value == "auto":
            continue
        what = "a whole number" if name == "steps" else "a number"
        positive = is_number(value) and 0 < value < math.inf
        if not positive or (name == "steps" and not float(value).is_integer()):
            text = f"`{name} = {written(value, ())}` is not {what} above 0"
            raise Misfit(name, text, f"write {what} such as {DEFAULTS.get(name, 20)}")


def check_steps(steps: int, count: int) -> None:
    """Raises Misfit for more steps than the process has."""
    if not 1 <= steps <= count:
        text = f"`steps = {steps}` does not fit a process of {count} steps"
        raise Misfit("steps", text, f"use 1 to {count}")


def _listed(options: Options, counted: bool) -> list:
    """The times that stand in the options. Raises Misfit for what is no list of numbers."""
    times = options.get("times", ())
    if not isinstance(times, tuple | list) or not all(map(is_number, times)):
        usual = "[700, 300]" if counted else "[0.7, 0.3]"
        raise Misfit(
            "times", "`times` is a list of numbers", f"write one such as `times = {usual}`"
        )
    return list(times)


def _check_listed(times: list, steps: int, low: float, high: float, counted: bool) -> None:
    first, last = (high - 1, -1) if counted else (high, low)
    if counted and not all(float(time).is_integer() for time in times):
        text = f"`times = {times}` are no whole numbers, and time is an index here"
        raise Misfit("times", text, "round them")
    if any(a <= b for a, b in pairwise([first, *times, last])):
        within = f"between {first:g} and {last:g}" if math.isfinite(first) else f"above {last:g}"
        text = f"`times = {times}` are not in order, or leave the process"
        raise Misfit("times", text, f"write times that fall, {within}")
    if steps not in (1, len(times) + 1):
        text = f"`steps = {steps}` and `times = {times}` contradict each other"
        raise Misfit("steps", text, "leave `steps` out")


def above(times: object, where: str) -> Misfit:
    """That `times` begin before sampling does: `where` says where they may be."""
    text = f"`times = {written(times)}` begin above where sampling begins"
    return Misfit("times", text, f"write times {where}, or a larger `high`")
