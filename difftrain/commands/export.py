"""`export`: a run as files that sample without difftrain."""

from __future__ import annotations

import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path

from difftrain.commands.console import complain
from difftrain.commands.failure import CLEAN
from difftrain.commands.paths import settings


def export(args: Namespace) -> int:
    """Writes what the target asks for, once it is known to sample as the run does."""
    from difftrain.export.opened import opened

    changes = settings(args.settings)
    made = import_module(f"difftrain.export.{args.to}")
    with opened(args.run, args.to, changes, args.weights, complain) as run:
        out = Path(args.output or f"{run.bundle.name}-{args.to}")
        print(made.export(run, out, say))
    return CLEAN


def say(line: str) -> None:
    print(line, file=sys.stderr)
