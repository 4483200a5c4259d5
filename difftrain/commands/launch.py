"""What an executable does: train the spec that it was compiled from, or tell about itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from difftrain.cli import TRAINING, Option, arg, guarded, parse
from difftrain.commands.failure import CLEAN
from difftrain.commands.paths import settings
from difftrain.compiler import texts
from difftrain.compiler.executable import unpack
from difftrain.language.explain import explain

SUMMARY = "train the spec that this file was compiled from"
SET = arg(
    "--set",
    action="append",
    default=[],
    metavar="NAME=VALUE",
    dest="settings",
    help="an option that leaves the compiled step as it is: `sample.guidance=3`",
)
INSPECT = arg("--inspect", action="store_true", help="print manifest, equations and source")
OPTIONS: tuple[Option, ...] = (*TRAINING, SET, INSPECT)


def main(argv: list[str]) -> int:
    """The exit code of an executable called as `argv`: its own path, and arguments."""
    return guarded(lambda: _launch(Path(argv[0]), argv[1:]))


def _launch(file: Path, argv: list[str]) -> int:
    args = parse(file.name, SUMMARY, OPTIONS, argv)
    if args is None:
        return CLEAN
    files, changes = unpack(file), settings(args.settings)
    if args.inspect:
        print(inspect(files, changes), end="")
        return CLEAN
    return _train(files, changes, args)


def _train(files: Mapping[str, str], changes: dict[str, str], args) -> int:
    from difftrain.training.bundle import open_bundle
    from difftrain.training.run import run, say

    bundle = open_bundle(files)
    if changed := texts.differences(bundle.manifest):
        say(changed)
    return run(bundle, changes, data=args.data, steps=args.steps, resume=args.resume, out=args.out)


def inspect(files: Mapping[str, str], changes: Mapping[str, str]) -> str:
    """Manifest, equations and source, without starting anything. Raises SpecError."""
    page = explain(texts.read_spec(files, changes))
    return f"{files[texts.MANIFEST]}\n{page}\n{files['step.py']}"
