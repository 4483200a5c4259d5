"""The benchmark of steps: what it compares, that every contender makes a step, what it prints."""

import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from hashlib import sha256
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from select import select
from threading import Thread

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
PEERS = {
    "loop.py": "866c1da63e223a23cbfdcdf9775cfc4558724ce63d09044eae3498d295b56d61",
    "networks.py": "455629de29011d7efbd0dba1eda256709d76c771ec0e4cffc3f6fb99df837da7",
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


def test_peers_stay_as_they_were_measured():
    """Tables were made with them."""
    found = {p.name: sha256(p.read_bytes()).hexdigest() for p in TOOLS.glob("peers/*.py")}
    assert found == PEERS, "peers are not touched: make new ones"


def test_ours_is_a_run_that_steps(tool):
    ours = tool("bench.ours")
    with ours.opened("mean_flow", SMALL, 2, 8) as session:
        step = ours.stepping(session, 2)
        losses = [float(step()) for _ in range(2)]
        assert session.done == 2 and all(math.isfinite(loss) for loss in losses)
        assert ours.forward(session, 2)().shape == (2, 4, 8, 8)


LONG = "from bench import one; one.LOOK = 0.05; one.main(*__import__('sys').argv[1:])"


def test_what_takes_long_says_where_it_is(tmp_path):
    """So that the log of what was not done in time shows whether it compiled."""
    told = {"spec": "", "precision": "fp32", "network": "dit", "form": "eager", "family": "dit"}
    sizes = {name: size for name, size in SIZES.items() if name != "side"}
    told |= {"sizes": sizes, "side": 8, "batch": 2, "dream": False, "passes": 3, "steps": 5}
    task, result = tmp_path / "a.task", tmp_path / "a.json"
    task.write_text(json.dumps(told))
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (TOOLS.parent, TOOLS)))}
    command = [sys.executable, "-c", LONG, str(task), str(result)]
    ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **paths})
    assert ended.returncode == 0, ended.stderr
    assert "one.py" in ended.stderr and "in peer_measured" in ended.stderr
    assert json.loads(result.read_text())["recompiled"] == 0


def measured(seconds, **kernels):
    """What a contender of the table may have been found to do."""
    found = {"seconds": seconds, "kernels": {n: (c, 10.0) for n, c in kernels.items()}}
    found |= {"share": 0.25, "allocated": 3.0, "reserved": 4.0, "first": 100.0, "recompiled": 0}
    return found | {"hits": {}, "matmul": 790e12, "device": "a GPU", "torch": "2.11"}


def test_the_table_says_what_follows_from_it(tool):
    step, rows, report = tool("bench_step"), tool("bench.rows"), tool("bench.report")
    row = step.chosen("sd15:8", "", tiny=False)
    results = {
        ("sd15:8", rows.COMPILED): measured(0.2),
        ("sd15:8", rows.PLAIN): measured(0.1, triton_poi_fused_add_3=3, _words=2, nvjet=1),
        ("sd15:8", rows.BARE): measured(0.098, triton_poi_fused_add_4=2, nvjet=1) | {"update": 2},
        ("sd15:8", rows.EAGER): {"error": "OutOfMemoryError: too much"},
    }
    said = report.table({"sd15:8": row}, results, ["train.clip=0"])
    assert "| SD1.5 UNet | 8 | ours | 80.0 | 25.0% | 3.0 / 4.0 | 100.0 | 6 | 5 | 0 |" in said
    assert "| SD1.5 UNet | 8 | (a) eager | OutOfMemoryError: too much |" in said
    assert "ours is 2.00 times as fast as (b) compiled" in said
    more = "2 of them draws (more: 2 _words; 1 triton_poi_fused_add; fewer: none)"
    assert f"the objective takes 2.0% of the step and 3 kernels, {more}" in said
    assert said.splitlines()[0].endswith("a GPU, torch 2.11; ours with train.clip=0")
    assert "fused element by element 50.0%, matrix products 50.0%" in said


@pytest.mark.parametrize(
    ("hits", "said"),
    [
        ({"fxgraph_cache_hit": 2, "async_compile_cache_miss": 9}, "| 100.0 cached |"),
        ({"fxgraph_cache_hit": 2, "fxgraph_cache_miss": 1}, "| 100.0 |"),
        ({"fxgraph_cache_miss": 1}, "| 100.0 |"),
        ({}, "| 100.0 |"),
    ],
)
def test_a_step_is_cached_if_nothing_of_it_was_missing(tool, hits, said):
    row = tool("bench_step").chosen("dit", "", tiny=False)
    assert said in tool("bench.report").line(row, "ours", measured(0.1) | {"hits": hits})


def test_a_row_that_does_not_exist_is_told():
    command = [sys.executable, str(TOOLS / "bench_step.py"), "--rows", "sd16"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1 and "there is no row `sd16`: use one of sd15" in ended.stderr


MEASURES = """
import json, sys, time
from pathlib import Path
from bench import gauge

result, says = Path(sys.argv[1]), sys.argv[2]
times = [time.monotonic()]
result.with_suffix(".here").touch()
while len([*result.parent.glob("*.here")]) < 3:
    time.sleep(0.01)
if says == "compiles":
    while len([*result.parent.glob("*.json")]) < 2:
        times.append(time.monotonic())
        time.sleep(0.01)
else:
    gauge.alone()
    times = [time.monotonic()]
    time.sleep(1)
    times.append(time.monotonic())
result.write_text(json.dumps(times))
sys.exit(says if says == "it fell over" else None)
"""


def test_processes_side_by_side_measure_one_after_the_other(tool, tmp_path):
    """They want to at the same time, and a third does something else all the while."""
    crew, ended = tool("bench.crew"), {}
    works = []
    for number, says in enumerate(("", "it fell over", "compiles")):
        result = tmp_path / f"{number}.json"
        works.append(crew.Work(("-c", MEASURES, str(result), says), result))

    def told(running, error):
        ended[running.work.result] = error

    crew.Crew(["0"], 3, 300, told).run([[work] for work in works])
    assert [ended[work.result] for work in works] == ["", "it fell over", ""]
    *spans, others = (json.loads(work.result.read_text()) for work in works)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(sorted(spans)))
    assert not any(begin < t < end for t in others for begin, end in spans)


def test_what_is_not_done_in_time_is_ended_and_told(tool, tmp_path):
    crew, ended = tool("bench.crew"), []
    work = crew.Work(("-c", "import time; time.sleep(60)"), tmp_path / "late.json")
    crew.Crew(["0"], 1, 0.5, lambda _, error: ended.append(error)).run([[work], [work]])
    assert ended == [crew.LATE]


STARTS = (
    "import subprocess as s, sys; s.run(['sh', '-c', f'(echo begun; sleep 60) > {sys.argv[1]}'])"
)


def test_what_a_process_started_ends_with_it(tool, tmp_path):
    crew, pipe = tool("bench.crew"), tmp_path / "pipe"
    os.mkfifo(pipe)
    held = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    one = crew.Crew(["0"], 1, 60, print)
    crewing = Thread(
        target=one.run, args=[[[crew.Work(("-c", STARTS, str(pipe)), tmp_path / "a.json")]]]
    )
    crewing.start()
    said = []
    for _ in range(2):
        assert select([held], [], [], 30)[0]
        said.append(os.read(held, 99))
        one.stop()
    crewing.join()
    os.close(held)
    assert said == [b"begun\n", b""]  # nobody is left who might write


def test_what_was_said_may_end_inside_a_character(tool, tmp_path):
    step, crew = tool("bench_step"), tool("bench.crew")
    args = Namespace(gpu="0", together=1, limit=1, set=[], json=None)
    bench = step.Bench({}, args)
    work = crew.Work((), tmp_path / "a.json")
    work.log.write_bytes("begun\nkilled at 99 %…".encode()[:-1])
    bench.keys[work.result] = [("dit", "ours")]
    bench._keep(crew.Running(work, [], "0", None), crew.last_line(work.log))
    found = bench.results["dit", "ours"]
    assert found["error"].startswith("killed at 99 %") and found["log"].startswith("begun\n")


def test_works_wait_for_room_on_a_gpu(tool, tmp_path, monkeypatch):
    crew = tool("bench.crew")
    monkeypatch.setattr(crew, "size", lambda gpu: 84.0)
    one = crew.Crew(["0", "1"], 3, 60, print)
    big, small = (crew.Work((), tmp_path / "x", gb) for gb in (50.0, 20.0))
    one.running = [crew.Running(big, [], "0", None), crew.Running(small, [], "1", None)]
    assert not one._fits("0", [big]) and one._fits("0", [small]) and one._fits("1", [small, big])
    one.places[big.result] = "1"
    near = crew.Work((), tmp_path / "y", 20.0, beside=big.result)
    assert not one._fits("0", [near]) and one._fits("1", [near])
    paused = crew.Running(big, [], "0", None, [[1.0, 2.0], [4.0, 9.0]])
    assert paused.waited(1.5, 6.0) == 2.5


def test_what_waits_for_room_beside_something_is_not_overtaken_there(tool, tmp_path):
    crew, ended = tool("bench.crew"), []
    naps = ("-c", "import time; time.sleep(0.5)")
    first = crew.Work(naps, tmp_path / "first", 40.0)
    near = crew.Work(naps, tmp_path / "near", 50.0, beside=first.result)
    small = crew.Work(naps, tmp_path / "small", 30.0)
    one = crew.Crew(["0"], 2, 60, lambda running, _: ended.append(running.work.result.name))
    one.room["0"] = 75.0
    one.run([[first], [near], [small]])
    assert ended == ["first", "near", "small"]


def test_what_is_wanted_most_is_measured_first(tool, tmp_path):
    step, rows = tool("bench_step"), tool("bench.rows")
    asked = {name: step.chosen(name, "", tiny=False) for name in rows.WHOLE}
    args = Namespace(gpu="0", together=1, limit=1, set=["train.clip=0"], tiny=False, steps=5)
    args.spread = True
    bench = step.Bench(asked, args)
    pieces = bench._pieces(tmp_path)
    keys = [bench.keys[work.result] for (work,) in pieces]
    shared = keys.index([("sd15", "ours"), ("dream", "ours")])  # one process for both
    assert len(pieces) == len({*(key for several in keys for key in several)}) - 2
    order = [key for several in keys for key in several if key in rows.WANTED]
    assert [key for key in order if key[0] != "dream"][:6] == list(rows.WANTED[:6])
    works = {key: work for (work,) in pieces for key in bench.keys[work.result]}
    ours, bare, last = (works["sd15", label] for label in (rows.PLAIN, rows.BARE, rows.LAST))
    assert bare.beside == ours.result == works["dream", rows.DREAM].beside and not last.beside
    told = json.loads(Path(pieces[shared][0].command[1]).read_text())
    assert told["settings"] == {"data.batch": "16", "train.clip": "0"}


def test_the_best_batch_of_several_is_told(tool):
    step, rows, report = tool("bench_step"), tool("bench.rows"), tool("bench.report")
    asked = {name: step.chosen(name, "", tiny=False) for name in ("dit", "dit:128")}
    results = {
        ("dit", rows.COMPILED): measured(0.13),
        ("dit", rows.PLAIN): measured(0.12),
        ("dit:128", rows.PLAIN): measured(0.2) | {"gpu": "1"},
        ("dit:128", rows.COMPILED): measured(0.32),
    }
    said = report.table(asked, results, [])
    assert "ours 640.0 img/s at 128, (b) compiled 492.3 at 64: 1.30 times as fast" in said
    assert "ours is 1.60 times as fast as (b) compiled, on GPUs with 790 and 790 TFLOP/s" in said


def test_small_rows_are_not_called_by_the_sizes_of_large_ones(tool):
    chosen = tool("bench_step").chosen
    assert chosen("sct", "", tiny=True).title == "tiny sCT"
    assert chosen("sct", "", tiny=False).title == "sCT, 1,024 tokens"


def test_every_bar_of_a_row_is_told(tool):
    """The fastest form of a peer among them, though it is not what most people run."""
    step, rows, report = tool("bench_step"), tool("bench.rows"), tool("bench.report")
    taken = {rows.PLAIN: 0.1, rows.COMPILED: 0.3, rows.GRAPHS.label: 0.16}
    results = {("small", label): measured(seconds) for label, seconds in taken.items()}
    said = report.table({"small": step.chosen("small", "", tiny=False)}, results, [])
    for times, bar in ((3.0, rows.COMPILED), (1.6, rows.GRAPHS.label)):
        assert f"- SD1.5 UNet, batch 2: ours is {times:.2f} times as fast as {bar}\n" in said


def test_a_row_without_a_bar_is_told_at_several_batches(tool):
    step, rows, report = tool("bench_step"), tool("bench.rows"), tool("bench.report")
    asked = {name: step.chosen(name, "", tiny=False) for name in ("dream", "dream:8")}
    pair = {rows.PLAIN: measured(0.1), rows.DREAM: measured(0.14)}
    results = {(name, label): one for name in asked for label, one in pair.items()}
    said = report.table(asked, results, [])
    for batch in (16, 8):
        assert f"- DREAM, batch {batch}: a step of ours, DREAM takes 1.40 times one of ours" in said


def test_the_update_alone_is_that_of_a_step(tool):
    """Its kernels are counted: it must not do less, whatever the precision."""
    ours = tool("bench.ours")
    with ours.opened("dit", {**SMALL, "train.precision": "bf16"}, 2, 8) as session:
        before = {name: value.clone() for name, value in session.state.items()}
        with torch.compiler.set_stance("force_eager"):
            ours.updating(session)()
        moved = {n for n, v in session.state.items() if not torch.equal(v, before[n])}
    assert {"weights", "half", "average", "updates", "turn"} <= moved


# ---- long runs


def test_a_watched_run_is_a_run(tool, tmp_path, monkeypatch):
    """Its steps are told as they come; checkpoints and samples are made as ever."""
    watched, told = tool("bench.watched"), []
    monkeypatch.chdir(tmp_path)
    settings = SMALL | {"train.log_every": "1", "sample.count": "1", "sample.solver.steps": "1"}
    spec = str(TOOLS / "bench" / "dit.diff")
    with watched.watching(2, told.append):
        watched.trained({"spec": spec, "settings": settings, "steps": 4, "side": 8, "rows": 4})
    assert [line["step"] for line in told] == [1, 2, 3, 4]
    assert [line["step"] for line in told if "held" in line] == [2, 4]
    assert all(math.isfinite(line["loss"]) for line in told)
    assert list(Path("run/checkpoints").glob("step-000000004.*")) and Path("run/samples").is_dir()


def test_a_window_s_error_is_that_of_its_mean(tool):
    """Of noise around a curve that falls far more than it scatters."""
    curves = tool("bench.curves")
    noise = torch.randn(400, 100, generator=torch.Generator().manual_seed(0)).double().numpy()
    error = curves.standard_error(noise + torch.linspace(10, 0, 100).double().numpy())
    assert abs(error.mean() - noise.mean(1).std()) < 0.01
    few = curves.windows([3.0, 1.0, 2.0, 2.0, 9.0], [1.0, 1.0, 2.0, 0.0], 2)
    assert [(w.first, w.last, w.means, w.difference) for w in few] == [
        (1, 2, (2.0, 1.0), 1.0),
        (3, 4, (2.0, 1.0), 1.0),
    ]


def test_the_report_of_long_runs(tool, tmp_path):
    long, curves = tool("bench_long"), tool("bench.curves")
    fast = [1.0, 0.8, 0.7, 0.5, 0.4, 0.4]
    losses = {"fast": fast, "plain": [1.0, 0.9, 0.5, 0.5]}
    machine = {"device": "a GPU", "torch": "2.11"}
    looks = [{"held": {"allocated": a, "reserved": 9.0}, "compiled": 1} for a in (5, 5.5, 5.5)]
    looks = [one | {"most": {"allocated": 8.0, "reserved": 9.0}} for one in looks]
    steps = [{"step": n + 1, "loss": loss} for n, loss in enumerate(fast)]
    lines = [one | looks[n // 2] if n % 2 else one for n, one in enumerate(steps)]
    said = long.report({"fast": [machine, *lines], "plain": [machine]}, losses, 2)
    assert "| 1 to 2 | 0.9000 | 0.9500 | -5.0e-02 | 1.0e-01 |" in said
    assert "The largest difference of two means is +1.0e-01, in steps 3 to 4" in said
    row = "| fast | 6 | 1 | 0 | 5.000 / 9.000 at 2 | 5.500 / 9.000 at 6 | 8.000 / 9.000 | 4 |"
    assert row in said and "| plain | 0 | | | | | | |" in said
    curves.drawn(losses, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_a_long_run_that_does_not_exist_is_told():
    command = [sys.executable, str(TOOLS / "bench_long.py"), "--runs", "sd16"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1 and "there is no run `sd16`: use one of fast" in ended.stderr
