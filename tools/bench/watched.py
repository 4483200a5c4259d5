"""A run as `difftrain train` makes it, in a process of its own, that writes down what every step
logged and, every so many steps, the memory in use and what was compiled so far:

    python watched.py TASK.json RESULT.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import chdir, contextmanager
from pathlib import Path

import torch
from bench import gauge, ours
from torch.utils import tensorboard

from difftrain.training import run
from difftrain.training.bundle import compile_spec

Line = dict[str, object]


def main(task: str, result: str) -> None:
    told = json.loads(Path(task).read_text())
    with Path(result).open("w", buffering=1) as out:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        print(json.dumps({"device": device, "torch": torch.__version__}), file=out)
        watched = watching(told["every"], lambda line: print(json.dumps(line), file=out))
        with watched, chdir(Path(result).parent):
            trained(told)


def trained(told: Mapping) -> None:
    """The run; a spec of this folder has random latents of this `side`."""
    if told["side"]:
        ours.write_data(Path.cwd(), told["rows"], told["side"])
    bundle = compile_spec(told["spec"], told["settings"])
    run.run(bundle, steps=told["steps"], out="run")


@contextmanager
def watching(every: int, tell: Callable[[Line], None]):
    """Inside it, what a run logs of a step is told too, and after every so many steps more."""

    class Writer(tensorboard.SummaryWriter):
        def add_scalar(self, name: str, value: float, step: int, *further, **options) -> None:
            super().add_scalar(name, value, step, *further, **options)
            if name == "loss":
                tell({"step": step, "loss": value, **(looked() if step % every == 0 else {})})

    usual, tensorboard.SummaryWriter = tensorboard.SummaryWriter, Writer
    try:
        yield
    finally:
        tensorboard.SummaryWriter = usual


def looked() -> Line:
    """The memory in use, its most, and the graphs compiled so far."""
    return {"held": gauge.held(), "most": gauge.memory(), "compiled": gauge.compilations()}


if __name__ == "__main__":
    main(*sys.argv[1:])
