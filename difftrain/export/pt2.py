"""A run as packages of AOTInductor, for machines with torch alone: compiled ahead, for this kind of
device, and held against the run before they are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from difftrain.compiler import lowering
from difftrain.export import manifest
from difftrain.export.errors import ExportError
from difftrain.export.modules import Piece, pieces
from difftrain.export.opened import Opened
from difftrain.export.parity import Call, gate
from difftrain.export.trace import batches, quiet, traced
from difftrain.models.foreign import reason

Say = Callable[[str], object]


def export(run: Opened, folder: Path, say: Say = print) -> Path:
    """Writes text.pt2, backbone.pt2, sampler.pt2 or step.pt2, decode.pt2 and manifest.json. Raises
    ExportError, and leaves nothing then."""
    if lowering.cxx() is None:
        raise lowering.NoCompiler(
            "packages are compiled, and there is no C++ compiler on this machine: install one, such"
            " as g++, or export to `onnx`"
        )
    precision = run.target["precision"]
    with manifest.staged(folder) as beside:
        made = pieces(run, precision, run.device)
        files = {name: write(name, piece, beside, run.batch, say) for name, piece in made.items()}
        say(f"wrote {', '.join(file.name for file in files.values())}")
        report = gate(run, made, packages(made, files), precision)
        say(str(report))
        about = manifest.describe(run, "pt2", run.batch, made, report)
        manifest.write(beside, about | {"device": run.device.type}, made)
    return folder


@torch.no_grad()
def write(name: str, piece: Piece, folder: Path, batch: tuple[int, int], say: Say) -> Path:
    """The package of a piece, for batches from the one size to the other. Raises ExportError."""
    say(f"tracing `{name}`")
    program, path = traced(name, piece, batches(name, batch)), folder / f"{name}.pt2"
    say(f"compiling `{name}`")
    try:
        with quiet():
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as cause:  # a compiler may fail in any way
        raise ExportError(
            f"`{name}` cannot be compiled ({reason(cause)}): export to another target, such as"
            " `onnx`"
        ) from cause
    return path


def packages(made: Mapping[str, Piece], files: Mapping[str, Path]) -> Call:
    """The packages as functions."""
    loaded: dict[str, Callable] = {}

    def call(name: str, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if name not in loaded:
            loaded[name] = torch._inductor.aoti_load_package(str(files[name]))
        found = loaded[name](**{n: inputs[n] for n in made[name].inputs})
        return found if isinstance(found, tuple) else (found,)

    return call
