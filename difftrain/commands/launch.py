"""What an executable does: train the spec that it was compiled from, or tell about itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from difftrain.cli import TRAINING, Option, arg, guarded, parse
from difftrain.commands.failure import CLEAN
from difftrain.commands.paths import settings
from difftrain.compiler import texts
from difftrain.compiler.executable import Shelf, unpack
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
STORE = arg(
    "--store", action="store_true", help="keep the step in this file as it is compiled here"
)
OPTIONS: tuple[Option, ...] = (*TRAINING, SET, STORE, INSPECT)


def main(argv: list[str]) -> int:
    """The exit code of an executable called as `argv`: its own path, and arguments."""
    return guarded(lambda: _launch(Path(argv[0]), argv[1:]))


def _launch(file: Path, argv: list[str]) -> int:
    args = parse(file.name, SUMMARY, OPTIONS, argv)
    if args is None:
        return CLEAN
    files, changes = unpack(file), settings(args.settings)
    if args.inspect:
        print(inspect(files, changes, Shelf(file)), end="")
        return CLEAN
    return _train(files, changes, args, Shelf(file))


def _train(files: Mapping[str, str], changes: dict[str, str], args, shelf: Shelf) -> int:
    from difftrain.training.bundle import open_bundle
    from difftrain.training.folder import writable
    from difftrain.training.keeping import Keeping
    from difftrain.training.run import run
    from difftrain.training.session import say

    bundle = open_bundle(files)
    if changed := texts.differences(bundle.manifest):
        say(changed)
    if args.store:
        writable(shelf.path)
    return run(
        bundle,
        changes,
        data=args.data,
        steps=args.steps,
        resume=args.resume,
        out=args.out,
        keeping=Keeping(shelf, args.store),
    )


def inspect(files: Mapping[str, str], changes: Mapping[str, str], shelf: Shelf) -> str:
    """Manifest, compiled steps, equations and source, without starting anything. Raises
    SpecError."""
    page = explain(texts.read_spec(files, changes))
    compiled = json.dumps({"compiled": shelf.pages()}, indent=2)
    return f"{files[texts.MANIFEST]}{compiled}\n\n{page}\n{files['step.py']}"
