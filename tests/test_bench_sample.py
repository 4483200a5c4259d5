"""The table of samplers: what it measures and when, what it reads, what it prints."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

import exported
import pytest
import torch

from difftrain.export import modules
from difftrain.export.errors import ExportError
from difftrain.export.opened import opened
from difftrain.export.running import Refused
from difftrain.training.bundle import compile_text

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield import_module("bench_sample")


@pytest.fixture(scope="module")
def sampler(tool):
    return import_module("bench.sampler")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of a few evaluations, which draws arrays."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exported.write(folder)
        return str(folder / exported.train("arrays"))


def asked(tool, **changed) -> Namespace:
    """The arguments of a call."""
    plain = {"work": ",".join(tool.WORKS), "only": ",".join(tool.COLUMNS), "batch": "1,8"}
    plain |= {"run": "", "gpu": "0", "together": 3, "limit": 60.0, "json": None}
    plain |= {"more": False, "ready": 0}
    plain |= {"mode": "default", "library": "auto", "portable": False}
    return Namespace(**plain | changed)


def told(column, *batches, **changed) -> dict:
    """The task of a process."""
    plain = {"work": "run", "column": column, "batches": list(batches), "run": "", "spec": ""}
    plain |= {"mode": "default", "library": "auto", "portable": False, "folder": None}
    return plain | changed


# ---- what is measured


def test_what_a_file_has_is_not_measured_again(tool, tmp_path):
    file = tmp_path / "a.json"
    there = {"dit-jump1 | compile | 1": {"ms": 2.0}, "dit-jump1 | compile | 8": {"why": "late"}}
    file.write_text(json.dumps(there))
    told = {"work": "dit-jump1", "only": "compile,eager", "json": file}
    again, more = tool.Bench(asked(tool, **told)), tool.Bench(asked(tool, **told, more=True))
    found = [(job.column, job.batches) for job in more.jobs]
    assert len(again.jobs) == 3 and found == [("eager", (1, 8)), ("compile", (8,))]
    assert more.rows["dit-jump1", "compile", 1] == {"ms": 2.0}


def test_where_a_process_crashed_is_told(tool, tmp_path):
    file = tmp_path / "a.crash"
    code = f"import faulthandler, os\nfaulthandler.enable(open({str(file)!r}, 'w'))\nos.abort()"
    assert tool.crashed(file) == ""
    assert subprocess.run([sys.executable, "-c", code]).returncode < 0
    assert tool.crashed(file) == '(File "<string>", line 3 in <module>)'


def test_a_cache_is_a_folder_of_the_compilers(tool, tmp_path):
    found = tool.caches(tmp_path)
    assert {Path(place).parent for place in found.values()} == {tmp_path} and len(found) == 2


def test_the_most_wanted_is_measured_first(tool):
    """One work after the other, each at one sample before many; then what takes long."""
    found = [(job.work, job.column, job.batches) for job in tool.jobs(asked(tool))]
    works = ["dit-jump1", "unet-lcm4", "dit-euler50", "unet-dpm20"]
    each = [("tensorrt", (1, 8)), ("compile", (1,)), ("eager", (1, 8)), ("compile", (8,))]
    few = [(work, "tensorrt-whole", (1, 8)) for work in works[:2]]
    last = [(work, "pt2", (batch,)) for work in works for batch in (1, 8)]
    assert found == [(work, *one) for work in works for one in each] + few + last


def test_a_run_goes_before_the_works(tool):
    args = asked(tool, work="dit-jump1", only="tensorrt-whole", batch="4", run="runs/a")
    assert tool.jobs(args) == [
        tool.Job("run", "tensorrt-whole", (4,)),
        tool.Job("dit-jump1", "tensorrt-whole", (4,)),
    ]


def test_what_does_not_exist_is_told(tool):
    for changed in ({"work": "dit-jump2"}, {"only": "eager,tensor"}):
        with pytest.raises(SystemExit, match="there is no `(dit-jump2|tensor)` here: use one of"):
            tool.jobs(asked(tool, **changed))


def test_every_column_is_built_and_every_work_is_a_spec(tool, sampler):
    assert sampler.BUILT.keys() == tool.COLUMNS.keys() >= {*tool.LATER, *tool.ALONE}
    assert sampler.WHOLE == tool.WHOLE and {*tool.FEW} <= {"run", *tool.WORKS}
    for name, text in tool.WORKS.items():
        assert compile_text(name, text).manifest["shapes"]["batch"]


def test_a_unet_may_compile_for_minutes(tool, tmp_path):
    """A work is told what it needs, stays on the GPU of its first process, and may take long."""
    bench = tool.Bench(asked(tool, work="unet-lcm4,unet-dpm20", only="compile"))
    works = [bench._work(job, tmp_path / str(n)) for n, job in enumerate(bench.jobs)]
    assert all(work.limits[0] >= 480 and work.memory for work in works)
    first, second = works[0].result, works[2].result
    assert [work.beside for work in works] == [None, first, None, second]
    task = json.loads(Path(works[3].command[1]).read_text())
    assert task["column"] == "compile" and task["batches"] == [8]
    assert task["spec"] == tool.WORKS["unet-dpm20"] and not task["run"]


# ---- what becomes of a process that does not do it

PROCESS = """
import json, os, signal, sys, time
from pathlib import Path
from bench.crew import TURN

told, result = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
plain = {"ms": 2.0, "images/s": 500.0, "latents": 1e-3, "build s": 9, "device": "a GPU"}
lines = [json.dumps({"batch": b, "torch": "2.13", **plain}) + chr(10) for b in told["batches"]]
if told["column"] == "eager":
    sys.exit("it fell over")
if told["column"] == "compile":
    print("compiling", flush=True)
    time.sleep(600)
while not Path(os.environ[TURN]).exists():
    os.kill(os.getpid(), signal.SIGSTOP)
if told["column"] == "pt2":
    os.kill(os.getpid(), signal.SIGSEGV)
if told["column"] == "tensorrt":
    result.write_text(lines[0] + lines[1][:9])
    time.sleep(600)
result.write_text("".join(lines))
"""


@pytest.fixture
def bench(tool, tmp_path, monkeypatch):
    """Makes a bench of processes that do as their columns say."""
    (tmp_path / "one.py").write_text(PROCESS)
    monkeypatch.setattr(tool, "ONE", tmp_path / "one.py")
    monkeypatch.setattr(import_module("bench.crew"), "SETTLED", 0.0)
    return lambda **changed: tool.Bench(asked(tool, work="dit-jump1", **changed))


def test_what_hangs_or_dies_is_told_and_others_are_measured(tool, bench, tmp_path, monkeypatch):
    monkeypatch.setitem(tool.COLUMNS, "compile", 2)
    monkeypatch.setattr(tool, "MEASURING", 3)
    file = tmp_path / "all.json"
    one = bench(json=file)
    one.run()
    slow, died = "not ready to be measured after 2 s", "Segmentation fault: it said nothing"
    assert {key[1:]: row.get("why", row.get("ms")) for key, row in one.rows.items()} == {
        ("tensorrt", 1): 2.0,
        ("tensorrt", 8): "not measured after 3 s",
        ("compile", 1): slow,
        ("compile", 8): slow,
        ("eager", 1): "it fell over",
        ("eager", 8): "it fell over",
        ("tensorrt-whole", 1): 2.0,
        ("tensorrt-whole", 8): 2.0,
        ("pt2", 1): died,
        ("pt2", 8): died,
    }
    assert one.rows["dit-jump1", "compile", 1]["log"] == "compiling\n"
    assert json.loads(file.read_text())["dit-jump1 | compile | 8"]["why"] == slow


def test_time_spent_waiting_is_not_held_against_a_process(tool, tmp_path):
    crew = import_module("bench.crew")
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    now = time.monotonic()
    for seconds, late in ((300, False), (100, True)):
        work = crew.Work((), tmp_path / "a.json", limits=(seconds, 0))
        one = crew.Running(work, [], "0", process, [[now - 900, now - 200]], now - 950)
        assert one.late == late and not one.asks
    process.communicate()
    one.process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, one.process.pid, os.WEXITED | os.WNOWAIT)
    assert not one.asks  # it has ended, and nobody has seen it yet
    one.process.wait()


def test_what_was_measured_before_the_time_was_up_is_shown(tool, bench, tmp_path):
    file, late = tmp_path / "all.json", import_module("bench.crew").LATE
    one = bench(json=file, only="tensorrt,compile,pt2", together=1, limit=5.0)
    began = time.monotonic()
    one.run()
    assert time.monotonic() - began < 9
    shown = tool.table(one.rows).splitlines()
    assert shown[0].startswith("a GPU, torch 2.13, fp16")
    assert "| dit-jump1 | 1 | tensorrt | 2.00 | 500.0 |  | 1.0e-03 |  | 9 s |" in shown
    assert sum(line.endswith(f"| {late} | | | | | |") for line in shown) == len(one.rows) - 1 == 5
    assert len(json.loads(file.read_text())) == 6


# ---- what is printed


def test_the_table(tool):
    plain = {"latents": 1e-3, "images/s": 500.0, "build s": 9}
    rows = {
        ("dit-jump1", "tensorrt-whole", 1): {**plain, "ms": 1.0, "library": "rtx 1"},
        ("dit-jump1", "tensorrt", 1): {**plain, "ms": 2.0, "library": "rtx 1", "one call": 2e-3},
        ("dit-jump1", "pt2", 8): {"why": "a | b"},
        ("dit-jump1", "compile", 1): {**plain, "ms": 4.0, "one call": 2e-3},
        ("run", "eager", 16): {**plain, "ms": 3.0, "one call": 2e-3},
    }
    title, _, head, rule, *lines = tool.table(rows).splitlines()
    assert "from noise and conditions to latents: no text, no decoding" in title
    assert "unet-lcm4 is a plain UNet under `multistep`, without `w`" in title
    assert lines == [
        "| run | 16 | eager | 3.00 | 500.0 | 2.0e-03 | 1.0e-03 |  | 9 s |",
        "| dit-jump1 | 1 | rtx 1 | 2.00 | 500.0 | 2.0e-03 | 1.0e-03 | 2.00x | 9 s |",
        "| dit-jump1 | 1 | compile, one size | 4.00 | 500.0 | 2.0e-03 | 1.0e-03 | 1.00x | 9 s |",
        "| dit-jump1 | 1 | rtx 1, whole | 1.00 | 500.0 |  | 1.0e-03 | 4.00x | 9 s |",
        "| dit-jump1 | 8 | pt2 | a / b | | | | | |",
    ]
    assert {line.count("|") for line in (head, rule, *lines)} == {10}


def test_a_run_is_measured_and_shown(run, tmp_path):
    """All of it, as it is called: the table comes last, and nothing is compiled twice."""
    file = tmp_path / "all.json"
    command = [sys.executable, str(TOOLS / "bench_sample.py"), "--work", "", "--run", run]
    command += ["--only", "eager,compile", "--batch", "2", "--mode", "default"]
    command += ["--limit", "280", "--json", str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    *_, eager, compiled = sorted(ended.stdout.splitlines(), key=lambda line: "compile," in line)
    assert ended.returncode == 0 and eager in ended.stdout.splitlines()[-2:], ended.stderr
    for line, name in ((eager, "eager"), (compiled, "compile, one size")):
        work, batch, column, ms, images, one, latents, ratio, took = line.strip("| ").split(" | ")
        assert (work, batch, column) == ("run", "2", name), ended.stderr
        assert float(images) == pytest.approx(2000 / float(ms), rel=0.1)
        assert 0 < float(one) < 1e-2 and 0 < float(latents) < 1e-2
        assert ratio.endswith("x") and took.endswith(" s")
    rows = json.loads(file.read_text())
    assert [rows[f"run | {name} | 2"]["compiled"] for name in ("eager", "compile")] == [0, 1]


# ---- what a process measures


@pytest.fixture
def quick(sampler, monkeypatch):
    monkeypatch.setattr(sampler, "SECONDS", 0.0)
    return sampler


@torch.no_grad()
def test_a_column_is_measured_for_every_batch(quick, run):
    with opened(run, "tensorrt") as it:
        rows = list(quick.measured(it, told("eager", 1, 3, run=run)))
    assert [row["batch"] for row in rows] == [1, 3] and all("why" not in row for row in rows)
    assert all(0 < row["latents"] < 1e-2 and row["one call"] < 1e-2 for row in rows)
    assert all(row["images/s"] * row["ms"] == pytest.approx(1e3 * row["batch"]) for row in rows)


SMALL = {  # what makes the works small
    "sit.xl2(": "sit.transformer(depth = 1, width = 16, heads = 2, patch = 4, codec = sd.pixels, ",
    "sd.unet(": "sd.unet(codec = sd.pixels, channels = [8], layers = 1, heads = 2, attention = [0],"
    " groups = 4, ",
    "layers = 12, width = 768, heads = 12": "layers = 1, width = 16, heads = 2, length = 8",
    "import std.label": "import std.label\nimport std.sd",
    "256px": "8px",
    "512px": "8px",
}


@torch.no_grad()
@pytest.mark.parametrize("name", ["dit-jump1", "unet-lcm4"])
def test_a_work_that_was_never_trained_is_measured(tool, quick, name):
    text = tool.WORKS[name]
    for large, small in SMALL.items():
        text = text.replace(large, small)
    task = told("eager", 2, work=name, spec=text)
    with quick.work(task) as it:
        (row,) = quick.measured(it, task)
        one = quick._first(it, quick.piece(it, "fp32"), 2)
    assert 0 < row["latents"] < 1e-2 and row["network"].startswith("random")
    assert len({value.data_ptr() for value in one}) == len(one)  # else compiled for that alone


@torch.no_grad()
def test_a_batch_that_fails_leaves_the_others(quick, run, monkeypatch):
    def few(it, asked):
        step = quick.Step(quick.called(quick.piece(it, "fp16")), False)

        def call(*inputs):
            if len(inputs[0]) > 2:
                raise torch.OutOfMemoryError("too much\nfor this GPU")
            return step(*inputs)

        return quick.Step(call, False), {}

    monkeypatch.setitem(quick.BUILT, "eager", few)
    with opened(run, "tensorrt") as it:
        failed, done = quick.measured(it, told("eager", 1, 3, run=run))
    assert failed["batch"] == 3 and failed["why"] == "failed: OutOfMemoryError: too much"
    assert done["batch"] == 1 and done["ms"] > 0


@torch.no_grad()
@pytest.mark.parametrize("column", ["tensorrt-whole", "tensorrt"])
def test_a_whole_sampler_walks_as_its_steps(quick, run, column):
    with opened(run, "tensorrt") as it:
        step = quick.piece(it, "fp32")
        whole = modules.pieces(it, "fp32", quick.DEVICE)["sampler"]

        def call(*inputs):
            found = quick.called(whole if column == quick.WHOLE else step)(*inputs)
            return found if isinstance(found, tuple) else (found,)

        errors, again = quick.compared(it, quick.Step(call, False), column, 3)
        assert len(again()) == 3
    assert errors["latents"] < 1e-6 and ("one call" in errors) == (column != quick.WHOLE)


def test_a_long_sampler_is_no_whole_one(quick, run):
    refused = pytest.raises(ExportError, match="a sampler of 12 evaluations is a loop of steps")
    with opened(run, "tensorrt", {"sample.solver": "euler(steps = 12)"}) as it, refused:
        quick.BUILT[quick.WHOLE](it, told(quick.WHOLE, 1, 2))


@torch.no_grad()
@pytest.mark.parametrize("column", ["tensorrt", "tensorrt-whole"])
def test_engines_are_built_also_where_none_can_be_opened(quick, run, column):
    here = torch.cuda.is_available()
    with opened(run, "tensorrt") as it:
        refused = pytest.raises(Refused, match="does not run here")
        with nullcontext() if here else refused:
            call, said = quick.BUILT[column](it, told(column, 1, 2, portable=True))
            assert set(call.runners) == {1, 2} and said["library"]
