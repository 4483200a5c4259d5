"""`compile`, `train` and `sample`: the commands that need torch, imported when they run."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from difftrain.commands.failure import CLEAN
from difftrain.commands.paths import one_spec, settings


def compile_spec(args: Namespace) -> int:
    """Writes one executable file that trains the spec."""
    from difftrain.compiler.executable import pack

    path = one_spec(args.spec)
    output = args.output or Path(path).stem
    pack(path, output, settings(args.settings))
    print(output)
    return CLEAN


def train(args: Namespace) -> int:
    """Trains the spec; the exit code is the run's."""
    from difftrain.training.run import train as run

    return run(one_spec(args.spec), settings(args.settings), args.data, args.steps, args.resume)


def sample(args: Namespace) -> int:
    """Samples from a run; the exit code is the run's."""
    from difftrain.training.run import sample as run

    return run(args.run, settings(args.settings), args.output)
