"""The table of samplers: what it measures and when, what it reads, what it prints."""

import json
import sys
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
ALL = "tensorrt,tensorrt-whole,compile,eager,pt2"


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield import_module("bench_sample")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of a few evaluations, which draws arrays."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exported.write(folder)
        return str(folder / exported.train("arrays"))


def asked(**changed) -> Namespace:
    """The arguments of a call."""
    plain = {"work": "dit-jump1,unet-dpm20", "only": ALL, "batch": "1,8", "run": "", "gpus": 1}
    plain |= {"mode": "default", "library": "auto", "portable": False, "json": "", "child": ""}
    return Namespace(**plain | changed)


# ---- what is measured


def test_the_most_wanted_is_measured_first(tool):
    found = [(job.work, job.column, job.batches) for job in tool.jobs(asked())]
    assert found == [
        ("dit-jump1", "tensorrt", (1, 8)),
        ("dit-jump1", "compile", (1,)),
        ("unet-dpm20", "tensorrt", (1, 8)),
        ("unet-dpm20", "compile", (1,)),
        ("dit-jump1", "compile", (8,)),
        ("dit-jump1", "tensorrt-whole", (1, 8)),
        ("dit-jump1", "eager", (1, 8)),
        ("unet-dpm20", "compile", (8,)),
        ("unet-dpm20", "eager", (1, 8)),
        ("dit-jump1", "pt2", (1,)),
        ("unet-dpm20", "pt2", (1,)),
        ("dit-jump1", "pt2", (8,)),
        ("unet-dpm20", "pt2", (8,)),
    ]


def test_a_run_goes_before_the_works(tool):
    found = tool.jobs(asked(work="dit-jump1", only="tensorrt-whole", batch="4", run="runs/a"))
    assert found == [
        tool.Job("run", "tensorrt-whole", (4,)),
        tool.Job("dit-jump1", "tensorrt-whole", (4,)),
    ]


def test_every_column_is_built_and_every_work_is_a_spec(tool):
    assert tool.BUILT.keys() == tool.COLUMNS.keys() >= {*tool.LOOPED, *tool.ALONE}
    assert {*tool.FEW} <= {"run", *tool.WORKS}
    for name, text in tool.WORKS.items():
        assert compile_text(name, text).manifest["shapes"]["batch"]


# ---- what is read


def test_rows_are_read_up_to_a_cut(tool, tmp_path):
    out, job = tmp_path / "a.json", tool.Job("dit-jump1", "tensorrt", (1, 8, 16))
    row = {"work": "dit-jump1", "column": "tensorrt", "batch": 1, "ms": 2.0}
    out.write_text(json.dumps(row) + '\n{"work": "dit-jump1", "batch": 8')
    lost = [{**row, "batch": batch, "why": "no time"} for batch in (8, 16)]
    for each in lost:
        del each["ms"]
    assert tool._read(out, job, "no time") == [row, *lost]
    assert len(tool._read(tmp_path / "none.json", job, "failed (1)")) == 3


def test_a_process_that_fails_and_one_without_time_say_so(tool, monkeypatch):
    ended = [sys.executable, "-c", "raise SystemExit(3)"]

    def start(args, job, gpu, out):
        return tool.subprocess.Popen(ended, start_new_session=True)

    monkeypatch.setattr(tool, "_started", start)
    found: list[dict] = []
    tool._all(asked(work="dit-jump1", only="tensorrt", limit=30.0), found)
    assert [(row["batch"], row["why"]) for row in found] == [(1, "failed (3)"), (8, "failed (3)")]
    found.clear()
    tool._all(asked(work="dit-jump1", only="tensorrt", limit=0.0), found)
    assert [row["why"] for row in found] == ["no time", "no time"]


# ---- what is printed


def test_the_table(tool):
    plain = {"work": "dit-jump1", "batch": 1, "latents": 1e-3, "images/s": 500.0, "build s": 9}
    rows = [
        {**plain, "column": "compile", "ms": 4.0, "one call": 2e-3},
        {**plain, "column": "tensorrt", "ms": 2.0, "one call": 2e-3, "library": "rtx 1"},
        {**plain, "column": "tensorrt-whole", "ms": 1.0, "library": "rtx 1"},
        {"work": "dit-jump1", "column": "pt2", "batch": 8, "why": "no time"},
    ]
    title, _, head, rule, *lines = tool.table(rows).splitlines()
    assert "from noise and conditions to latents: no text, no decoding" in title
    assert "unet-lcm4 is a plain UNet under `multistep`, without `w`" in title
    assert lines == [
        "| dit-jump1 | 1 | compile, static | 4.00 | 500.0 | 2.0e-03 | 1.0e-03 | 1.00x | 9 s |",
        "| dit-jump1 | 1 | rtx 1 | 2.00 | 500.0 | 2.0e-03 | 1.0e-03 | 2.00x | 9 s |",
        "| dit-jump1 | 1 | rtx 1, whole sampler | 1.00 | 500.0 |  | 1.0e-03 | 4.00x | 9 s |",
        "| dit-jump1 | 8 | pt2 | no time | | | | | |",
    ]
    assert {line.count("|") for line in (head, rule, *lines)} == {10}


# ---- what a process measures


@pytest.fixture
def quick(tool, monkeypatch):
    monkeypatch.setattr(tool, "SECONDS", 0.0)
    return tool


def test_a_column_is_measured_for_every_batch(quick, run, tmp_path):
    out = tmp_path / "a.json"
    quick._measure(asked(child="run,eager", batch="1,3", run=run, json=str(out)))
    rows = quick._read(out, quick.Job("run", "eager", (1, 3)), "failed")
    assert [row["batch"] for row in rows] == [1, 3] and all("why" not in row for row in rows)
    assert all(0 < row["latents"] < 1e-2 and row["one call"] < 1e-2 for row in rows)
    assert quick.table(rows).count("| run |") == 2


@torch.no_grad()
@pytest.mark.parametrize("whole", [True, False])
def test_a_whole_sampler_walks_as_its_steps(quick, run, whole):
    with opened(run, "tensorrt") as it:
        exact = quick.piece(it, "fp32")
        made = modules.pieces(it, "fp32", quick.DEVICE)["sampler"] if whole else exact

        def call(*inputs):
            found = quick.called(made)(*inputs)
            return found if isinstance(found, tuple) else (found,)

        row = quick._row(it, 3, exact, call, False, whole)
    assert row["latents"] < 1e-6 and ("one call" in row) != whole and row["ms"] > 0


def test_a_long_sampler_is_no_whole_one(quick, run):
    refused = pytest.raises(ExportError, match="a sampler of 12 evaluations is a loop of steps")
    with opened(run, "tensorrt", {"sample.solver": "euler(steps = 12)"}) as it, refused:
        quick.BUILT[quick.WHOLE](it, (1, 2), asked())


@torch.no_grad()
@pytest.mark.parametrize("column", ["tensorrt", "tensorrt-whole"])
def test_engines_are_built_also_where_none_can_be_opened(quick, run, column):
    here = torch.cuda.is_available()
    with opened(run, "tensorrt") as it:
        refused = pytest.raises(Refused, match="does not run here")
        with nullcontext() if here else refused:
            call, said = quick.BUILT[column](it, (1, 2), asked(portable=True))
            assert call.inputs[0] == ("x" if column == "tensorrt" else "noise") and said["library"]
