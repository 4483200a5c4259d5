"""`compile`, `train` and `sample`: the commands that need torch, imported when they run."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from zipfile import BadZipFile

from difftrain.commands.console import complain
from difftrain.commands.failure import CLEAN, USAGE, Failure
from difftrain.commands.paths import one_spec, read, settings


def compile_spec(args: Namespace) -> int:
    """Writes one executable file that trains the spec."""
    path, changes = one_spec(args.spec), settings(args.settings)
    out = _elsewhere(args.output or Path(path).stem, path)
    read(path, changes, "compile")  # what is wrong is told before torch is imported
    from difftrain.compiler.executable import pack
    from difftrain.models.pretrained import Absent
    from difftrain.training.ahead import target
    from difftrain.training.bundle import compile_spec as compiled
    from difftrain.training.folder import free
    from difftrain.training.measure import measured

    free(out, _compiled, "is no executable that `difftrain compile` wrote")
    bundle = compiled(path, changes)
    device = target(args.target, bundle)
    try:
        bundle = measured(bundle)
    except Absent as problem:  # it may be there where the executable runs
        print(f"warning: {problem}; the manifest is without state and FLOPs", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    made = pack(bundle.texts, out)
    if device is not None:
        _ahead(bundle, device, made)
    print(made)
    return CLEAN


def _ahead(bundle, device, made: Path) -> None:
    """Adds the step as it is compiled for a device, where that can be done without the run."""
    from difftrain.compiler.executable import Shelf
    from difftrain.compiler.kept import NotKept
    from difftrain.compiler.lowering import NotCompiled
    from difftrain.training.ahead import compiled_for
    from difftrain.training.sources import DataError

    print("compiling the step", file=sys.stderr)
    try:
        facts, data = compiled_for(bundle, device)
    except (DataError, NotCompiled, NotKept) as problem:
        print(f"warning: {problem}; the step is not compiled ahead", file=sys.stderr)
        return
    Shelf(made).put(facts, data)
    told = f"the step is compiled for {facts['device']}: {len(data) / 1e6:.1f} MB"
    print(told, file=sys.stderr)


def _compiled(path: Path) -> bool:
    """Whether a file is an executable with a compiled spec."""
    from difftrain.compiler.executable import holds
    from difftrain.compiler.texts import MANIFEST

    try:
        return holds(path, MANIFEST)
    except BadZipFile:
        return False


def _elsewhere(out: str, spec: str) -> Path:
    """Where the executable goes: never over its own spec, or a folder."""
    if Path(out).is_dir():
        raise Failure(f"`{out}` is a folder: say with `-o` how to call the executable", USAGE)
    if Path(out).exists() and Path(out).samefile(spec):
        raise Failure(f"`{out}` is the spec itself: say with `-o` another file", USAGE)
    return Path(out)


def train(args: Namespace) -> int:
    """Trains the spec; the exit code is the run's."""
    path, changes = one_spec(args.spec), settings(args.settings)
    read(path, changes, "train")
    from difftrain.training.run import train as run

    return run(path, changes, data=args.data, steps=args.steps, resume=args.resume, out=args.out)


def sample(args: Namespace) -> int:
    """Draws pictures from the averaged weights of a run into one file."""
    from difftrain.training.samples import sample as draw

    asked = {name: getattr(args, option) for option, name in SAMPLING.items()}
    changes = settings(args.settings) | {n: str(v) for n, v in asked.items() if v is not None}
    if args.score or args.fid:
        print("scores look at every real picture, on a CPU for minutes", file=sys.stderr)
    path = draw(
        args.run,
        changes,
        prompts=args.prompts,
        count=args.count,
        out=args.output,
        save=args.save,
        weights=args.weights,
        tell=print if args.score or args.fid else None,
        inception=args.fid or "",
        doubt=complain,
    )
    print(path)
    return CLEAN


# options of `sample` that stand for settings, a solver before its steps
SAMPLING = {
    "solver": "sample.solver",
    "steps": "sample.solver.steps",
    "guidance": "sample.guidance",
}


def ema(args: Namespace) -> int:
    """Writes the average of a run that has another width than those it tracked."""
    from difftrain.training.averages import reconstruct

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    print(reconstruct(args.run, args.std, say, args.step, args.output))
    return CLEAN
