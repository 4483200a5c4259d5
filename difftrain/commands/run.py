"""`compile`, `train` and `sample`: the commands that need torch, imported when they run."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from difftrain.commands.failure import CLEAN
from difftrain.commands.paths import one_spec, read, settings


def compile_spec(args: Namespace) -> int:
    """Writes one executable file that trains the spec."""
    path, changes = one_spec(args.spec), settings(args.settings)
    read(path, changes, "compile")  # what is wrong is told before torch is imported
    from difftrain.compiler.executable import pack
    from difftrain.training.bundle import compile_spec as bundle

    files = bundle(path, changes).files()
    print(pack(files, args.output or Path(path).stem))
    return CLEAN


def train(args: Namespace) -> int:
    """Trains the spec; the exit code is the run's."""
    path, changes = one_spec(args.spec), settings(args.settings)
    read(path, changes, "train")
    from difftrain.training.run import train as run

    return run(path, changes, data=args.data, steps=args.steps, resume=args.resume, out=args.output)


def sample(args: Namespace) -> int:
    """Samples from a run; the exit code is the run's."""
    from difftrain.training.run import sample as run

    return run(args.run, settings(args.settings), out=args.output)
