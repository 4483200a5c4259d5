"""How fast samplers are, and how far from fp32: one table for one GPU.

    python tools/bench_sample.py [--work NAMES] [--only COLUMNS] [--batch 1,8] [--limit SECONDS]
                                 [--gpus N] [--run FOLDER] [--json FILE]

Works: dit-jump1 and dit-euler50 (DiT-XL/2, 256 pixels: one jump; 50 Euler steps with guidance),
unet-lcm4 and unet-dpm20 (Stable Diffusion 1.5's UNet, 512 pixels: 4 steps without guidance, of a
plain UNet under `multistep`, which is not told a guidance scale `w`; 20 of DPM++ with guidance),
and with --run the samples of a run. Columns: eager, compile (max-autotune, all steps in one CUDA
graph), tensorrt (the same), tensorrt-whole (samplers of few evaluations in one engine, as they are
shipped), pt2 (AOTInductor); all in fp16.

A latency is from noise and conditions to latents, the median of calls after warm-up: no text is
encoded and nothing is decoded. Errors are relative, ||a - b|| / ||b||, to eager fp32 without TF32,
of the first call of the network (where a column has one) and of the final latents. Networks are
random and damped (see `damp`), those of --run as they were trained.

Every (work, column) is a process of its own, and so is every batch of `compile` and `pt2`, which
are compiled for that size alone; one engine serves all batches, with the largest as its optimum.
What is most wanted goes first, so that a cut takes the last; a table is printed in any case.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from difftrain.export import modules, onnx
from difftrain.export.engine import Profile, Source, build, library
from difftrain.export.errors import ExportError
from difftrain.export.manifest import tabled
from difftrain.export.opened import Opened, opened
from difftrain.export.running import Runner, Walk
from difftrain.export.trace import traced
from difftrain.models.foreign import reason

COLUMNS = {  # and the turn of their first process
    "tensorrt": 0,
    "compile": 0,
    "tensorrt-whole": 1,
    "eager": 1,
    "pt2": 2,
}
WHOLE = "tensorrt-whole"
FEW = ("run", "dit-jump1", "unet-lcm4")  # works that may be of few evaluations
LOOPED = ("compile", "tensorrt", WHOLE)  # columns whose samplers are one CUDA graph
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
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the latter to try this file out
CALLS, SECONDS = 30, 6.0  # at most, for each latency
LAST = ("final_layer.linear", "conv_out")  # the layers whose answer is the network's
SILENT = 0.02  # the deviation of what an initialisation leaves 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--work", default=",".join(WORKS), help="works, with commas between them")
    add("--only", default=",".join(COLUMNS), help="columns, with commas between them")
    add("--batch", default="1,8", help="batch sizes")
    add("--limit", type=float, default=540, help="seconds for all of it")
    add("--gpus", type=int, default=1, help="how many GPUs take processes side by side")
    add("--run", default="", help="a run's folder: its samples are a further work, `run`")
    add("--json", default="", help="a file for all that was measured")
    add("--library", default="auto", help="the engine library: the first that is there")
    add("--portable", action="store_true", help="engines for every GPU, not for this one")
    add("--mode", default="max-autotune-no-cudagraphs", help="of torch.compile")
    add("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _measure(args)
        return
    signal.signal(signal.SIGTERM, _stop)
    found: list[dict] = []
    try:
        _all(args, found)
    finally:
        print(table(found), flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=1))


def _stop(*_) -> None:
    sys.exit(128 + signal.SIGTERM)


# ---- one process for each work and column


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    work: str
    column: str
    batches: tuple[int, ...]


def jobs(args: argparse.Namespace) -> list[Job]:
    """What is to be measured, the most wanted first."""
    works = [*(["run"] if args.run else []), *filter(None, args.work.split(","))]
    sizes = tuple(map(int, args.batch.split(",")))
    found = []
    for column in [c for c in COLUMNS if c in args.only.split(",")]:
        split = [(b,) for b in sizes] if column in ALONE else [sizes]
        able = [w for w in works if column != WHOLE or w in FEW]
        found += [
            (COLUMNS[column] + n, w, column, each) for n, each in enumerate(split) for w in able
        ]
    found.sort(key=lambda it: (it[0], works.index(it[1])))
    return [Job(*job) for _, *job in found]


def _all(args: argparse.Namespace, found: list[dict]) -> None:
    """Adds what every process measured; one that had no time or failed says so."""
    waiting, running, free = jobs(args), {}, list(range(args.gpus))
    end = time.monotonic() + args.limit
    with tempfile.TemporaryDirectory() as folder:
        try:
            while (waiting or running) and time.monotonic() < end:
                for process in [p for p in running if p.poll() is not None]:
                    gpu, job, out = running.pop(process)
                    free.append(gpu)
                    found += _read(out, job, f"failed ({process.returncode})")
                while waiting and free:
                    job, gpu = waiting.pop(0), free.pop(0)
                    out = Path(folder, f"{len(waiting)}.json")
                    running[_started(args, job, gpu, out)] = gpu, job, out
                time.sleep(0.2)
        finally:
            for process, (_, job, out) in running.items():
                _end(process)
                found += _read(out, job, "no time")
            found += [row for job in waiting for row in _without(job, job.batches, "no time")]


def _started(args, job: Job, gpu: int, out: Path) -> subprocess.Popen:
    passed = ["--batch", ",".join(map(str, job.batches)), "--run", args.run, "--json", str(out)]
    passed += ["--mode", args.mode, "--library", args.library]
    passed += ["--portable"] if args.portable else []
    command = [sys.executable, __file__, "--child", f"{job.work},{job.column}", *passed]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
    return subprocess.Popen(command, env=env, start_new_session=True)


def _end(process: subprocess.Popen) -> None:
    """Ends a process and what it started to compile."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(out: Path, job: Job, why: str) -> list[dict]:
    """What a process wrote, and why it did not write the rest."""
    lines = out.read_text().splitlines(keepends=True) if out.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    seen = {row["batch"] for row in found}
    return [*found, *_without(job, [b for b in job.batches if b not in seen], why)]


def _without(job: Job, batches: Sequence[int], why: str) -> list[dict]:
    return [{"work": job.work, "column": job.column, "batch": b, "why": why} for b in batches]


def _measure(args: argparse.Namespace) -> None:
    """Measures one column of one work and writes a line of JSON for each batch size."""
    (work, column), sizes = args.child.split(","), tuple(map(int, args.batch.split(",")))
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with _opened(work, args.run) as run, torch.no_grad(), open(args.json, "w") as out:
        damped = "" if work == "run" else damp(run)
        exact, started = piece(run, "fp32"), time.monotonic()
        try:
            call, said = BUILT[column](run, sizes, args)
        except Exception as problem:  # whatever a compiler raises, the next process goes on
            traceback.print_exc()
            for row in _without(Job(work, column, sizes), sizes, f"failed: {reason(problem)}"):
                out.write(json.dumps(row) + "\n")
            return
        said |= {"network": damped or args.run, "build s": round(time.monotonic() - started, 1)}
        for batch in sizes:
            row = {"work": work, "column": column, "batch": batch, **said}
            try:
                row |= _row(run, batch, exact, call, column in LOOPED, column == WHOLE)
            except Exception as problem:  # such as too little memory for this batch
                traceback.print_exc()
                row["why"] = f"failed: {reason(problem)}"
            print(row, file=sys.stderr)
            out.write(json.dumps(row) + "\n")
            out.flush()


def _row(
    run: Opened, batch: int, exact: modules.Piece, call: Callable, graph: bool, whole: bool
) -> dict:
    """Latency and errors of a function of the inputs of a step, or of a whole sampler."""
    table, inputs = tabled(run), list(exact.inputs)
    ours = Walk(Step(call, graph), table, None if whole else inputs, run.shape, DEVICE)
    theirs = Walk(Step(called(exact), False), table, inputs, run.shape, DEVICE)
    index, told = torch.arange(batch, device=DEVICE), _told(exact, batch)
    errors = {"latents": _error(ours(0, index, told), theirs(0, index, told))}
    if not whole:
        one = _first(run, exact, batch)
        errors["one call"] = _error(call(*one)[0], called(exact)(*one)[0])
    given = [*ours.noises(0, index), *told]
    seconds = latency(lambda: ours.latents(given))
    return {**errors, "ms": seconds * 1e3, "images/s": batch / seconds}


class Step:
    """A function of tensors as `Walk` calls an engine."""

    def __init__(self, call: Callable, graph: bool):
        self.call, self.graph = call, graph

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        return self.call(*inputs)

    def capturable(self) -> bool:
        return self.graph


def latency(call: Callable) -> float:
    """The median seconds of a call and the wait for its end."""
    call(), call()
    wait()
    taken, end = [], time.perf_counter() + SECONDS
    while len(taken) < 3 or (len(taken) < CALLS and time.perf_counter() < end):
        started = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def wait() -> None:
    """Returns when the GPU has nothing left to do."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


# ---- works


@contextmanager
def _opened(work: str, run: str) -> Iterator[Opened]:
    """A run, or one that was never trained."""
    if work == "run":
        with opened(run, "tensorrt") as found:
            yield found
        return
    from difftrain.training import evaluate
    from difftrain.training.bundle import block, compile_text
    from difftrain.training.known import Known
    from difftrain.training.parts import build_parts

    bundle = compile_text(work, WORKS[work])
    spec = bundle.read()
    objective, data = spec.objective(), block(spec, "data")
    parts = build_parts(objective, Known(), 0, DEVICE, size=data["size"], sampling=True)
    programs = evaluate.programs(bundle, torch.device(DEVICE))
    model = evaluate.Model(bundle, programs, parts, parts.weights, 0)
    yield Opened(model, objective, block(spec, "sample"), block(spec, "export"), data)


def damp(run: Opened) -> str:
    """Makes a random network one whose answer is about as large as what it would be trained to
    give: layers that begin at 0 get normal weights, and the last one is scaled."""
    network = run.parts.modules["student"]
    for weight in network.parameters():
        if weight.dim() > 1 and not weight.any():
            nn.init.normal_(weight, std=SILENT)
    x = run.draws(2).noise(0, torch.zeros(2, *run.shape, device=DEVICE))
    piece_ = piece(run, "fp32")
    told = {n: v for n, v in piece_.inputs.items() if n == "cond"}
    t = torch.full((2,), run.table.rows[0].t, dtype=run.table.times, device=DEVICE)
    further = {n: t for n in run.objective.backbone.interface.times[1:]}
    size = network(x, t, told.get("cond"), **further).float().square().mean().sqrt()
    last = [m for n, m in network.named_modules() if n.endswith(LAST)]
    for weight in last[-1].parameters():
        weight /= size
    return f"random, silent layers at {SILENT}, answers scaled to 1"


def piece(run: Opened, precision: str) -> modules.Piece:
    """The network and its update as one module, whatever the number of steps."""
    return modules.pieces(run, precision, DEVICE, unrolled=0)["step"]


def _told(of: modules.Piece, batch: int) -> list[Tensor]:
    """The conditions of a batch, and the empty one where it is read."""
    cond = [torch.cat([of.inputs["cond"]] * batch)[:batch]] if "cond" in of.inputs else []
    return [*cond, *([of.inputs["null"]] if "null" in of.inputs else [])]


def _first(run: Opened, of: modules.Piece, batch: int) -> list[Tensor]:
    """The inputs of the first step, its row being that of x0_hat alone."""
    x = run.draws(batch).noise(0, torch.zeros(batch, *run.shape, device=DEVICE))
    row = torch.zeros_like(of.inputs["row"])
    row[1] = 1
    told = dict(zip([n for n in ("cond", "null") if n in of.inputs], _told(of, batch), strict=True))
    sized = {"x": x, "row": row, "noise": x, **told}
    if "kept" in of.inputs:
        sized["kept"] = torch.zeros(len(of.inputs["kept"]), *x.shape, device=DEVICE)
    return [sized.get(name, value) for name, value in of.inputs.items()]


def called(of: modules.Piece, module: Callable | None = None) -> Callable:
    """A piece as a function of its inputs in their order."""
    names, module = list(of.inputs), of.module if module is None else module
    return lambda *inputs: module(**dict(zip(names, inputs, strict=True)))


# ---- columns: each gives a function of the inputs of a step, and what it says of itself


def _eager(run: Opened, sizes: tuple[int, ...], args) -> tuple[Callable, dict]:
    return called(piece(run, "fp16")), {"torch": torch.__version__}


def _compile(run: Opened, sizes: tuple[int, ...], args) -> tuple[Callable, dict]:
    of = piece(run, "fp16")
    return called(of, torch.compile(of.module, mode=args.mode, dynamic=False)), {"mode": args.mode}


def _pt2(run: Opened, sizes: tuple[int, ...], args) -> tuple[Callable, dict]:
    of = piece(run, "fp16")
    program = traced("step", of, (min(sizes), max(sizes)))
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder, "step.pt2"))
        )
        return called(of, torch._inductor.aoti_load_package(path)), {"torch": torch.__version__}


def _tensorrt(
    run: Opened, sizes: tuple[int, ...], args, name: str = "step"
) -> tuple[Callable, dict]:
    maker, ends = library(args.library), (min(sizes), max(sizes))
    made = modules.pieces(run, "fp16", DEVICE, unrolled=0 if name == "step" else modules.UNROLLED)
    if name not in made:
        raise ExportError(f"a sampler of {len(run.table.rows)} evaluations is a loop of steps")
    made = {each: made[each] for each in ("backbone", name)}
    with tempfile.TemporaryDirectory() as folder:
        file = onnx.write(made, Path(folder), ends, str, ["backbone"])[name]
        source = Source(name, file, partial(traced, name, made[name], ends))
        built = build(source, Profile(*ends, portable=args.portable), maker)
    return Runner(name, built.data, built.about), {"library": f"{maker.package} {maker.version}"}


BUILT = {
    "eager": _eager,
    "compile": _compile,
    "tensorrt": _tensorrt,
    WHOLE: partial(_tensorrt, name="sampler"),
    "pt2": _pt2,
}


# ---- the table

SHOWN = {WHOLE: ", whole sampler", **dict.fromkeys(ALONE, ", static")}  # behind a column's name
TIMED = (
    "Timed from noise and conditions to latents: no text, no decoding; unet-lcm4 is a plain UNet"
    " under `multistep`, without `w`."
)


def table(found: list[dict]) -> str:
    """Rows of works and batch sizes, with latency, throughput and errors of each column."""
    head = "| work | batch | column | ms | images/s | one call | latents | to compile | built in |"
    lines = [_device(), "", head, "|---|---|---|---|---|---|---|---|---|"]
    compiled = {_key(r): r["ms"] for r in found if r["column"] == "compile" and "ms" in r}
    for row in sorted(found, key=lambda r: (r["work"], r["batch"])):
        if "ms" not in row:
            where = f"| {row['work']} | {row['batch']} | {row['column']}"
            lines.append(f"{where} | {row['why']} | | | | | |")
            continue
        ratio = f"{compiled[_key(row)] / row['ms']:.2f}x" if _key(row) in compiled else ""
        name = row.get("library", row["column"]) + SHOWN.get(row["column"], "")
        one = f"{row['one call']:.1e}" if "one call" in row else ""
        lines.append(
            f"| {row['work']} | {row['batch']} | {name} | {row['ms']:.2f} | {row['images/s']:.1f} |"
            f" {one} | {row['latents']:.1e} | {ratio} | {row['build s']} s |"
        )
    return "\n".join(lines)


def _key(row: dict) -> tuple[str, int]:
    return row["work"], row["batch"]


def _device() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name}, torch {torch.__version__}, fp16; medians of up to {CALLS} calls. {TIMED}"


if __name__ == "__main__":
    main()
