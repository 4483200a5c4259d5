"""Measures one sampler in a process of its own: python sampler.py TASK.json RESULT.jsonl

A line of the result is a batch size: its latency and errors, or why there are none. All sizes are
built, compiled and compared with fp32 before this process asks to have its GPU for itself.
"""

from __future__ import annotations

import faulthandler
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from bench import gauge
from torch import Tensor, nn

from difftrain.export import modules, onnx
from difftrain.export.engine import Engine, Library, Profile, Source, build, library
from difftrain.export.errors import ExportError
from difftrain.export.manifest import tabled
from difftrain.export.opened import Opened, opened
from difftrain.export.running import Runner, Walk
from difftrain.export.trace import traced
from difftrain.models.foreign import reason
from difftrain.training import evaluate
from difftrain.training.bundle import block, compile_text
from difftrain.training.known import Known
from difftrain.training.parts import build_parts

Row = dict[str, object]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the latter to try this file out
CALLS, SECONDS = 30, 6.0  # at most, for each latency
LAST = ("final_layer.linear", "conv_out")  # the layers whose answer is the network's
SILENT = 0.02  # the deviation of what an initialisation leaves 0


def main(task: str, result: str) -> None:
    told, crash = json.loads(Path(task).read_text()), Path(result).with_suffix(".crash")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with (
        crash.open("w") as last,
        Path(result).open("w", buffering=1) as out,
        work(told) as run,
        torch.no_grad(),
    ):
        faulthandler.enable(last)
        for row in measured(run, told):
            print(json.dumps(row), file=out)
        faulthandler.disable()


def measured(run: Opened, told: Mapping) -> Iterator[Row]:
    """A row for every batch size: first those that failed, then those that were timed alone."""
    said = {"network": told["run"] or damp(run), "torch": torch.__version__}
    said["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "no GPU"
    rows, calls = [{"batch": batch, **said} for batch in told["batches"]], {}
    with survived(*rows):
        began = time.monotonic()
        call, more = BUILT[told["column"]](run, told)
        built = {**more, "built": [began, time.monotonic()]}
        for row in rows:
            with survived(row):
                errors, calls[row["batch"]] = compared(run, call, told["column"], row["batch"])
                row |= {**built, **errors, "compiled": gauge.compilations()}
    yield from [row for row in rows if "why" in row]
    if calls:
        gauge.alone()
    for row in [row for row in rows if "why" not in row]:
        with survived(row):
            seconds = latency(calls[row["batch"]])
            row |= {"ms": seconds * 1e3, "images/s": row["batch"] / seconds}
        yield row


@contextmanager
def survived(*rows: Row) -> Iterator[None]:
    """Whatever a compiler or a library raises inside is told in these rows, and no more."""
    try:
        yield
    except Exception as problem:
        traceback.print_exc()
        for row in rows:
            row["why"] = f"failed: {reason(problem)}"


class Step:
    """A function of tensors as `Walk` calls an engine; `graph`: a CUDA graph can hold its calls."""

    def __init__(self, call: Callable, graph: bool):
        self.call, self.graph = call, graph

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        return self.call(*inputs)

    def capturable(self) -> bool:
        return self.graph


def compared(
    run: Opened, call: Callable, column: str, batch: int
) -> tuple[dict[str, float], Callable[[], Tensor]]:
    """Errors of a function of the inputs of a step (or of a whole sampler), and what gives its
    latents again."""
    table, exact = tabled(run), piece(run, "fp32")
    inputs, plain = list(exact.inputs), Step(called(exact), False)
    ours = Walk(call, table, None if column == WHOLE else inputs, run.shape, DEVICE)
    theirs = Walk(plain, table, inputs, run.shape, DEVICE)
    index, told = torch.arange(batch, device=DEVICE), _told(exact, batch)
    errors = {}
    if column != WHOLE:
        one = _first(run, exact, batch)
        errors["one call"] = _error(call(*one)[0], plain(*one)[0])
    errors["latents"] = _error(ours(0, index, told), theirs(0, index, told))
    return errors, partial(ours.latents, [*ours.noises(0, index), *told])


def latency(call: Callable) -> float:
    """The median seconds of a call and the wait for its end."""
    call(), call()
    gauge.wait()
    taken, end = [], time.perf_counter() + SECONDS
    while len(taken) < 3 or (len(taken) < CALLS and time.perf_counter() < end):
        started = time.perf_counter()
        call()
        gauge.wait()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def _error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


# ---- works


@contextmanager
def work(told: Mapping) -> Iterator[Opened]:
    """The samples of a run, or of a spec whose network was never trained."""
    if told["run"]:
        with opened(told["run"], "tensorrt") as found:
            yield found
        return
    bundle = compile_text(told["work"], told["spec"])
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
    """The inputs of the first step, its row being that of x0_hat alone. No tensor is given twice:
    what is compiled for that is compiled again for a walk, which never does so."""
    x = run.draws(batch).noise(0, torch.zeros(batch, *run.shape, device=DEVICE))
    row = torch.zeros_like(of.inputs["row"])
    row[1] = 1
    told = dict(zip([n for n in ("cond", "null") if n in of.inputs], _told(of, batch), strict=True))
    sized = {"x": x, "row": row, "noise": x.clone(), **told}
    if "kept" in of.inputs:
        sized["kept"] = torch.zeros(len(of.inputs["kept"]), *x.shape, device=DEVICE)
    return [sized.get(name, value) for name, value in of.inputs.items()]


def called(of: modules.Piece, module: Callable | None = None) -> Callable:
    """A piece as a function of its inputs in their order."""
    names, module = list(of.inputs), of.module if module is None else module
    return lambda *inputs: module(**dict(zip(names, inputs, strict=True)))


# ---- columns: each gives what `Walk` calls, and what it says of itself


def _eager(run: Opened, told: Mapping) -> tuple[Step, Row]:
    return Step(called(piece(run, "fp16")), False), {}


def _compile(run: Opened, told: Mapping) -> tuple[Step, Row]:
    """Compiled here, and not in its first comparison."""
    of, mode = piece(run, "fp16"), told["mode"]
    call = called(of, torch.compile(of.module, mode=mode, dynamic=False))
    for batch in told["batches"]:
        call(*_first(run, of, batch))
    return Step(call, True), {"mode": mode}


def _pt2(run: Opened, told: Mapping) -> tuple[Step, Row]:
    of, sizes = piece(run, "fp16"), told["batches"]
    program = traced("step", of, (min(sizes), max(sizes)))
    with TemporaryDirectory(dir=told["folder"]) as folder:
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder, "step.pt2"))
        )
        return Step(called(of, torch._inductor.aoti_load_package(path)), False), {}


def _tensorrt(run: Opened, told: Mapping, name: str = "step") -> tuple[Engines, Row]:
    maker, ends = library(told["library"]), (min(told["batches"]), max(told["batches"]))
    made = modules.pieces(run, "fp16", DEVICE, unrolled=0 if name == "step" else modules.UNROLLED)
    if name not in made:
        raise ExportError(f"a sampler of {len(run.table.rows)} evaluations is a loop of steps")
    made = {each: made[each] for each in ("backbone", name)}
    with TemporaryDirectory(dir=told["folder"]) as folder:
        file = onnx.write(made, Path(folder), ends, str, ["backbone"])[name]
        source = Source(name, file, partial(traced, name, made[name], ends))
        profile = Profile(*ends, portable=told["portable"])
        engines, static = _engines(source, profile, told["batches"], maker)
    runners = {size: Runner(name, it.data, it.about) for size, it in engines.items()}
    kind = "one size" if static else "all sizes"
    return Engines(runners), {"library": f"{maker.package} {maker.version}, {kind}"}


def _engines(
    source: Source, profile: Profile, sizes: Sequence[int], maker: Library
) -> tuple[dict[int, Engine], bool]:
    """An engine for each size alone, or where one has none, one for all; and which it is."""
    try:
        every = [build(source, replace(profile, low=n, high=n), maker) for n in sizes]
        return dict(zip(sizes, every, strict=True)), True
    except ExportError:
        return dict.fromkeys(sizes, build(source, profile, maker)), False


class Engines:
    """Engines for one batch size each as one function, whose first input tells the size."""

    def __init__(self, runners: Mapping[int, Runner]):
        self.runners = runners

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        self.last = self.runners[len(inputs[0])]
        return self.last(*inputs)

    def capturable(self) -> bool:
        return self.last.capturable()


WHOLE = "tensorrt-whole"
BUILT = {
    "eager": _eager,
    "compile": _compile,
    "tensorrt": _tensorrt,
    WHOLE: partial(_tensorrt, name="sampler"),
    "pt2": _pt2,
}


if __name__ == "__main__":
    main(*sys.argv[1:])
