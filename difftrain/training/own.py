"""A spec's own Python: the files beside it that its parts are built by travel with the bundle.

They are read as text when a spec is compiled, and imported only while its parts are built.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib import invalidate_caches
from pathlib import Path
from tempfile import TemporaryDirectory

from difftrain.compiler.texts import PARTS, Texts, write
from difftrain.language.names import Names
from difftrain.language.part import Part
from difftrain.language.spec import Objective
from difftrain.language.tree import Define, Text
from difftrain.models.errors import PartError


def sources(objective: Objective, home: Path, names: Names) -> dict[str, str]:
    """The Python files in the folder `home` that the parts of an objective and the solvers among
    `names` need, by their places in a bundle: what they name, and what these files import."""
    waiting, files = _named(_parts(objective)) | set(_solvers(names)), {}
    seen: set[str] = set()
    while waiting := waiting - seen:
        seen |= waiting
        found = {path: _read(path) for name in sorted(waiting) for path in _files(home, name)}
        waiting = {name for path, text in found.items() for name in _imports(path, text)}
        files |= found
    return {PARTS + path.relative_to(home).as_posix(): text for path, text in files.items()}


def _parts(objective: Objective) -> Iterator[object]:
    """What an objective declares that may be a part."""
    while objective is not None:
        yield objective.vision
        yield objective.backbone and objective.backbone.part
        objective = objective.teacher


def _solvers(names: Names) -> Iterator[str]:
    """The outermost module of every solver that a file or what it imports takes from Python."""
    if names.shipped:
        return
    own = [d.node for (kind, _), d in names.own.items() if kind == "solver"]
    for node in (s for block in own for s in block.body):
        if isinstance(node, Define) and node.name == "module" and isinstance(node.value, Text):
            yield node.value.value.partition(":")[0].partition(".")[0]
    for space in names.spaces.values():
        yield from _solvers(space)


def _named(values: Iterable[object]) -> set[str]:
    """The outermost module of every `package.module:function` in values and what is inside."""
    names: set[str] = set()
    for value in values:
        match value:
            case Part(module=module, options=options):
                names |= {module.partition(".")[0].partition(":")[0]} if ":" in module else set()
                names |= _named(options.values())
            case tuple():
                names |= _named(value)
    return names


def _files(home: Path, name: str) -> list[Path]:
    """The files of a module or package beside the spec; none where it is installed."""
    alone = home / f"{name}.py"
    return [alone] if alone.is_file() else sorted((home / name).rglob("*.py"))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _imports(path: Path, text: str) -> set[str]:
    """The outermost names that a file imports."""
    try:
        tree = ast.parse(text)
    except SyntaxError as cause:
        raise PartError(
            f"`{path}` line {cause.lineno} is not Python ({cause.msg}): mend that file"
        ) from cause
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                names |= {alias.name.partition(".")[0] for alias in aliases}
            case ast.ImportFrom(module=str(module), level=0):
                names.add(module.partition(".")[0])
    return names


@contextmanager
def importable(texts: Texts) -> Iterator[None]:
    """Inside, the Python files of a bundle can be imported; nothing of it stays behind."""
    own = {n.removeprefix(PARTS): t for n, t in texts.items() if n.startswith(PARTS)}
    if not own:
        yield
        return
    folder = _home(tuple(own.items())).name
    heads = {name.partition("/")[0].removesuffix(".py") for name in own}
    before = _without(heads)
    sys.path.insert(0, folder)
    invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)
        _without(heads)
        sys.modules.update(before)


@lru_cache
def _home(files: tuple[tuple[str, str], ...]) -> TemporaryDirectory:
    """A folder with these files; it stays as long as the process, for whoever reads a traceback."""
    folder = TemporaryDirectory()
    write(dict(files), Path(folder.name))
    return folder


def _without(heads: set[str]) -> Mapping[str, object]:
    """Takes modules of these names, and all below them, out of the loaded ones."""
    names = [name for name in sys.modules if name.partition(".")[0] in heads]
    return {name: sys.modules.pop(name) for name in names}
