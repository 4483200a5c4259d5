"""A run as ONNX files, held against the run with onnxruntime before they are kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from difftrain.export import inlined, manifest
from difftrain.export.errors import ExportError
from difftrain.export.modules import Piece, pieces
from difftrain.export.opened import Opened
from difftrain.export.parity import Call, bare, gate
from difftrain.export.trace import BATCH, batches, quiet, traced
from difftrain.models.foreign import reason

OPSET = 20
PROVIDERS = ["CPUExecutionProvider"]
ABSENT = ("bf16",)  # precisions without kernels there
SOLVERS = ("sampler", "step")  # pieces around the backbone, which come right behind it
PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")
ALONE = 1 << 30  # bytes of weights in the file itself, at most: protobuf ends at 2 GiB


def export(run: Opened, folder: Path, say: Callable[[str], object] = print) -> Path:
    """Writes text.onnx, backbone.onnx, sampler.onnx or step.onnx, decode.onnx and manifest.json.
    Raises ExportError, and leaves nothing then."""
    needed()
    precision, batch = run.target["precision"], run.batch
    with manifest.staged(folder) as beside:
        made = pieces(run, precision)
        files = write(made, beside, batch, say)
        say(f"wrote {', '.join(file.name for file in files.values())}")
        if precision in ABSENT:
            say(
                f"onnxruntime has no {precision} on the CPU: the traced modules are held to the run"
            )
        call = bare(made) if precision in ABSENT else sessions(made, files, run.device)
        report = gate(run, made, call, precision)
        say(str(report))
        manifest.write(beside, manifest.describe(run, "onnx", batch, made, report), made)
    return folder


def needed() -> None:
    """Raises ModuleNotFoundError for a package that all of this needs, before any work."""
    for package in PACKAGES:
        import_module(package)


def write(
    made: Mapping[str, Piece],
    folder: Path,
    batch: tuple[int, int],
    say: Callable[[str], object],
    without: Collection[str] = (),
) -> dict[str, Path]:
    """The ONNX files of all pieces, but for those `without` one, for batches from the one size to
    the other; the dimension is called `batch`. Raises ExportError."""
    files, backbone = {}, None
    for name, piece in made.items():
        say(f"tracing `{name}`")
        own = inlined.closed(piece, made["backbone"]) if name in SOLVERS else piece
        program = _program(name, own, batches(name, batch))
        if name in SOLVERS:
            inlined.fill(program.model, backbone.model)
        if name not in without:
            files[name] = folder / f"{name}.onnx"
            program.save(files[name], external_data=_size(piece) > ALONE)
        backbone = program if name == "backbone" else None
    return files


def _program(name: str, piece: Piece, batch: tuple[int, int]) -> torch.onnx.ONNXProgram:
    program, varies = traced(name, piece, batch), batch[0] < batch[1]
    axes = {
        n: {piece.batch[n]: BATCH} if varies and n in piece.batch else None for n in piece.inputs
    }
    try:
        with quiet(), torch.no_grad():
            made = torch.onnx.export(
                program,
                input_names=list(piece.inputs),
                output_names=list(piece.outputs),
                dynamic_shapes=axes,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as cause:
        raise ExportError(
            f"`{name}` has no ONNX form ({reason(cause)}): export to `pt2`"
        ) from cause
    inlined.without_sources(made.model)
    return made


def _size(piece: Piece) -> int:
    tensors = piece.module.state_dict().values()
    return sum(t.numel() * t.element_size() for t in tensors)


def sessions(made: Mapping[str, Piece], files: Mapping[str, Path], device) -> Call:
    """The files as functions, by onnxruntime on the CPU. Raises ExportError for what it has not."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    opened: dict[str, onnxruntime.InferenceSession] = {}

    def call(name: str, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if name not in opened:
            opened[name] = onnxruntime.InferenceSession(files[name], options, PROVIDERS)
        values = {n: v.detach().cpu().numpy() for n, v in inputs.items()}
        found = opened[name].run(list(made[name].outputs), values)
        return tuple(torch.from_numpy(value).to(device) for value in found)

    return call
