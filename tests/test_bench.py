"""The benchmark of steps: what it compares, that every contender makes a step, what it prints."""

import math
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from difftrain.training.bundle import compile_spec

TOOLS = Path(__file__).parents[1] / "tools"
SIZES = {"width": 64, "depth": 2, "heads": 1, "side": 8}
SMALL = {
    "backbone.width": "64",
    "backbone.depth": "2",
    "backbone.heads": "1",
    "data.batch": "2",
    "train.precision": "fp32",
    "train.compile": "off",
}


@pytest.fixture
def tool(monkeypatch):
    """Imports a module of the tools."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return import_module


def test_every_row_names_contenders_that_it_has(tool):
    for row in tool("bench.rows").ROWS.values():
        labels = [contender.label for contender in row.contenders]
        named = {*row.faster, *row.around, *(label for pair in row.costs for label in pair)}
        assert len(set(labels)) == len(labels) and named <= set(labels)


@pytest.mark.parametrize("path", sorted(TOOLS.glob("bench/*.diff")), ids=lambda path: path.stem)
def test_every_spec_compiles(path):
    assert compile_spec(path).manifest["shapes"]["batch"]


def test_every_spec_is_in_a_row_and_every_row_s_spec_is_there(tool):
    contenders = [c for row in tool("bench.rows").ROWS.values() for c in row.contenders]
    specs = {contender.spec for contender in contenders if contender.spec}
    assert specs == {path.stem for path in TOOLS.glob("bench/*.diff")}


def test_a_peer_trains_and_averages(tool):
    peers, networks = tool("peers.loop"), tool("peers.networks")
    torch.manual_seed(0)
    network, call = networks.dit(**SIZES)
    loop = peers.Loop(network, call, peers.EAGER, torch.float32)
    before = [weight.clone() for weight in network.parameters()]
    losses = [loop.step(torch.randn(2, 4, 8, 8), torch.tensor([1, 2])) for _ in range(3)]
    assert all(math.isfinite(loss) for loss in losses)
    moved = zip(before, network.parameters(), loop.average.shadow_params, strict=True)
    assert any(not torch.equal(old, new) and not torch.equal(new, kept) for old, new, kept in moved)


def test_ours_is_a_run_that_steps(tool):
    ours = tool("bench.ours")
    with ours.opened("mean_flow", SMALL, 2, 8) as session:
        step = ours.stepping(session, 2)
        losses = [float(step()) for _ in range(2)]
        assert session.done == 2 and all(math.isfinite(loss) for loss in losses)
        assert ours.forward(session, 2)().shape == (2, 4, 8, 8)


def measured(seconds, **kernels):
    """What a contender of the table may have been found to do."""
    found = {"seconds": seconds, "kernels": {n: (c, 10.0) for n, c in kernels.items()}}
    found |= {"share": 0.25, "allocated": 3.0, "reserved": 4.0, "first": 100.0, "recompiled": 0}
    return found | {"hits": {}, "matmul": 790e12, "device": "a GPU", "torch": "2.11"}


def test_the_table_says_what_follows_from_it(tool):
    step, rows = tool("bench_step"), tool("bench.rows")
    row = step.chosen("sd15:8", "", tiny=False)
    results = {
        ("sd15:8", rows.COMPILED): measured(0.2),
        ("sd15:8", rows.PLAIN): measured(0.1, triton_poi_fused_add_3=5, nvjet=1),
        ("sd15:8", rows.BARE): measured(0.098, triton_poi_fused_add_4=2, nvjet=1),
        ("sd15:8", rows.EAGER): {"error": "OutOfMemoryError: too much"},
    }
    said = step.report({"sd15:8": row}, results)
    assert "| SD1.5 UNet | 8 | ours | 80.0 | 25.0% | 3.0 / 4.0 | 100.0 | 6 | - | 0 |" in said
    assert "| SD1.5 UNet | 8 | (a) eager | OutOfMemoryError: too much |" in said
    assert "ours is 2.00 times as fast as (b) compiled" in said
    more = "(more: 3 triton_poi_fused_add; fewer: none)"
    assert f"the objective takes 2.0% of the step and 3 kernels {more}" in said
    assert "fused element by element 50.0%, matrix products 50.0%" in said


def test_a_row_that_does_not_exist_is_told():
    command = [sys.executable, str(TOOLS / "bench_step.py"), "--rows", "sd16"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1 and "there is no row `sd16`: use one of sd15" in ended.stderr
