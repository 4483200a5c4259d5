"""Lowering: whether a step is compiled, the compiled step, and the guard against doing it twice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch

# What compiling a small UNet's whole step costs and gains on a CPU: docs/performance.md.
CPU_SECONDS = 100.0
CPU_GAIN = 0.10


class NoCompiler(Exception):
    """`compile = on` on a machine without a C++ compiler."""


@dataclass(frozen=True)
class Choice:
    """Whether the step is compiled, and the one line that says why."""

    compiled: bool
    because: str


def cxx() -> str | None:
    """The C++ compiler that would be used, if there is one."""
    wanted = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
    return next((found for name in wanted if name and (found := shutil.which(name))), None)


def choose(asked: str, device: str, steps: int, seconds: float | None) -> Choice:
    """Whether to compile. `seconds` is what a step takes uncompiled, where that was measured.

    Raises NoCompiler where compiling was asked for and cannot be done.
    """
    if asked == "off":
        return Choice(False, "not compiled: `compile = off`")
    if cxx() is None:
        if asked == "on":
            raise NoCompiler("`compile = on` needs a C++ compiler, and there is none on this machine")
        return Choice(False, "not compiled: there is no C++ compiler on this machine")
    if asked == "on":
        return Choice(True, "compiled: `compile = on`")
    if device != "cpu":
        return Choice(True, "compiled: the step runs on a GPU")
    gained = steps * (seconds or 0.0) * CPU_GAIN
    if gained > CPU_SECONDS:
        return Choice(True, f"compiled: {steps} steps would gain about {gained:.0f} s on this CPU")
    return Choice(
        False,
        f"not compiled: {steps} steps of {seconds or 0:.2f} s would gain about {gained:.0f} s,"
        f" and compiling takes about {CPU_SECONDS:.0f} s on a CPU",
    )


def compiled(step: Callable) -> Callable:
    """The step through `torch.compile(fullgraph=True)`; compiling it a second time is an error."""
    torch._dynamo.config.trace_autograd_ops = True
    torch._dynamo.config.error_on_recompile = False
    return torch.compile(step, fullgraph=True, dynamic=False)


def no_more_compiling() -> None:
    """From here on a recompilation raises: the warm-up is over."""
    torch._dynamo.config.error_on_recompile = True
