"""The texts that a compiled spec is kept as, by file name: in an executable and in a run folder.

    spec.diff, imports/…   what was compiled, and every file of the user's that it imports
    parts/….py             the user's own Python, where parts are built by it
    manifest.json          names, hashes, versions, settings, shapes
    step.py, …, graph.txt  what was emitted

Nothing here needs torch.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from difftrain.language.check import check
from difftrain.language.finding import SpecError
from difftrain.language.names import Names
from difftrain.language.spec import Spec, read_text
from difftrain.language.tree import Source

SPEC, MANIFEST, IMPORTS, PARTS = "spec.diff", "manifest.json", "imports/", "parts/"
PACKAGES = ("torch", "diffusers", "transformers")
KEPT = (SPEC, MANIFEST, "*.py", "*.txt", f"{IMPORTS}**/*.diff", f"{PARTS}**/*.py")

Texts = Mapping[str, str]


def checked(source: Source, settings: Mapping | None = None) -> Spec:
    """The spec of a source. Raises SpecError where it has errors."""
    spec, found = check(source, settings)
    if any(f.severity == "error" for f in found):
        raise SpecError(found)
    return spec


def read_spec(texts: Texts, settings: Mapping | None = None) -> Spec:
    """The spec as it was compiled, and further settings on top. Raises SpecError."""
    manifest = json.loads(texts[MANIFEST])
    every = {**manifest["settings"], **(settings or {})}
    imports = {n: t for n, t in texts.items() if n.startswith(IMPORTS)}
    name = f"{manifest['name']}.diff"
    if not imports:
        return checked(Source(name, texts[SPEC]), every)
    with TemporaryDirectory() as home:  # imports are looked for beside the file
        write({n.removeprefix(IMPORTS): t for n, t in imports.items()}, Path(home))
        return checked(Source(str(Path(home, name)), texts[SPEC]), every)


def imported(names: Names, home: Path) -> dict[str, str]:
    """Every file below the folder `home` that a spec or one of its imports imports."""
    found = {}
    for space in names.spaces.values():
        if not space.shipped:
            where = Path(space.path).relative_to(home).as_posix()
            found |= {IMPORTS + where: read_text(space.path).text, **imported(space, home)}
    return found


def write(texts: Texts, folder: Path) -> None:
    """Writes each text to its place in a folder."""
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def read(folder: Path) -> dict[str, str]:
    """The texts that `write` left in a folder."""
    files = [path for pattern in KEPT for path in folder.glob(pattern)]
    return {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in files}


def versions() -> dict[str, str]:
    """Python's version and those of the packages that a run depends on. Raises
    ModuleNotFoundError."""
    numbers = {package: version(package).partition("+")[0] for package in PACKAGES}
    return {"python": platform.python_version(), **numbers}


def differences(manifest: Mapping) -> str:
    """One line on what is not as it was when the manifest was written; empty if all is."""
    here, then = versions(), manifest["versions"]
    changed = [f"{n} {here[n]} instead of {then[n]}" for n in here if here[n] != then[n]]
    return (
        f"this machine is not the one of the compilation: {', '.join(changed)}" if changed else ""
    )
