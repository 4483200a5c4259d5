"""How the times of a solver are spaced, by its options: what fits a process, and what contradicts
itself. What is laid out is in `sampling.grids`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

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
    if (word in INDEX) != (kind == "index"):
        fitting = " or ".join(f"`{name}`" for name in (INDEX if kind == "index" else READ))
        text = f"`grid = {word}` does not fit this process, whose time is {NAMES[kind]}"
        raise Misfit("grid", text, f"use {fitting}")
    read = {*READ.get(word, ()), *(("high",) if kind == "open" else ())}
    for name, usual in DEFAULTS.items():
        if name not in read and options[name] != usual:
            raise Misfit(name, f"`{name}` does nothing on the grid `{word}`", "leave it out")
    if word == "power" and options["low"] >= options["high"]:
        hint = "swap them, as sigma / alpha falls from `high` to `low`"
        raise Misfit("low", "`low` is not below `high`", hint)
    if times := _listed(options, kind == "index"):
        _check_listed(times, options["steps"], low, high, kind == "index")
    elif kind == "index":
        check_steps(options["steps"], int(high))


def check_steps(steps: int, count: int) -> None:
    """Raises Misfit for more steps than the process has."""
    if not 1 <= steps <= count:
        text = f"`steps = {steps}` does not fit a process of {count} steps"
        raise Misfit("steps", text, f"use 1 to {count}")


def _listed(options: Options, counted: bool) -> list:
    """The times that stand in the options. Raises Misfit for what is no list of numbers."""
    times = options.get("times", ())
    if not isinstance(times, tuple | list) or not all(isinstance(t, int | float) for t in times):
        usual = "[700, 300]" if counted else "[0.7, 0.3]"
        raise Misfit(
            "times", "`times` is a list of numbers", f"write one such as `times = {usual}`"
        )
    return list(times)


def _check_listed(times: list, steps: int, low: float, high: float, counted: bool) -> None:
    first, last = (high - 1, -1) if counted else (high, low)
    if counted and any(time != int(time) for time in times):
        text = f"`times = {times}` are no whole numbers, and time is an index here"
        raise Misfit("times", text, "round them")
    if any(a <= b for a, b in pairwise([first, *times, last])):
        within = f"between {first:g} and {last:g}" if math.isfinite(first) else f"above {last:g}"
        text = f"`times = {times}` are not in order, or leave the process"
        raise Misfit("times", text, f"write times that fall, {within}")
    if steps not in (1, len(times) + 1):
        text = f"`steps = {steps}` and `times = {times}` contradict each other"
        raise Misfit("steps", text, "leave `steps` out")
