"""Run folders: where a run writes, and the checkpoint that it goes on from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import difftrain
from difftrain.compiler.texts import MANIFEST, SPEC, Texts, read, write
from difftrain.training.bundle import Bundle, open_bundle, spec_hash
from difftrain.training.state import CheckpointError, newest

HOME = Path("runs")
MADE = "averages"  # the folder of averages that were put together after training
FILES = (SPEC, "step.py", "estimates.py", "levels.py")  # what every run is made of
TOLD = ("name", "spec", "graph", "settings", "time", "guidance", "dropping", "forward", "baseline")
INSIDE = ("checkpoints", MADE)  # folders of a run whose files hold weights


class FolderError(Exception):
    """A folder that cannot be used as asked; the message says which one and what to do."""


def place(bundle: Bundle, resume: str, out: str | None) -> tuple[Path, Path | None, bool]:
    """The folder of a run, the checkpoint to go on from, and whether the folder is a new one;
    `resume` is "", "auto" or a path.

    A new run never gets a folder that holds something. Raises FolderError and CheckpointError.
    """
    checkpoint = None
    if resume == "auto":
        folder = Path(out) if out else _last(bundle.name)
        checkpoint = newest(folder)
    elif resume:
        checkpoint = checkpoint_at(Path(resume))
        folder = Path(out) if out else run_of(checkpoint) or _free(bundle.name)
    else:
        folder = Path(out) if out else _free(bundle.name)
    ours = _holds(folder, checkpoint) or (resume == "auto" and _belongs(folder, bundle))
    writable(folder)
    taken = _taken(folder)
    if taken and not ours:
        raise FolderError(f"`{folder}` is there already{_why_not(folder, resume)}")
    return folder, checkpoint, not taken


def begun(folder: Path, texts: Texts, new: bool) -> None:
    """Writes what a run is made of into its folder; of two runs for which it was `new` one gets it.
    Raises FolderError."""
    folder.mkdir(parents=True, exist_ok=True)
    if new:
        try:
            (folder / MANIFEST).open("x").close()
        except FileExistsError as problem:
            raise FolderError(
                f"another run began in `{folder}` meanwhile: give another folder"
            ) from problem
    write(texts, folder)


def _why_not(folder: Path, resume: str) -> str:
    """Why a run cannot be where something is."""
    if resume == "auto":
        return " and holds no run of this objective: give another folder"
    if not (folder / MANIFEST).is_file():
        return ", and a run has a folder of its own: give the name of another"
    return (
        ", and a new run never writes over an old one: give another folder, or go on with"
        " `--resume auto`"
    )


def free(path: Path, ours: Callable[[Path], bool], other: str) -> None:
    """Refuses a file that cannot be written, or that is none of those it may replace: empty, or
    `ours`; of any `other` it is said what it is. Raises FolderError."""
    if path.exists() and not (path.is_file() and (not path.stat().st_size or ours(path))):
        what = "is a folder" if path.is_dir() else f"is there already and {other}"
        raise FolderError(f"`{path}` {what}: give the name of another file")
    writable(path)


def writable(path: Path) -> None:
    """Refuses a place where nothing can be written, beside it or in it. Raises FolderError."""
    whole = path.absolute()
    home = next((above for above in whole.parents if above.exists()), whole)
    if not home.is_dir():
        raise FolderError(f"`{path}` lies in `{home}`, which is no folder: give another place")
    for folder in (home, whole) if whole.is_dir() else (home,):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise FolderError(
                f"nothing can be written in `{folder}`: give another place for `{path}`"
            )


def _taken(folder: Path) -> bool:
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))


def _holds(folder: Path, checkpoint: Path | None) -> bool:
    home = checkpoint and run_of(checkpoint)
    return home is not None and home.resolve() == folder.resolve()


def _belongs(folder: Path, bundle: Bundle) -> bool:
    """Whether a run of this objective began here, perhaps without reaching a checkpoint."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return False
    try:
        told = json.loads(manifest.read_text("utf-8"))
    except ValueError:  # a damaged one belongs to nobody
        return False
    return isinstance(told, dict) and told.get("graph") == bundle.manifest["graph"]


def _runs(name: str) -> list[Path]:
    found = HOME.iterdir() if HOME.is_dir() else ()
    return [p for p in found if re.fullmatch(rf"{re.escape(name)}(-\d+)?", p.name)]


def _free(name: str) -> Path:
    taken = {p.name for p in _runs(name)}
    number = 1
    while (title := name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return HOME / title


def _last(name: str) -> Path:
    """The folder of that name with the newest checkpoint, or the next free one."""
    found = {p: kept.stat().st_mtime for p in _runs(name) if (kept := newest(p))}
    return max(found, key=found.get, default=_free(name))


def checkpoint_at(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest of a run folder."""
    if not path.is_dir():
        return path
    checkpoint = newest(path)
    if checkpoint is None:
        raise CheckpointError(
            f"the folder `{path}` has no checkpoint: give one in which training saved some"
        )
    return checkpoint


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in."""
    return checkpoint.parent.parent if checkpoint.parent.name in INSIDE else None


def open_run(path: str) -> tuple[Bundle, Path]:
    """The bundle and the checkpoint that a run folder, or a checkpoint in one, stands for."""
    if not Path(path).exists():
        raise FolderError(f"there is no run `{path}`: give a folder that training wrote")
    checkpoint = checkpoint_at(Path(path))
    folder = run_of(checkpoint)
    if folder is None or not (folder / MANIFEST).is_file():
        raise FolderError(
            f"`{path}` is not in the folder of a run: give a folder that training wrote, or a"
            " checkpoint in it"
        )
    return _whole(folder), checkpoint


def _whole(folder: Path) -> Bundle:
    """The bundle in a run folder, if all of it is there. Raises FolderError."""
    bundle = open_bundle(read(folder))
    if lost := next((name for name in FILES if name not in bundle.texts), None):
        raise FolderError(
            f"the run `{folder}` has lost its `{lost}`: bring it back, or train again"
        )
    try:
        told = bundle.manifest
    except ValueError as problem:
        raise FolderError(
            f"the `{MANIFEST}` of the run `{folder}` is damaged: bring it back, or train again"
        ) from problem
    if lost := next((name for name in TOLD if name not in told), None):
        raise FolderError(
            f"the run `{folder}` is of difftrain {told.get('difftrain', 'of before')}, whose"
            f" `{MANIFEST}` says no `{lost}`, and this is {difftrain.__version__}: use that"
            " version, or train again"
        )
    if spec_hash(bundle.texts, told["settings"]) != told["spec"]:
        raise FolderError(
            f"the `{SPEC}` of the run `{folder}`, or a file that it uses, is not what was trained:"
            " bring it back, and change samples with `--set`"
        )
    return bundle
