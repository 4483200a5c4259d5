"""TensorRT engines, built from ONNX files or traced programs by the library that is installed.

Modules come already cast (networks are strongly typed), so an engine computes in the precisions
that its ONNX file says. TensorRT-RTX builds without a GPU; kernels are chosen where it runs.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch

from difftrain.compiler.lowering import NoDevice
from difftrain.export.errors import ExportError
from difftrain.export.running import TYPES, log
from difftrain.export.trace import BATCH
from difftrain.models.foreign import reason

PORTABLE = "8.0"  # the least compute capability of engines that are built for no GPU alone
Tensors = dict[str, tuple[str, list]]  # type and dimensions by name
Made = tuple[bytes, dict[str, object]]  # an engine, and what is known of it


@dataclass(frozen=True)
class Library:
    """An engine library: the package to install, the module that builds, and the one that runs."""

    package: str
    builder: str
    runtime: str
    anywhere: bool  # whether it builds on a machine without a GPU

    @property
    def version(self) -> str:
        """The version of what runs the engines: they run under no other."""
        return importlib.import_module(self.runtime).__version__


LIBRARIES = (  # in order of preference
    Library("torch-tensorrt", "torch_tensorrt", "tensorrt", False),
    Library("torch-tensorrt-rtx", "torch_tensorrt", "tensorrt_rtx", False),
    Library("tensorrt-rtx", "tensorrt_rtx", "tensorrt_rtx", True),
)


@dataclass(frozen=True, eq=False)
class Source:
    """A part of a sampler as libraries take it: an ONNX file, and the same module traced."""

    name: str
    onnx: Path
    program: Callable[[], torch.export.ExportedProgram]


@dataclass(frozen=True)
class Profile:
    """What an engine is built for: batches from `low` to `high`, the GPU of this machine or
    (`portable`) every one from compute capability 8.0 on, and weights that can be exchanged."""

    low: int = 1
    high: int = 8
    portable: bool = True
    refit: bool = False

    @property
    def ranges(self) -> list[list[int]]:
        """Batches that get kernels of their own: the least and the most, since more is fused for
        one number than for many, and where there are others all of them."""
        ends = [[size, size] for size in sorted({self.low, self.high})]
        return [*ends, [self.low, self.high]] if self.high - self.low > 1 else ends


@dataclass(frozen=True, eq=False)
class Engine:
    """A serialized engine and what its manifest says of it."""

    data: bytes
    about: Mapping[str, object]


def installed(package: str) -> bool:
    """Whether a package is there, without importing it."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def library(name: str = "auto") -> Library:
    """The engine library of this name, or (`auto`) the first that is installed and builds here.
    Raises ExportError, and ModuleNotFoundError or NoDevice for what is absent here."""
    gpu = torch.cuda.is_available()
    named = [it for it in LIBRARIES if name in ("auto", it.package)]
    if not named:
        known = ", ".join(f"`{it.package}`" for it in LIBRARIES)
        raise ExportError(f"`{name}` is no engine library: use {known}")
    here = [it for it in named if installed(it.package)]
    if not here:
        wanted = named[-1].package
        raise ModuleNotFoundError(f"`{wanted}` is not installed", name=wanted.replace("-", "_"))
    if not (usable := [it for it in here if gpu or it.anywhere]):
        raise NoDevice(
            f"`{here[0].package}` builds engines on a machine with a GPU, and here is none: install"
            " difftrain with its extra `tensorrt-rtx`, which needs none to build"
        )
    return usable[0]


def build(source: Source, profile: Profile, maker: Library) -> Engine:
    """The engine of a source. Raises ExportError."""
    make = _from_program if maker.builder == "torch_tensorrt" else _from_onnx
    data, described = make(source, profile, maker)
    return Engine(data, {**built_for(maker, profile), **described})


def built_for(maker: Library, profile: Profile) -> dict[str, object]:
    """By what and for what an engine is built, as its manifest says it."""
    here = f"{PORTABLE} or later" if profile.portable else capability()
    return {
        "library": maker.package,
        "runtime": maker.runtime,
        "version": maker.version,
        "gpu": here,
        "batch": [profile.low, profile.high],
        "profiles": _ranges(maker, profile),
        "refit": profile.refit,
    }


def _ranges(maker: Library, profile: Profile) -> list[list[int]]:
    whole = maker.builder == "torch_tensorrt"  # it is told one range alone
    return [[profile.low, profile.high]] if whole else profile.ranges


def capability() -> str:
    """The compute capability of the GPU here, as `9.0`."""
    return ".".join(map(str, torch.cuda.get_device_capability()))


# ---- by the ONNX parser of the library


def _from_onnx(source: Source, profile: Profile, maker: Library) -> Made:
    trt = importlib.import_module(maker.builder)
    said = log(trt)
    builder = trt.Builder(said)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, said)
    if not parser.parse_from_file(str(source.onnx)):
        raise ExportError(_none(source, parser.get_error(0).desc().partition("\n")[0]))
    described = _described(network)
    ranged, whole = profile.ranges, [[profile.low, profile.high]]
    # some convolutions have no engine for one size alone
    for ranges in [ranged, whole] if ranged != whole else [whole]:
        config = _config(trt, builder, described["inputs"], profile, ranges)
        data = builder.build_serialized_network(network, config)
        if data is not None:
            return bytes(data), {**described, "profiles": ranges}
    raise ExportError(_none(source, said.first()))


def _config(trt: ModuleType, builder, inputs: Tensors, profile: Profile, ranges: Iterable):
    """How a network becomes an engine: its batches, and the GPU. Not REQUIRE_USER_ALLOCATION: with
    it TensorRT-RTX 1.4 reads a null pointer in the first call of a range of batches."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if profile.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if not profile.portable:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
    for sizes in ranges:
        shapes = builder.create_optimization_profile()
        for name, (_, dims) in inputs.items():
            low, high = (sized(dims, size) for size in sizes)
            shapes.set_shape(name, low, high, high)
        config.add_optimization_profile(shapes)
    return config


def _described(network) -> dict[str, object]:
    """Inputs, outputs and layers of a parsed network, layers counted by kind and precision."""
    layers = (network.get_layer(i) for i in range(network.num_layers))
    kinds = Counter(f"{it.type.name.lower()} {_precision(it)}".strip() for it in layers)
    return {
        "inputs": _tensors(network.get_input(i) for i in range(network.num_inputs)),
        "outputs": _tensors(network.get_output(i) for i in range(network.num_outputs)),
        "layers": dict(sorted(kinds.items())),
    }


def _tensors(tensors: Iterable) -> Tensors:
    return {
        it.name: (TYPES[it.dtype.name], [BATCH if d < 0 else d for d in it.shape]) for it in tensors
    }


def _precision(layer) -> str:
    return TYPES[layer.get_output(0).dtype.name] if layer.num_outputs else ""


# ---- by Torch-TensorRT: not run by us, as these packages fetch their libraries when installed


def _from_program(source: Source, profile: Profile, maker: Library) -> Made:
    compiler = importlib.import_module(maker.builder)
    program = source.program()
    inputs = _inputs(program)
    try:
        data = compiler.dynamo.convert_exported_program_to_serialized_trt_engine(
            program,
            kwarg_inputs={n: _input(compiler, *it, profile) for n, it in inputs.items()},
            immutable_weights=not profile.refit,
            hardware_compatible=profile.portable,
        )
    except Exception as cause:  # whatever it is, the library has told it in its log
        raise ExportError(_none(source, reason(cause))) from cause
    return bytes(data), {"inputs": inputs}


def _inputs(program: torch.export.ExportedProgram) -> Tensors:
    """Types and shapes of what a traced program takes."""
    wanted = set(program.graph_signature.user_inputs)
    nodes = {n.name: n.meta["val"] for n in program.graph.nodes if n.name in wanted}
    return {
        name: (_name(it.dtype), [d if isinstance(d, int) else BATCH for d in it.shape])
        for name, it in nodes.items()
    }


def _input(compiler: ModuleType, kind: str, dims: list, profile: Profile):
    low, high = (sized(dims, b) for b in (profile.low, profile.high))
    return compiler.Input(min_shape=low, opt_shape=high, max_shape=high, dtype=getattr(torch, kind))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- what both need


def _none(source: Source, why: str) -> str:
    return f"`{source.name}` has no engine ({why}): export to another target, such as `onnx`"


def sized(dims: Iterable, batch: int) -> tuple[int, ...]:
    """Dimensions with the batch put in."""
    return tuple(batch if d == BATCH else d for d in dims)


def refitted(old: Engine, source: Source) -> tuple[bytes | None, str]:
    """An engine with the weights of a piece, or None and why the library gives none."""
    trt = importlib.import_module(old.about["runtime"])
    said = log(trt)
    engine = trt.Runtime(said).deserialize_cuda_engine(old.data)
    if engine is None:
        return None, said.first()
    refitter = trt.Refitter(engine, said)
    parser = trt.OnnxParserRefitter(refitter, said)
    if not (parser.refit_from_file(str(source.onnx)) and refitter.refit_cuda_engine()):
        return None, said.first()
    return bytes(engine.serialize()), ""
