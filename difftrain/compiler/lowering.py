"""Lowering: whether a step is compiled, the compiled step, the guard against doing it twice, and
the CUDA graph that replays it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from difftrain.compiler import channels
from difftrain.compiler.whole import Step

# What compiling a small UNet's whole step costs and gains on a CPU: docs/performance.md.
CPU_SECONDS = 120.0
CPU_GAIN = 0.20


class NoDevice(Exception):
    """A device that the spec asks for and this machine does not have."""


class NoCompiler(Exception):
    """`compile = on` on a machine without a C++ compiler."""


class NotCompiled(Exception):
    """A step that torch's compiler fails at; the message says at what."""


@dataclass(frozen=True)
class Choice:
    """Whether the step is compiled, and the one line that says why."""

    compiled: bool
    because: str


def device(asked: str) -> torch.device:
    """The device of `auto`, `cpu` or `cuda`. Raises NoDevice."""
    there = torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise NoDevice(
            "`device = cuda` needs a CUDA GPU, and torch finds none on this machine: leave the"
            " option out to train on the CPU"
        )
    return torch.device("cuda" if there and asked != "cpu" else "cpu")


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
            raise NoCompiler(
                "`compile = on` needs a C++ compiler, and there is none on this machine"
            )
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


def options(forward: bool) -> dict[str, object]:
    """What Inductor is told of a step, one that differentiates the network `forward` or not.

    Its one kernel for reductions of both orders gains 4% of DiT-XL/2's step, and ends the compiling
    of normalised heads that are differentiated forward ("256 v.s. 128", torch 2.11). Cutting graphs
    into partitions takes time, and is for CUDA graphs of its own.
    """
    return {"triton.mix_order_reduction": not forward, "graph_partition": False}


def compiler(forward: bool, **more: object) -> Callable[[Callable], Callable]:
    """What compiles a function of a step whole, by these options and `more`."""
    channels.last()

    def through(function: Callable) -> Callable:
        told = {**options(forward), **more}  # of its own: torch takes out what it has read
        return torch.compile(function, fullgraph=True, dynamic=False, options=told)

    return through


def compiled(step: Step, forward: bool = False) -> Step:
    """The step through `torch.compile(fullgraph=True)`; compiling it a second time is an error."""
    torch._dynamo.config.error_on_recompile = False
    return step.each(compiler(forward))


@contextmanager
def compiling() -> Iterator[None]:
    """In it, what torch's compiler fails at is NotCompiled; a memory that is full, and a file that
    cannot be read, are what they are."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as cause:
        within = getattr(cause, "inner_exception", cause)
        if isinstance(within, torch.OutOfMemoryError | OSError | ImportError):
            raise
        reason = str(cause).strip().partition("\n")[0]
        raise NotCompiled(
            f"torch's compiler fails at this step ({reason}): mend the network, or train without"
            " the compiler by `--set train.compile=off`"
        ) from cause


def no_more_compiling() -> None:
    """From here on a recompilation raises: the warm-up is over."""
    torch._dynamo.config.error_on_recompile = True


@contextmanager
def exact() -> Iterator[None]:
    """In it, products of fp32 numbers are in fp32 on every device: by itself torch lets a GPU round
    what convolutions multiply to TF32. It holds for the whole process, so for one thread's use."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


WARM_UP = 3  # real steps on a side stream, in which libraries choose their kernels


@dataclass(eq=False)
class Replayed:
    """A step as one CUDA graph: a replay costs one launch instead of thousands.

    The first steps run as they are; then the graph is recorded on buffers of its own, into which
    each batch is copied. State tensors are changed in place, so they are the same in every replay.
    """

    step: Callable
    calls: int = 0
    graph: torch.cuda.CUDAGraph | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    log: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, state, batch: dict[str, Tensor], *rest) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._warm(state, batch, *rest)
        if self.graph is None:
            self._record(state, batch, *rest)
        for name, value in batch.items():
            self.inputs[name].copy_(value)
        self.graph.replay()
        return self.log

    def _warm(self, *args) -> dict[str, Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            log = self.step(*args)
        torch.cuda.current_stream().wait_stream(side)
        return log

    def _record(self, state, batch: dict[str, Tensor], *rest) -> None:
        """Recording runs nothing: the state is untouched until the first replay."""
        self.inputs = {name: value.clone() for name, value in batch.items()}
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.log = self.step(state, self.inputs, *rest)
