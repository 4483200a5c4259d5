"""How fast samplers are, and how far from fp32: one table for one GPU.

    python tools/bench_sample.py --limit 560 --json samplers.json
    python tools/bench_sample.py --work unet-lcm4 --only compile,tensorrt --batch 1 --together 1
    python tools/bench_sample.py --work '' --run runs/emoji64

All of it in two calls on two GPUs, the second of which goes on where the first was cut:

    python tools/bench_sample.py --gpu 0,1 --only compile --together 2 --ready 535 --cache kept \
        --json a.json
    python tools/bench_sample.py --gpu 0,1 --more --cache kept --json a.json

Works: dit-jump1 and dit-euler50 (DiT-XL/2, 256 pixels: one jump; 50 Euler steps with guidance),
unet-lcm4 and unet-dpm20 (Stable Diffusion 1.5's UNet, 512 pixels: 4 steps without guidance, of a
plain UNet under `multistep`, which is not told a guidance scale `w`; 20 of DPM++ with guidance),
and with --run the samples of a run. Columns: eager, compile (max-autotune, all steps in one CUDA
graph), tensorrt (the same), tensorrt-whole (samplers of few evaluations in one engine, as they are
shipped), pt2 (AOTInductor); all in fp16.

A latency is from noise and conditions to latents, the median of calls after warm-up: no text is
encoded and nothing is decoded. Errors are relative, ||a - b|| / ||b||, to eager fp32 without TF32,
of the first call of the network (where a column has one) and of the final latents. Networks are
random and damped (see bench/sampler.py), those of --run as they were trained.

Every (work, column) is a process of its own, and so is every batch of `compile` and `pt2`, which
are compiled for that size alone. Engines are built for one size each too, of one ONNX file.
Several are built and compiled side by side, and whoever measures has the GPU alone
(`bench/crew.py`); what belongs to one work is measured on one GPU. What is most wanted goes first,
so that a cut takes the last; one that hangs is ended after a time of its own. A table is printed in
any case. What a process had tuned when it was ended is not tuned again under the same `--cache`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import count, product
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.crew import LATE, Crew, Running, Work

ONE = Path(__file__).parent / "bench" / "sampler.py"
COLUMNS = {  # and the seconds that may pass until one can be measured: UNets compile for minutes
    "tensorrt": 420,
    "compile": 500,
    "eager": 240,
    "tensorrt-whole": 420,
    "pt2": 420,
}
WHOLE = "tensorrt-whole"
LATER = {WHOLE: 1, "pt2": 2}  # columns that wait for all others of every work
MEASURING = 120  # seconds, at most, of all batches of a process
MEMORY = 20.0  # GB of a GPU that a process may take, estimated
FEW = ("run", "dit-jump1", "unet-lcm4")  # works that may be of few evaluations
ALONE = ("compile", "pt2")  # columns that build for one batch size alone
DIT = """diff 1
import std.label
import std.sit
objective dit {{
  process = linear, prediction_type = flow, strategy = {strategy}
  backbone = sit.xl2({times}text = label.classes(field = "group", count = 1000))
}}
data {{ source = emoji64, size = 256px }}
sample {{ solver = {solver}, guidance = {guidance} }}
"""
UNET = """diff 1
import std.sd
objective unet {{
  process = ddpm(beta = scaled_linear(0.00085, 0.012)), prediction_type = epsilon
  strategy = {strategy}
  backbone = sd.unet(text = sd.clip(layers = 12, width = 768, heads = 12))
}}
data {{ source = emoji64, size = 512px }}
sample {{ solver = {solver}, guidance = {guidance} }}
"""
DROP = "drop_condition(0.1)"
WORKS = {
    "dit-jump1": DIT.format(
        strategy="mean_flow(ratio = 0.25, omega = 2, c = 0.01)",
        times="times = [t, r], ",
        solver="jump(steps = 1)",
        guidance=1,
    ),
    "unet-lcm4": UNET.format(strategy=DROP, solver="multistep(steps = 4)", guidance=1),
    "dit-euler50": DIT.format(strategy=DROP, times="", solver="euler(steps = 50)", guidance=4),
    "unet-dpm20": UNET.format(strategy=DROP, solver="dpm_solver_pp(steps = 20)", guidance=7.5),
}
Row = dict[str, object]
Key = tuple[str, str, int]  # a work, a column, a batch size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", default=",".join(WORKS), help="works, with commas between them")
    add("--only", default=",".join(COLUMNS), help="columns, with commas between them")
    add("--batch", default="1,8", help="batch sizes")
    add("--limit", type=float, default=540, help="seconds for all of it")
    add("--gpu", default="0", help="numbers of the GPUs to use, as 0,1")
    add("--together", type=int, default=3, help="how many side by side on each GPU")
    add("--run", default="", help="a run's folder: its samples are a further work, `run`")
    add("--json", type=Path, help="where all numbers go")
    add("--more", action="store_true", help="what is measured in that file is not measured again")
    add("--ready", type=float, default=0, help="seconds until each can be measured, not its own")
    add("--cache", type=Path, help="a folder that keeps what is compiled and tuned")
    add("--library", default="auto", help="the engine library: the first that is there")
    add("--portable", action="store_true", help="engines for every GPU, not for this one")
    add("--mode", default="max-autotune-no-cudagraphs", help="of torch.compile")
    args = parser.parse_args()
    if args.more and not args.json:
        parser.error("`--more` goes on with the file of `--json`: name it")
    if args.cache:
        os.environ |= caches(args.cache.resolve())
    bench = Bench(args)
    try:
        bench.run()
    finally:
        print(table(bench.rows), flush=True)


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    work: str
    column: str
    batches: tuple[int, ...]

    @property
    def keys(self) -> list[Key]:
        return [(self.work, self.column, batch) for batch in self.batches]


def jobs(args: argparse.Namespace) -> list[Job]:
    """What is to be measured, the most wanted first."""
    works = [*(["run"] if args.run else []), *asked(args.work, WORKS)]
    columns, sizes = asked(args.only, COLUMNS), tuple(map(int, args.batch.split(",")))
    found = []
    for work, column in product(works, [c for c in COLUMNS if c in columns]):
        if column != WHOLE or work in FEW:
            split = [(b,) for b in sizes] if column in ALONE else [sizes]
            turn = LATER.get(column, 0), works.index(work)
            found += [((*turn, n), Job(work, column, each)) for n, each in enumerate(split)]
    return [job for _, job in sorted(found, key=lambda one: one[0])]


def asked(names: str, known: Iterable[str]) -> list[str]:
    """Names with commas between them."""
    found = [name for name in names.split(",") if name]
    for name in found:
        if name not in known:
            sys.exit(f"there is no `{name}` here: use one of {', '.join(known)}")
    return found


def caches(folder: Path) -> dict[str, str]:
    """The variables that make compilers keep what they make and tune in a folder."""
    names = {"inductor": "TORCHINDUCTOR_CACHE_DIR", "triton": "TRITON_CACHE_DIR"}
    return {variable: str(folder / name) for name, variable in names.items()}


def remaining(found: Iterable[Job], measured: Mapping[Key, Row]) -> list[Job]:
    """Jobs without what was measured before."""
    left = [
        replace(job, batches=tuple(key[2] for key in job.keys if "ms" not in measured.get(key, {})))
        for job in found
    ]
    return [job for job in left if job.batches]


class Bench:
    """Measures jobs on some GPUs; `rows` has what was found of each, or why nothing was."""

    def __init__(self, args: argparse.Namespace):
        before = read(args.json) if args.more and args.json else {}
        self.args, self.jobs = args, remaining(jobs(args), before)
        late: dict[Key, Row] = {key: {"why": LATE} for job in self.jobs for key in job.keys}
        self.rows = {**before, **late}
        self.begun: dict[Path, Job] = {}
        self.crew = Crew(args.gpu.split(","), args.together, args.limit, self._keep)

    def run(self) -> None:
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self.crew.stop)
        self._write()
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            places = (Path(folder, str(number)) for number in count())
            self.crew.run([[self._work(*one)] for one in zip(self.jobs, places, strict=False)])

    def _work(self, job: Job, place: Path) -> Work:
        """The process of a job, on the GPU of the same work's first one."""
        run = str(Path(self.args.run).resolve()) if job.work == "run" else ""
        told = {**vars(job), "run": run, "spec": WORKS.get(job.work, "")}
        told |= {name: getattr(self.args, name) for name in ("library", "portable", "mode")}
        told["folder"] = str(place.parent)  # what a process leaves there goes with it
        task, result = place.with_suffix(".task"), place.with_suffix(".jsonl")
        task.write_text(json.dumps(told))
        beside = next((path for path, one in self.begun.items() if one.work == job.work), None)
        self.begun[result] = job
        limits = self.args.ready or COLUMNS[job.column], MEASURING
        return Work((str(ONE), str(task), str(result)), result, MEMORY, beside, limits)

    def _keep(self, running: Running, error: str) -> None:
        """What is written down of a process that ended: the lines that it wrote, and why it wrote
        no more."""
        job, result = self.begun[running.work.result], running.work.result
        text = result.read_text() if result.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()  # the last line may be half written
        found = {row["batch"]: row for row in map(json.loads, whole)}
        log = running.work.log.read_text(errors="replace")[-20_000:]
        error = " ".join(filter(None, (error, crashed(result.with_suffix(".crash")))))
        for work, column, batch in job.keys:
            row = found.get(batch, {"why": error or "it gave no result"})
            row |= {"gpu": running.gpu, **({"log": log} if "why" in row else {})}
            if "built" in row:
                began, ended = row.pop("built")
                row["build s"] = round(ended - began - running.waited(began, ended), 1)
            self.rows[work, column, batch] = row
            said = row.get("why") or f"{row['ms']:.2f} ms"
            print(f"{work}, {column}, {batch}: {said}", file=sys.stderr, flush=True)
        self._write()

    def _write(self) -> None:
        if self.args.json:
            named = {" | ".join(map(str, key)): row for key, row in self.rows.items()}
            self.args.json.write_text(json.dumps(named, indent=1))


def read(file: Path) -> dict[Key, Row]:
    """The rows of a file that a bench wrote, if it did."""
    named = json.loads(file.read_text()) if file.is_file() else {}
    keys = {name: name.split(" | ") for name in named}
    return {(work, column, int(size)): named[n] for n, (work, column, size) in keys.items()}


def crashed(file: Path) -> str:
    """Where a process was when a signal ended it, as its interpreter wrote it down."""
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    at = next((n for n, line in enumerate(lines[:-1], 1) if line.startswith("Current thread")), 0)
    return f"({lines[at].strip()})" if at else ""


# ---- the table

SHOWN = {  # behind a column's name
    WHOLE: ", whole",
    **dict.fromkeys(ALONE, ", one size"),
}
HEAD = "| work | batch | column | ms | images/s | one call | latents | to compile | built in |"
TIMED = (
    "Timed from noise and conditions to latents: no text, no decoding; unet-lcm4 is a plain UNet"
    " under `multistep`, without `w`."
)


def table(rows: Mapping[Key, Row]) -> str:
    """Lines of works and batch sizes, with latency, throughput and errors of each column."""
    there = {f"{row['device']}, torch {row['torch']}" for row in rows.values() if "device" in row}
    said = f"{'; '.join(sorted(there)) or 'nothing measured'}, fp16; medians of calls. {TIMED}"
    works, columns = ["run", *WORKS], list(COLUMNS)
    order = sorted(rows, key=lambda key: (works.index(key[0]), key[2], columns.index(key[1])))
    return "\n".join([said, "", HEAD, "|---" * 9 + "|", *(line(rows, key) for key in order)])


def line(rows: Mapping[Key, Row], key: Key) -> str:
    """The line of a work, a column and a batch size."""
    (work, column, batch), row = key, rows[key]
    if "ms" not in row:
        return f"| {work} | {batch} | {column} | {row['why'].replace('|', '/')} | | | | | |"
    compiled = rows.get((work, "compile", batch), {}).get("ms")
    ratio = f"{compiled / row['ms']:.2f}x" if compiled else ""
    name = row.get("library", column) + SHOWN.get(column, "")
    one = f"{row['one call']:.1e}" if "one call" in row else ""
    return (
        f"| {work} | {batch} | {name} | {row['ms']:.2f} | {row['images/s']:.1f} | {one} |"
        f" {row['latents']:.1e} | {ratio} | {row['build s']} s |"
    )


if __name__ == "__main__":
    main()
