"""One executable file: a zip that Python runs, with the bundle and the training runtime in it.

    #!/usr/bin/env python3
    __main__.py   bundle/spec.diff, manifest.json, step.py, …   difftrain/

It needs the declared packages and no checkout. Nothing in it is a pickle.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from importlib.resources.abc import Traversable
from pathlib import Path

from difftrain.shipped import folder

SHEBANG = b"#!/usr/bin/env python3\n"
BUNDLE = "bundle/"
MAIN = """\
import sys

from difftrain.launch import main

sys.exit(main())
"""
LEFT_OUT = ("__pycache__",)
FIXED_TIME = (1980, 1, 1, 0, 0, 0)  # the same inputs give the same bytes


def pack(files: Mapping[str, str], path: str | Path) -> Path:
    """Writes the executable; it appears whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as out:
        out.write(SHEBANG)
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            _add(archive, "__main__.py", MAIN.encode())
            for name, text in sorted(files.items()):
                _add(archive, BUNDLE + name, text.encode())
            for name, data in runtime():
                _add(archive, name, data)
    mode = partial.stat().st_mode
    partial.chmod(mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    os.replace(partial, path)
    return path


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, FIXED_TIME), data, zipfile.ZIP_DEFLATED)


def runtime() -> Iterator[tuple[str, bytes]]:
    """The package's files, with the grammar and the library where a wheel has them."""
    from importlib.resources import files

    seen = set()
    for root, where in (
        (files("difftrain"), "difftrain"),
        (folder("grammars"), "difftrain/grammars"),
        (folder("specs"), "difftrain/specs"),
    ):
        for name, item in _walk(root, where):
            if name not in seen:
                seen.add(name)
                yield name, item.read_bytes()


def _walk(root: Traversable, where: str) -> Iterator[tuple[str, Traversable]]:
    for item in sorted(root.iterdir(), key=lambda i: i.name):
        if item.name in LEFT_OUT:
            continue
        if item.is_dir():
            yield from _walk(item, f"{where}/{item.name}")
        else:
            yield f"{where}/{item.name}", item


def unpack(path: str | Path) -> dict[str, str]:
    """The texts of the bundle in an executable. Raises OSError or zipfile.BadZipFile."""
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.startswith(BUNDLE)]
        return {n.removeprefix(BUNDLE): archive.read(n).decode() for n in names}
