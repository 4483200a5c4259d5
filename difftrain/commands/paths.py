"""From arguments to files, settings and checked specs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from difftrain.commands.console import complain
from difftrain.commands.failure import USAGE, Failure
from difftrain.language.check import SYNTAX, check, need
from difftrain.language.finding import Finding, SpecError
from difftrain.language.spec import Spec, read_text

RUNS = ("compile", "train")  # they load what the spec names, so pretrained folders are read


WRITTEN = ("manifest.json", "step.py")  # what a run's folder holds beside its spec


def specs(paths: Sequence[str]) -> list[str]:
    """The `.diff` files that the arguments mean: files as they are, folders with all below them."""
    files = [file for path in paths or ["."] for file in _below(path)]
    return list(dict.fromkeys(files))


def _below(path: str) -> list[str]:
    if not Path(path).is_dir():
        with open(path, "rb"):  # a missing file is told before any work is done
            return [path]
    found = sorted(p for p in Path(path).rglob("*.diff") if p.is_file() and not _hidden(p, path))
    if not found:
        raise Failure(f"there is no `.diff` file in `{path}`", USAGE)
    return [str(p) for p in found]


def _hidden(file: Path, root: str) -> bool:
    """Whether a file is in a hidden folder, or in one that training wrote."""
    inside = file.relative_to(root)
    folders = [Path(root) / folder for folder in inside.parents if folder.parts]
    written = any(all((at / name).is_file() for name in WRITTEN) for at in folders)
    return written or any(part.startswith(".") for part in inside.parts)


def one_spec(path: str) -> str:
    """The file that an argument means where a command takes one spec."""
    found = specs([path])
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"`{f}`" for f in found[:5]) + (", ..." if len(found) > 5 else "")
    raise Failure(f"`{path}` holds {len(found)} specs, and one is needed: {listed}", USAGE)


def settings(pairs: Sequence[str]) -> dict[str, str]:
    """`["gamma=3"]` as `{"gamma": "3"}`."""
    result = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise Failure(f"`--set {pair}` sets nothing: write `--set name=value`", USAGE)
        result[name.strip()] = value.strip()
    return result


def read(path: str, changes: dict[str, str], command: str = "") -> Spec:
    """The checked spec of a file, with every block that the command needs; what is only doubtful is
    told. Raises SpecError."""
    spec, found = check(read_text(path), changes)
    if not any(f.code < SYNTAX for f in found):  # else the block may be there, but broken
        found = [*found, *need(spec, command)]
    if command in RUNS and not _wrong(found):
        from difftrain.training.pretrained import disagreements

        found += disagreements(spec)
    if _wrong(found):
        raise SpecError(found)
    complain(found)
    return spec


def _wrong(found: list[Finding]) -> bool:
    return any(f.severity == "error" for f in found)
