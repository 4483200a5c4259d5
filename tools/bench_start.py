"""How long an executable takes to its first step, in a fresh process with an empty cache.

    python tools/bench_start.py                             emoji64 and DiT-XL/2, as a GPU runs them
    python tools/bench_start.py --specs tools/bench/dit.diff --target cpu --set train.compile=on

Each spec is compiled with a cache directory of its own, which is then removed; the executable runs
in a new process, which begins with an empty one and is stopped after its first step. `stands` is
from the start of that process until its data and its model are there, `first step` from there on.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer

import numpy as np

HERE = Path(__file__).resolve().parent
SPECS = ("../specs/recipes/emoji64.diff", "bench/dit.diff")
STANDS, STEPPED = re.compile(r"^training `"), re.compile(r" to the first step")
ROWS, SIDE, CLASSES = 256, 32, 1000  # of the random latents that the specs of bench read


@dataclass
class Start:
    """Seconds from the start of a process, and the last that it said."""

    stands: float = 0.0
    stepped: float = 0.0
    said: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--specs", nargs="+", type=Path, default=[HERE / s for s in SPECS])
    parser.add_argument("--target", default="auto", help="as of `difftrain compile`")
    parser.add_argument("--set", action="append", default=[], help="as of `difftrain compile`")
    parser.add_argument("--side", type=int, default=SIDE, help="of random latents")
    parser.add_argument("--limit", type=float, default=550, help="seconds for each command")
    args = parser.parse_args()
    print("| spec | compiled in s | MB | stands after s | first step s | in all s | cold or not |")
    print("|---|---|---|---|---|---|---|")
    for spec in args.specs:
        with TemporaryDirectory() as folder:
            print(line(spec.resolve(), Path(folder), args), flush=True)


def line(spec: Path, folder: Path, args: argparse.Namespace) -> str:
    """A line of the table: compile, wipe, start afresh."""
    write_data(folder / "latents.npz", args.side)
    made = folder / spec.stem
    took = compiled(spec, made, args.target, args.set, args.limit)
    start = started(made, args.limit)
    size = made.stat().st_size / 1e6
    first = start.stepped - start.stands
    times = f"{start.stands:.1f} | {first:.1f} | {start.stepped:.1f}"
    return f"| {spec.stem} | {took:.1f} | {size:.0f} | {times} | {start.said} |"


def write_data(path: Path, side: int) -> None:
    """Random latents with a caption and a class each, for specs that read them."""
    random = np.random.default_rng(0)
    latents = random.standard_normal((ROWS, 4, side, side), dtype=np.float32)
    captions = np.array([f"latents of picture {i}" for i in range(ROWS)])
    np.savez(path, x=latents, label=random.integers(0, CLASSES, ROWS), caption=captions)


def compiled(spec: Path, out: Path, target: str, changes: Sequence[str], limit: float) -> float:
    """The seconds of `difftrain compile`, whose cache is gone afterwards."""
    cache = out.with_suffix(".cache")
    command = [sys.executable, "-m", "difftrain", "compile", str(spec), "-o", str(out)]
    command += ["--target", target, *(word for change in changes for word in ("--set", change))]
    surroundings = {**caching(cache), "PYTHONPATH": str(HERE.parent)}
    began = time.perf_counter()
    subprocess.run(
        command, cwd=out.parent, env=surroundings, timeout=limit, check=True, stdout=sys.stderr
    )
    seconds = time.perf_counter() - began
    shutil.rmtree(cache, ignore_errors=True)
    return seconds


def started(made: Path, limit: float) -> Start:
    """When an executable stood and when it had made its first step, from an empty cache."""
    began, start = time.perf_counter(), Start()
    with subprocess.Popen(
        [sys.executable, str(made), "--out", str(made.parent / "run")],
        cwd=made.parent, env=caching(made.with_suffix(".empty")),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        clock = Timer(limit, process.terminate)
        clock.start()
        for said in process.stdout:
            passed = time.perf_counter() - began
            print(f"{passed:6.1f} s  {said.rstrip()}", file=sys.stderr)
            start.said = said.partition(":")[0].strip()
            if STANDS.search(said):
                start.stands = passed
            if STEPPED.search(said):
                start.stepped = passed
                break
        clock.cancel()
        process.terminate()
    return start


def caching(folder: Path) -> Mapping[str, str]:
    """An environment whose compile caches lie in a folder; PYTHONPATH names no checkout."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {
        **kept,
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }


if __name__ == "__main__":
    main()
