"""One executable file: a zip that Python runs, with the bundle and the training runtime in it.

    #!/usr/bin/env python3
    __main__.py   bundle/spec.diff, manifest.json, step.py, …   difftrain/   compiled/…

It needs the declared packages and no checkout. `compiled/` holds what torch made of the step on the
machines it was compiled on, each beside a page that says for which machine and shapes, with its
sha256: see `compiler.kept`. Everything else is text, pictures and safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from difftrain.shipped import folder

SHEBANG = b"#!/usr/bin/env python3\n"
BUNDLE, COMPILED = "bundle/", "compiled/"
MAIN = """\
import sys

if sys.version_info < (3, 11):
    print("error: this needs Python 3.11 or later, and here is", sys.version, file=sys.stderr)
    sys.exit(3)

try:
    from LAUNCHER import main
except ModuleNotFoundError as it:
    print(f"error: `{it.name}` is not installed here: install it and try again", file=sys.stderr)
    sys.exit(3)

sys.exit(main(sys.argv))
"""
LEFT_OUT = ("__pycache__",)
FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # the same inputs give the same bytes


def started_by(launcher: str) -> bytes:
    """The `__main__.py` of an archive that hands its arguments to this module."""
    return MAIN.replace("LAUNCHER", launcher).encode()


class Damaged(Exception):
    """An executable that is not what was written."""


def pack(texts: Mapping[str, str], path: str | Path) -> Path:
    """Writes the executable; it appears whole or not at all."""
    return replaced(Path(path), lambda partial: _write(partial, texts))


def replaced(path: Path, write: Callable[[Path], object]) -> Path:
    """The executable file that `write` writes; the old one is there until the new one is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(partial)
        mode = partial.stat().st_mode
        partial.chmod(mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _write(path: Path, texts: Mapping[str, str]) -> None:
    with path.open("wb") as out:
        out.write(SHEBANG)
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            _add(archive, "__main__.py", started_by("difftrain.commands.launch"))
            for name, text in sorted(texts.items()):
                _add(archive, BUNDLE + name, text.encode())
            for name, data in runtime().items():
                _add(archive, name, data)


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, FIXED_TIME), data, zipfile.ZIP_DEFLATED)


def runtime() -> dict[str, bytes]:
    """The package's files by their places in the zip: code, grammar, library, pictures, codec."""
    places = {
        "difftrain": files("difftrain"),
        "difftrain/grammars": folder("grammars"),
        "difftrain/specs": folder("specs"),
    }
    return {n: item.read_bytes() for at, root in places.items() for n, item in _walk(root, at)}


def _walk(root: Traversable, where: str) -> Iterator[tuple[str, Traversable]]:
    for item in sorted(root.iterdir(), key=lambda i: i.name):
        if item.name in LEFT_OUT:
            continue
        if item.is_dir():
            yield from _walk(item, f"{where}/{item.name}")
        else:
            yield f"{where}/{item.name}", item


def unpack(path: str | Path) -> dict[str, str]:
    """The texts of the bundle in an executable. Raises OSError, zipfile.BadZipFile or Damaged."""
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.startswith(BUNDLE)]
        return {n.removeprefix(BUNDLE): _read(archive, n).decode() for n in names}


def holds(path: str | Path, text: str) -> bool:
    """Whether an executable has a text of this name. Raises OSError or zipfile.BadZipFile."""
    with zipfile.ZipFile(path) as archive:
        return BUNDLE + text in archive.namelist()


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    """What lies in an executable under a name. Raises Damaged, and KeyError where nothing does."""
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError) as cause:
        raise Damaged(
            f"`{name}` in `{archive.filename}` is not what was written there: compile the spec"
            " again"
        ) from cause


# ---- compiled steps


@dataclass(frozen=True)
class Shelf:
    """The compiled steps in an executable, each by the facts that it is only good for."""

    path: Path

    def pages(self) -> list[dict]:
        """The facts of each, with `sha256` and `bytes`."""
        with zipfile.ZipFile(self.path) as archive:
            names = [n for n in archive.namelist() if n.startswith(COMPILED)]
            return [json.loads(_read(archive, n)) for n in names if n.endswith(".json")]

    def has(self, facts: Mapping) -> bool:
        with zipfile.ZipFile(self.path) as archive:
            return f"{place(facts)}.json" in archive.namelist()

    def take(self, facts: Mapping) -> bytes:
        """The compiled step for these facts. Raises Damaged, and KeyError where there is none."""
        name = place(facts)
        with zipfile.ZipFile(self.path) as archive:
            page = json.loads(_read(archive, f"{name}.json"))
            data = _read(archive, f"{name}.step")
        if sha256(data).hexdigest() != page["sha256"]:
            raise Damaged(
                f"the compiled step in `{self.path}` is not what was written there:"
                " compile the spec again"
            )
        return data

    def put(self, facts: Mapping, data: bytes) -> None:
        """Adds a compiled step. What was in the file keeps its place there: the program that runs
        out of it still reads it."""
        page = {**facts, "sha256": sha256(data).hexdigest(), "bytes": len(data)}

        def write(partial: Path) -> None:
            shutil.copyfile(self.path, partial)
            with zipfile.ZipFile(partial, "a") as archive:
                _add(archive, f"{place(facts)}.step", data)
                _add(archive, f"{place(facts)}.json", json.dumps(page, indent=2).encode())

        replaced(self.path, write)


def place(facts: Mapping) -> str:
    """Where the compiled step for these facts lies, without an ending."""
    return COMPILED + sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
