"""Engines on a GPU, and the walk from noise to data that they make together.

It runs beside TensorRT, numpy and torch alone; torch holds the memory and draws the noise.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from difftrain.compiler import random

BATCH = "batch"  # what the dimension is called
CONDITIONS = ("cond", "null")  # inputs that are the same in every call
ALIGNMENT = 256  # bytes, of the addresses that the library is given
WARM = 2  # calls before a graph is captured: kernels are compiled in the first


class Refused(Exception):
    """What an engine cannot do here; `str()` is the sentence to show, `code` the exit code."""

    def __init__(self, message: str, code: int = 2):
        self.code = code
        super().__init__(message)


class Runner:
    """An engine as a function of tensors, in the order of its inputs; answers in that of its
    outputs. `kernels` is a file that keeps what the library compiles for this GPU."""

    def __init__(self, name: str, data: bytes, about: Mapping, kernels: Path | None = None):
        trt = runtime(about)
        said = log(trt)
        self.name, self.about, self.trt, self.kernels = name, about, trt, kernels
        self.engine = trt.Runtime(said).deserialize_cuda_engine(data)
        if self.engine is None:
            raise Refused(f"the engine `{name}` does not run here: {said.first()}", 3)
        self.config = _config(trt, self.engine)
        self.compiled = self._kernels()
        size = max(1, self.engine.device_memory_size_v2)
        self.memory = torch.empty(size, dtype=torch.uint8, device="cuda")
        self.contexts: dict[int, object] = {}
        self.context = self._context(0)
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        mode = trt.TensorIOMode
        self.inputs = [n for n in names if self.engine.get_tensor_mode(n) == mode.INPUT]
        self.outputs = [n for n in names if self.engine.get_tensor_mode(n) == mode.OUTPUT]

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs for inputs on the GPU, enqueued on torch's stream."""
        given = {n: _aligned(value) for n, value in zip(self.inputs, inputs, strict=True)}
        self.context = self._context(profile_for(self.about, given))
        for name, value in given.items():
            if not self.context.set_input_shape(name, tuple(value.shape)):
                low, high = self.about["batch"]
                raise Refused(
                    f"the engine `{self.name}` takes `{name}` in batches of {low} to {high} as"
                    f" {list(self.engine.get_tensor_shape(name))}, not {list(value.shape)}"
                )
            self.context.set_tensor_address(name, value.data_ptr())
        made = [self._output(name) for name in self.outputs]
        said = log(self.trt)
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise Refused(f"the engine `{self.name}` failed while it ran: {said.first()}", 4)
        return made

    def _context(self, number: int):
        """What runs the kernels of a profile: started when its first batch comes."""
        if number in self.contexts:
            return self.contexts[number]
        said = log(self.trt)
        context = self.engine.create_execution_context(self.config)
        stream, started = torch.cuda.current_stream(), context is not None
        if started and number:  # a context begins with the first profile
            started = context.set_optimization_profile_async(number, stream.cuda_stream)
        if not started:
            raise Refused(
                f"the engine `{self.name}` does not start here: {said.first()}{self._own()}", 4
            )
        context.set_device_memory(self.memory.data_ptr(), len(self.memory))
        stream.synchronize()
        self.contexts[number] = context
        return context

    def _own(self) -> str:
        """What to do where an engine for every GPU has no kernels for this one."""
        many = self.about["gpu"].endswith("later")
        return "; export on this machine with `portable = false`" if many else ""

    def _output(self, name: str) -> Tensor:
        kind = getattr(torch, TYPES[self.engine.get_tensor_dtype(name).name])
        made = torch.empty(tuple(self.context.get_tensor_shape(name)), dtype=kind, device="cuda")
        self.context.set_tensor_address(name, made.data_ptr())
        return made

    def capturable(self) -> bool:
        """Whether a CUDA graph can hold a call with the shapes of the last one."""
        ask = getattr(self.context, "is_stream_capturable", None)
        return ask is None or ask(torch.cuda.current_stream().cuda_stream)

    def _kernels(self):
        """The library's cache of compiled kernels, with what an earlier process compiled."""
        if self.kernels is None or not hasattr(self.config, "create_runtime_cache"):
            return None
        cache = self.config.create_runtime_cache()
        if self.kernels.is_file():
            cache.deserialize(self.kernels.read_bytes())
        self.config.set_runtime_cache(cache)
        return cache

    def keep_kernels(self) -> None:
        """Writes what was compiled, for the next process."""
        if self.compiled is None:
            return
        self.kernels.parent.mkdir(parents=True, exist_ok=True)
        beside = self.kernels.with_name(f".{self.kernels.name}.{os.getpid()}")
        beside.write_bytes(bytes(self.compiled.serialize()))
        os.replace(beside, self.kernels)


def _aligned(value: Tensor) -> Tensor:
    """A tensor as the library reads one, which takes any address for one of the GPU: there, whole,
    and where its memory may begin."""
    value = value.cuda()
    fits = value.is_contiguous() and value.data_ptr() % ALIGNMENT == 0
    return value if fits else value.clone(memory_format=torch.contiguous_format)


TYPES = {  # what the library calls types, and what torch does
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
    "UINT8": "uint8",
}


def _config(trt: ModuleType, engine):
    """How an engine runs: in memory of ours, with kernels for the very shapes it is given."""
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(
        trt.ExecutionContextAllocationStrategy.USER_MANAGED
    )
    if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = eager
    return config


def profile_for(about: Mapping, given: Mapping[str, Tensor]) -> int:
    """Which of an engine's kernels are for a batch: the first that are, else the last, which say
    what they take."""
    sizes = (
        value.shape[about["inputs"][name][1].index(BATCH)]
        for name, value in given.items()
        if BATCH in about["inputs"][name][1]
    )
    count = next(sizes, about["batch"][0])
    fits = [low <= count <= high for low, high in about["profiles"]]
    return fits.index(True) if True in fits else len(fits) - 1


def log(trt: ModuleType):
    """A logger that keeps what the library calls an error from now on. There is one in a process:
    the library goes on calling the first that it was given, also when its owner is gone."""
    said = _logger(trt)
    said.errors.clear()
    return said


@cache
def _logger(trt: ModuleType):
    class Log(trt.ILogger):
        def __init__(self):
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

        def first(self) -> str:
            told = " ".join(self.errors[:1]).strip().splitlines()
            return told[0].rstrip(".") if told else "the library does not say why"

    return Log()


def runtime(about: Mapping) -> ModuleType:
    """The module that runs an engine, if this machine is one that it was built for."""
    module, version = about["runtime"], about["version"]
    package = module.replace("_", "-")
    try:
        trt = importlib.import_module(module)
    except ModuleNotFoundError as cause:
        raise Refused(
            f"these engines run under {package} {version}, which is not installed here:"
            f" `pip install {package}=={version}`",
            3,
        ) from cause
    if trt.__version__ != version:
        raise Refused(
            f"these engines were built by {package} {version}, and here is {trt.__version__}:"
            f" install {version}, or export again with {trt.__version__}",
            3,
        )
    return trt


def gpu(about: Mapping) -> None:
    """Raises Refused where there is no GPU, or another than an engine was built for."""
    if not torch.cuda.is_available():
        raise Refused(
            f"these engines run on a GPU of compute capability {about['gpu']}, and here is none", 3
        )
    here, name = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
    wanted, _, later = about["gpu"].partition(" ")
    least = tuple(map(int, wanted.split(".")))
    if here < least if later else here != least:
        raise Refused(
            f"these engines are for GPUs of compute capability {about['gpu']}, and `{name}` has"
            f" {'.'.join(map(str, here))}: export again on this machine",
            3,
        )


def kernels_of(data: bytes) -> Path:
    """Where the compiled kernels of an engine are kept on this machine."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = sha256(data + torch.cuda.get_device_name().encode()).hexdigest()[:32]
    return home / "difftrain" / "kernels" / key


# ---- from noise to data


class Walk:
    """Latents [B, ...] of a seed and conditions, by a whole sampler or step by step.

    `table` is the solver's, as a manifest has it; `inputs` names what `step` takes, and is None for
    a whole sampler. On a GPU all calls for one batch are one CUDA graph, if the library allows it.
    """

    def __init__(
        self,
        engine: Callable,
        table: Mapping,
        inputs: Sequence[str] | None,
        shape: Sequence[int],
        device: str = "cuda",
    ):
        self.engine, self.table, self.shape = engine, table, tuple(shape)
        self.inputs = inputs and [name for name in inputs if name not in CONDITIONS]
        kind = torch.int64 if table["time"] == "index" else torch.float32

        def one(value: float) -> Tensor:
            return torch.tensor([value], dtype=kind, device=device)

        rows = table["rows"]  # each number in memory of its own, where the library may read it
        self.times = [[one(row[n]) for n in "tr"] for row in rows]
        self.weights = [
            torch.tensor(row["weights"], dtype=torch.float32, device=device) for row in rows
        ]
        self.graphs: dict[int, Replay] = {}

    def __call__(self, seed: int, index: Tensor, told: Sequence[Tensor]) -> Tensor:
        """Latents of the samples `index` [B] under conditions: that of each, and the empty one."""
        return self.latents([*self.noises(seed, index), *told])

    def noises(self, seed: int, index: Tensor) -> list[Tensor]:
        """All that is drawn for the samples `index` [B], each [B, ...]: as `difftrain sample`
        draws it."""
        draws = (0, *self.table["draws"])
        return [random.normal("sample", seed, draw, index, self.shape) for draw in draws]

    def latents(self, given: Sequence[Tensor]) -> Tensor:
        """Latents [B, ...] of noises and conditions."""
        count = len(given[0])
        if not given[0].is_cuda:
            return self._walk(*given)
        if count not in self.graphs:
            self.graphs[count] = Replay(self._walk, given, self.engine.capturable)
        return self.graphs[count](given)

    def _walk(self, *given: Tensor) -> Tensor:
        draws = (0, *self.table["draws"])
        noises, told = given[: len(draws)], given[len(draws) :]
        if self.inputs is None:
            drawn = [torch.stack(noises[1:])] if len(noises) > 1 else []
            return self.engine(noises[0], *drawn, *told)[0]
        return self._steps(dict(zip(draws, noises, strict=True)), told)

    def _steps(self, noises: Mapping[int, Tensor], told: Sequence[Tensor]) -> Tensor:
        """One call of the engine for each row of the table."""
        x = sum(weight * noises[draw] for weight, draw in self.table["start"])
        kept = x.new_zeros(sum(self.table["kept"]), *x.shape)
        for i, row in enumerate(self.table["rows"]):
            every = {"x": x, "t": self.times[i][0], "r": self.times[i][1]}
            every |= {"row": self.weights[i], "kept": kept, "noise": noises[row["draw"] or 0]}
            x, *rest = self.engine(*(every[name] for name in self.inputs), *told)
            kept = rest[0] if rest else kept
        return x


class Replay:
    """A function of tensors of fixed shapes, replayed as one CUDA graph if `allowed()` says so."""

    def __init__(
        self, call: Callable[..., Tensor], example: Sequence[Tensor], allowed: Callable[[], bool]
    ):
        self.call, self.inputs = call, [value.clone() for value in example]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                self.output = call(*self.inputs)
            self.captured = allowed()
        torch.cuda.current_stream().wait_stream(stream)
        if self.captured:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                self.output = call(*self.inputs)

    def __call__(self, values: Sequence[Tensor]) -> Tensor:
        if not self.captured:
            return self.call(*values)
        for kept, value in zip(self.inputs, values, strict=True):
            kept.copy_(value)
        self.graph.replay()
        return self.output.clone()
