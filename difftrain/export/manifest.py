"""The folder of an export: its files appear together or not at all, with a manifest beside them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import difftrain
from difftrain.compiler.texts import versions
from difftrain.export.card import NORMAL, card
from difftrain.export.errors import ExportError
from difftrain.export.modules import Piece
from difftrain.export.opened import Opened
from difftrain.export.parity import Report
from difftrain.training.folder import writable
from difftrain.training.samples import written

FILE, README = "manifest.json", "README.md"


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder beside the wanted one, which takes its place when all went well. Raises
    ExportError, and FolderError where nothing can be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"`{folder}` is there already: say with `-o` where the folder goes")
    writable(folder)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    beside.mkdir(parents=True)
    try:
        yield beside
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def describe(
    run: Opened, target: str, batch: tuple[int, int], made: Mapping[str, Piece], report: Report
) -> dict[str, object]:
    """What an export says of itself: what it was made from, what its files take and give, how far
    it is from the run, and the table for a loop around `step`."""
    manifest = run.bundle.manifest
    return {
        "name": run.bundle.name,
        "target": target,
        "spec": manifest["spec"],
        "graph": manifest["graph"],
        "step": run.model.step,
        "versions": {"difftrain": difftrain.__version__, **versions()},
        "precision": run.target["precision"],
        "batch": list(batch),
        "latents": list(run.shape),
        "size": None if run.arrays else run.data["size"],
        "condition": condition(run),
        "noise": NORMAL if run.model.programs.noise is None else "of a law of its own",
        "guidance": run.sampling["guidance"],
        "solver": written(run.sampling["solver"]),
        "seed": run.sampling["seed"],
        "errors": asdict(report),
        "pieces": {name: signature(piece) for name, piece in made.items()},
        "table": tabled(run),
    }


def condition(run: Opened) -> dict[str, object] | None:
    """What a sample is conditioned on: ids and their length, labels and how many, or nothing."""
    text = run.parts.text
    if text is None:
        return None
    kind = "label" if hasattr(text, "classes") else "text"
    null = run.parts.null_ids("cpu")[0].tolist()
    return {"kind": kind, "length": text.length, "null": null, "vocabulary": len(text.vocabulary)}


def signature(piece: Piece) -> dict[str, object]:
    """The inputs of a piece, with `batch` for the dimension that varies, and its outputs."""
    inputs = {}
    for name, value in piece.inputs.items():
        shape = list(value.shape)
        if name in piece.batch:
            shape[piece.batch[name]] = "batch"
        inputs[name] = {"type": str(value.dtype).removeprefix("torch."), "shape": shape}
    return {"inputs": inputs, "outputs": list(piece.outputs)}


def tabled(run: Opened) -> dict[str, object]:
    """The table of the solver: `start` and `noise` are [weight, draw]; `weights` follow
    `columns`."""
    table = run.table
    rows = [
        {"t": r.t, "r": r.r, "weights": table.weights(r), "draw": r.noise and r.noise.draw}
        for r in table.rows
    ]
    start = [[n.weight, n.draw] for n in table.start]
    time = "index" if table.whole else "real"
    return {
        "time": time,
        "start": start,
        "kept": list(table.kept),
        "draws": list(table.draws),
        "columns": list(table.columns()),
        "rows": rows,
    }


def write(folder: Path, about: Mapping[str, object], made: Mapping[str, Piece]) -> None:
    """Writes the manifest, and how the files beside it are asked."""
    (folder / README).write_text(card(about, made), encoding="utf-8")
    (folder / FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
