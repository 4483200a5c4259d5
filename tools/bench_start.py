"""How long an executable takes to its first step, in a fresh process with an empty cache.

    python tools/bench_start.py                             emoji64 and DiT-XL/2, as a GPU runs them
    python tools/bench_start.py --specs specs/quickstart.diff --target cpu --set train.compile=on

Each spec is compiled with a cache directory of its own, which is then removed; the executable runs
in new processes, each of which begins with an empty one and is stopped after its first step; of
several the median counts. `stands` is from the start of that process until torch's compiler, its
data and its model are there, `first step` from there until the GPU has done it, `reading` what of
it passes before the step is called: reading the kept step. Processes of their own take the time of
`imports`, of torch and of the executable's training, and of the `compiler`'s beside them.

Where Python may not keep the bytecode of an installed torch, or none was kept, every process would
compile torch's sources: then the processes share a folder for it, which the first of them fills.
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
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Timer

from bench.latents import write_data

HERE = Path(__file__).resolve().parent
SPECS = ("../specs/recipes/emoji64.diff", "bench/dit.diff")
STANDS, STEPPED = re.compile(r"^training `"), re.compile(r" to the first step")
READING = re.compile(r"([\d.]+) of them reading")
COLUMNS = (
    "spec", "compiled in s", "MB", "imports s", "compiler s", "stands after s", "first step s",
    "reading s", "in all s", "cold or not",
)  # fmt: skip
OURS = "import difftrain.training.run, difftrain.models.attention"
COMPILER = "import torch._dynamo, torch._inductor.compile_fx"
ROWS, SIDE = 256, 32  # of the random latents that the specs of bench read


@dataclass
class Start:
    """Seconds from the start of a process, those of reading a kept step, and the last it said."""

    stands: float = 0.0
    stepped: float = 0.0
    reading: float = 0.0
    said: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--specs", nargs="+", type=Path, default=[HERE / s for s in SPECS])
    parser.add_argument("--target", default="auto", help="as of `difftrain compile`")
    parser.add_argument("--set", action="append", default=[], help="as of `difftrain compile`")
    parser.add_argument("--side", type=int, default=SIDE, help="of random latents")
    parser.add_argument("--times", type=int, default=3, help="how many processes are started")
    parser.add_argument("--limit", type=float, default=550, help="seconds for each command")
    args = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    with TemporaryDirectory() as kept:
        os.environ |= bytecode(Path(kept))
        for spec in args.specs:
            with TemporaryDirectory() as folder:
                print(line(spec.resolve(), Path(folder), args), flush=True)


def line(spec: Path, folder: Path, args: argparse.Namespace) -> str:
    """A line of the table: compile, wipe, start afresh."""
    write_data(folder, ROWS, args.side)
    made = folder / spec.stem
    took = compiled(spec, made, args.target, args.set, args.limit)
    ours, both = (imported(made, code) for code in (OURS, f"{OURS}; {COMPILER}"))
    starts = [started(made, args.limit) for _ in range(args.times)]
    stands, stepped, reading = (
        median(getattr(start, name) for start in starts)
        for name in ("stands", "stepped", "reading")
    )
    seconds = (took, made.stat().st_size / 1e6, ours, both - ours, stands, stepped - stands)
    cells = [f"{n:.1f}" for n in (*seconds, reading, stepped)]
    return f"| {' | '.join([spec.stem, *cells, starts[-1].said])} |"


def compiled(spec: Path, out: Path, target: str, changes: Sequence[str], limit: float) -> float:
    """The seconds of `difftrain compile`, whose cache is gone afterwards."""
    cache = out.with_suffix(".cache")
    command = [sys.executable, "-m", "difftrain", "compile", str(spec), "-o", str(out)]
    command += ["--target", target, *(word for change in changes for word in ("--set", change))]
    surroundings = caching(cache, HERE.parent)
    began = time.perf_counter()
    subprocess.run(
        command, cwd=out.parent, env=surroundings, timeout=limit, check=True, stdout=sys.stderr
    )
    seconds = time.perf_counter() - began
    shutil.rmtree(cache, ignore_errors=True)
    return seconds


def imported(made: Path, code: str) -> float:
    """The seconds of a process that imports modules of an executable, and of what they need."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(made)!r}); {code}"]
    began = time.perf_counter()
    subprocess.run(command, env=caching(made.with_suffix(".empty")), check=True)
    return time.perf_counter() - began


def started(made: Path, limit: float) -> Start:
    """When an executable stood and when it had made its first step, from an empty cache."""
    with TemporaryDirectory(dir=made.parent) as folder:
        began, start = time.perf_counter(), Start()
        with subprocess.Popen(
            [sys.executable, str(made), "--out", str(Path(folder, "run"))],
            cwd=made.parent, env=caching(Path(folder, "cache")),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as process:  # fmt: skip
            clock = Timer(limit, process.terminate)
            clock.start()
            for said in process.stdout:
                _note(start, said, time.perf_counter() - began)
                if start.stepped:
                    break
            clock.cancel()
            process.terminate()
    if not start.stepped:
        raise SystemExit(f"`{made.name}` made no step: {start.said}")
    return start


def _note(start: Start, said: str, passed: float) -> None:
    """Keeps what a line says of the start."""
    print(f"{passed:6.1f} s  {said.rstrip()}", file=sys.stderr)
    start.said = said.partition(":")[0].strip()
    if STANDS.search(said):
        start.stands = passed
    if STEPPED.search(said):
        start.stepped = passed
        found = READING.search(said)
        start.reading = float(found.group(1)) if found else 0.0


def caching(folder: Path, *checkout: Path) -> Mapping[str, str]:
    """An environment whose compile caches lie in a folder. PYTHONPATH names this `checkout` and no
    other, beside what else it names."""
    entries = [os.path.abspath(e) for e in os.environ.get("PYTHONPATH", "").split(os.pathsep) if e]
    elsewhere = [entry for entry in entries if not Path(entry, "difftrain").is_dir()]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, checkout), *elsewhere]),
        "TORCHINDUCTOR_CACHE_DIR": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }


def bytecode(folder: Path) -> Mapping[str, str]:
    """What makes Python keep bytecode in a folder, where none of torch's compiler is kept."""
    home = Path(find_spec("torch").origin).parent
    if Path(cache_from_source(str(home / "_inductor" / "compile_fx.py"))).exists():
        return {}
    print("torch has no bytecode here, so it is kept for these processes", file=sys.stderr)
    return {"PYTHONPYCACHEPREFIX": str(folder), "PYTHONDONTWRITEBYTECODE": ""}


if __name__ == "__main__":
    main()
