"""The benchmark of starts: what is read of what a process wrote, and the line of the table."""

import io
import os
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest

from difftrain.training.keeping import Keeping

STANDS = "training `waves` on 8 arrays [1, 4] of `waves.npz`: 20 weights, cpu, in run"
BAR = "\r  0%|          | 0/6 [00:00<?, ?step/s]\r                                       \r"
MADE = "the step was compiled: 33.1 s to the first step"
FACTS = {"device": "x86_64", "torch": "2.11.0"}


@pytest.fixture
def tool(monkeypatch):
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    return import_module("bench_start")


def noted(tool, *said: str):
    """The start of a process that writes these lines, as a pipe gives them, one a second."""
    written = "\n".join(["compiled: `compile = on`", *said, ""]).encode()
    start = tool.Start()
    for passed, line in enumerate(io.TextIOWrapper(io.BytesIO(written), "utf-8")):
        tool._note(start, line, float(passed))
    return start


def test_a_start_is_read_from_what_was_written(tool):
    told = Keeping().told(FACTS, True, seconds=6.25, reading=6.11)
    start = noted(tool, STANDS, BAR + told)
    assert start == tool.Start(1.0, 5.0, 6.1, "the compiled step is out of this file")


@pytest.mark.parametrize("told", [MADE, Keeping().told(FACTS, False, 33.1, 30.0)])
def test_a_step_that_was_compiled_was_not_read(tool, told):
    start = noted(tool, STANDS, told)
    assert (start.stepped, start.reading) == (2.0, 0.0) and start.said in told


def test_a_process_that_ends_without_a_step_is_told_by_its_last_line(tool):
    start = noted(tool, STANDS, "the memory is full, so the run stops: no checkpoint was written")
    assert not start.stepped and start.said == "the memory is full, so the run stops"


def test_a_line_of_the_table_has_the_medians(tool, tmp_path, monkeypatch):
    """Of written starts: what a process costs is told by the functions that would begin one."""
    said = "the compiled step is out of this file"
    starts = iter(tool.Start(4.0 + n, 9.0 + 2 * n, 1.5 + n, said) for n in (0, 2, 1))
    seconds = {tool.OURS: 2.0, f"{tool.OURS}; {tool.COMPILER}": 5.5}

    def compiled(spec, out, *told):
        assert told == ("auto", ["data.batch=2"], 9.0)
        out.write_bytes(bytes(3_000_000))
        return 40.0

    monkeypatch.setattr(tool, "compiled", compiled)
    monkeypatch.setattr(tool, "imported", lambda made, code: seconds[code])
    monkeypatch.setattr(tool, "started", lambda made, limit: next(starts))
    args = Namespace(target="auto", set=["data.batch=2"], side=4, times=3, limit=9.0)
    line = tool.line(Path("waves.diff"), tmp_path, args)
    cells = "40.0 | 3.0 | 2.0 | 3.5 | 5.0 | 6.0 | 2.5 | 11.0"
    assert line == f"| waves | {cells} | {said} |"
    assert line.count("|") == len(tool.COLUMNS) + 1


# ---- what a process is started in


def test_a_process_finds_what_lies_on_the_path_and_no_checkout(tool, tmp_path, monkeypatch):
    packages = tmp_path / "packages"
    (packages / "lark").mkdir(parents=True)
    checkout = Path(__file__).parents[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["packages", "", str(checkout)]))
    started = tool.caching(tmp_path / "cache")
    assert started["PYTHONPATH"] == str(packages)
    assert tool.caching(tmp_path, checkout)["PYTHONPATH"] == f"{checkout}{os.pathsep}{packages}"
    assert started["TRITON_CACHE_DIR"] == str(tmp_path / "cache" / "triton")
    assert {**os.environ, **started} == started
    monkeypatch.delenv("PYTHONPATH")
    assert tool.caching(tmp_path)["PYTHONPATH"] == ""


def test_bytecode_is_kept_where_torch_has_none(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path / "empty"))
    assert tool.bytecode(tmp_path) == {
        "PYTHONPYCACHEPREFIX": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "",
    }
    assert capsys.readouterr().err == (
        "torch has no bytecode here, so it is kept for these processes\n"
    )
