"""A run as ONNX files, held against the run with onnxruntime before they are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from difftrain.export import manifest
from difftrain.export.errors import ExportError
from difftrain.export.modules import Piece, pieces
from difftrain.export.opened import Opened
from difftrain.export.parity import Call, bare, gate
from difftrain.export.trace import BATCH, batches, quiet, traced
from difftrain.models.foreign import reason

OPSET = 20
PROVIDERS = ["CPUExecutionProvider"]
ABSENT = ("bf16",)  # precisions without kernels there
ALONE = 1 << 30  # bytes of weights in the file itself, at most: protobuf ends at 2 GiB


def export(run: Opened, folder: Path, say: Callable[[str], object] = print) -> Path:
    """Writes text.onnx, backbone.onnx, sampler.onnx or step.onnx, decode.onnx and manifest.json.
    Raises ExportError, and leaves nothing then."""
    precision, batch = run.target["precision"], run.batch
    with manifest.staged(folder) as beside:
        made = pieces(run, precision)
        files = write(made, beside, batch)
        say(f"wrote {', '.join(file.name for file in files.values())}")
        if precision in ABSENT:
            say(
                f"onnxruntime has no {precision} on the CPU: the traced modules are held to the run"
            )
        call = bare(made) if precision in ABSENT else sessions(made, files, run.device)
        report = gate(run, made, call, precision)
        say(str(report))
        manifest.write(beside, manifest.describe(run, "onnx", batch, made, report))
    return folder


def write(made: Mapping[str, Piece], folder: Path, batch: tuple[int, int]) -> dict[str, Path]:
    """The ONNX file of every piece, for batches from the one size to the other; the dimension is
    called `batch`. Raises ExportError."""
    return {n: _written(n, piece, folder, batches(n, batch)) for n, piece in made.items()}


def _written(name: str, piece: Piece, folder: Path, batch: tuple[int, int]) -> Path:
    program, path = traced(name, piece, batch), folder / f"{name}.onnx"
    varies = batch[0] < batch[1]
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
    made.save(path, external_data=_size(piece) > ALONE)
    return path


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
