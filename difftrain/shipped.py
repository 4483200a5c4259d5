"""Where the files that come with the package lie: grammars, specs, data."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path


def folder(name: str) -> Traversable:
    """The folder `name`: inside the package when installed or zipped, beside it in a checkout."""
    package = files("difftrain")
    inside = package.joinpath(name)
    if inside.is_dir() or not isinstance(package, Path):
        return inside
    return package.parent / name
