"""How fast samplers are, and how far from fp32: one table for one GPU.

    python tools/bench_sample.py [--work NAMES] [--only COLUMNS] [--batch 1,8] [--limit SECONDS]
                                 [--gpus N] [--run FOLDER] [--json FILE]

Works: dit-jump1 and dit-euler50 (DiT-XL/2, 256 pixels: one jump; 50 Euler steps with guidance),
unet-lcm4 and unet-dpm20 (Stable Diffusion 1.5's UNet, 512 pixels: 4 steps without guidance; 20 of
DPM++ with guidance), and with --run the samples of a run. Columns: eager, compile (max-autotune,
all steps in one CUDA graph), tensorrt (the same), pt2 (AOTInductor); all in fp16.

A latency is from noise and conditions to latents: the median of calls after warm-up. Errors are
relative, ||a - b|| / ||b||, to eager fp32 without TF32, of the first call of the network and of
the final latents. Networks are random and damped: see `damp`. Every (work, column) is a process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

COLUMNS = ("eager", "tensorrt", "compile", "pt2")  # in the order of what they cost
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
    "dit-euler50": DIT.format(strategy=DROP, times="", solver="euler(steps = 50)", guidance=4),
    "unet-lcm4": UNET.format(strategy=DROP, solver="multistep(steps = 4)", guidance=1),
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
    found = _all(args)
    print(table(found, args))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


# ---- one process for each work and column


def _all(args: argparse.Namespace) -> list[dict]:
    """What every process measured; one that had no time or failed says so."""
    works = [*args.work.split(","), *(["run"] if args.run else [])]
    waiting = [(w, c) for c in COLUMNS if c in args.only.split(",") for w in works if w]
    end, free, running, found = time.monotonic() + args.limit, list(range(args.gpus)), {}, []
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            for process in [p for p in running if p.poll() is not None]:
                gpu, job, out = running.pop(process)
                free.append(gpu)
                found += _read(out, job, process.returncode)
            if time.monotonic() > end:
                found += [r for p, it in running.items() for r in _late(p, *it[1:])]
                return found + [_failed(job, "no time") for job in waiting]
            while waiting and free:
                job, gpu = waiting.pop(0), free.pop(0)
                out = Path(folder, f"{job[0]}.{job[1]}.json")
                running[_started(args, job, gpu, out)] = gpu, job, out
            time.sleep(0.2)
    return found


def _started(args, job: tuple[str, str], gpu: int, out: Path) -> subprocess.Popen:
    passed = ["--batch", args.batch, "--run", args.run, "--mode", args.mode, "--json", str(out)]
    passed += ["--library", args.library, *(["--portable"] if args.portable else [])]
    command = [sys.executable, __file__, "--child", ",".join(job), *passed]
    return subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)})


def _late(process: subprocess.Popen, job: tuple[str, str], out: Path) -> list[dict]:
    process.kill()
    process.wait()
    return _read(out, job, None)


def _read(out: Path, job: tuple[str, str], code: int | None) -> list[dict]:
    """What a process wrote, and why it wrote no more."""
    found = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    if code == 0:
        return found
    return [*found, _failed(job, "no time" if code is None else f"failed ({code})")]


def _failed(job: tuple[str, str], why: str) -> dict:
    return {"work": job[0], "column": job[1], "why": why}


def _measure(args: argparse.Namespace) -> None:
    """Measures one column of one work and writes a line of JSON for each batch size."""
    work, column = args.child.split(",")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with _opened(work, args.run) as run, torch.no_grad(), open(args.json, "w") as out:
        damped = "" if work == "run" else damp(run)
        exact = piece(run, "fp32")
        for batch in map(int, args.batch.split(",")):
            started = time.monotonic()
            row = {"work": work, "column": column, "batch": batch, "network": damped or args.run}
            try:
                call, said = BUILT[column](run, batch, args)
            except (ImportError, ExportError) as problem:
                row |= {"why": f"absent: {problem}"}
            else:
                row |= {**said, "build s": round(time.monotonic() - started, 1)}
                row |= _row(run, batch, exact, call, column != "eager" and column != "pt2")
            print(row, file=sys.stderr)
            out.write(json.dumps(row) + "\n")
            out.flush()


def _row(run: Opened, batch: int, exact: modules.Piece, call: Callable, graph: bool) -> dict:
    """Latency and errors of a function of the inputs of a step."""
    table = tabled(run)
    ours = Walk(Step(call, graph), table, list(exact.inputs), run.shape, DEVICE)
    theirs = Walk(Step(called(exact), False), table, list(exact.inputs), run.shape, DEVICE)
    index, told = torch.arange(batch, device=DEVICE), _told(exact, batch)
    one = _first(run, exact, batch)
    errors = {
        "one call": _error(call(*one)[0], called(exact)(*one)[0]),
        "latents": _error(ours(0, index, told), theirs(0, index, told)),
    }
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
    names, module = list(of.inputs), module or of.module
    return lambda *inputs: module(**dict(zip(names, inputs, strict=True)))


# ---- columns: each gives a function of the inputs of a step, and what it says of itself


def _eager(run: Opened, batch: int, args) -> tuple[Callable, dict]:
    return called(piece(run, "fp16")), {"torch": torch.__version__}


def _compile(run: Opened, batch: int, args) -> tuple[Callable, dict]:
    torch._dynamo.reset()
    of = piece(run, "fp16")
    return called(of, torch.compile(of.module, mode=args.mode, dynamic=False)), {"mode": args.mode}


def _pt2(run: Opened, batch: int, args) -> tuple[Callable, dict]:
    of = piece(run, "fp16")
    program = traced("step", of, (batch, batch))
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder, "step.pt2"))
        )
        return called(of, torch._inductor.aoti_load_package(path)), {"torch": torch.__version__}


def _tensorrt(run: Opened, batch: int, args) -> tuple[Callable, dict]:
    of, maker, sizes = piece(run, "fp16"), library(args.library), (batch, batch)
    with tempfile.TemporaryDirectory() as folder:
        file = onnx.write({"step": of}, Path(folder), sizes)["step"]
        source = Source("step", file, partial(traced, "step", of, sizes))
        built = build(source, Profile(batch, batch, portable=args.portable), maker)
    return Runner("step", built.data, built.about), {"library": f"{maker.package} {maker.version}"}


BUILT = {"eager": _eager, "compile": _compile, "tensorrt": _tensorrt, "pt2": _pt2}


# ---- the table


def table(found: list[dict], args: argparse.Namespace) -> str:
    """Rows of works and batch sizes, with latency, throughput and errors of each column."""
    head = "| work | batch | column | ms | images/s | one call | latents | to compile | built in |"
    lines = [_device(), "", head, "|---|---|---|---|---|---|---|---|---|"]
    compiled = {_key(r): r["ms"] for r in found if r["column"] == "compile" and "ms" in r}
    for row in sorted(found, key=lambda r: (r["work"], r.get("batch", 0))):
        if "ms" not in row:
            batch = row.get("batch", "")
            lines.append(f"| {row['work']} | {batch} | {row['column']} | {row['why']} | | | | | |")
            continue
        ratio = f"{compiled[_key(row)] / row['ms']:.2f}x" if _key(row) in compiled else ""
        name = row.get("library", row["column"])
        lines.append(
            f"| {row['work']} | {row['batch']} | {name} | {row['ms']:.2f} | {row['images/s']:.1f} |"
            f" {row['one call']:.1e} | {row['latents']:.1e} | {ratio} | {row['build s']} s |"
        )
    return "\n".join(lines)


def _key(row: dict) -> tuple[str, int]:
    return row["work"], row["batch"]


def _device() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name}, torch {torch.__version__}, fp16; medians of up to {CALLS} calls"


if __name__ == "__main__":
    main()
