"""Several averages of the weights, their snapshots, and averages of other widths made from them."""

import json
import os

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_step import SPEC, Bench

from difftrain.cli import main
from difftrain.compiler.executable import unpack
from difftrain.compiler.layout import layout
from difftrain.compiler.update import follow, nearer
from difftrain.language.numbers import value
from difftrain.language.options import decays
from difftrain.language.term import walk
from difftrain.training import averages
from difftrain.training import state as states
from difftrain.training.bundle import compile_text, recipe
from difftrain.training.profiles import WIDEST, Profile, exponent, inner, reach, shares, width

POWERS = "[ema_power(0.05), ema_power(0.10)]"


def decay(text: str):
    """What `ema = text` says, in `step`."""
    spec = compile_text("tiny", f"{TINY}train {{ ema = {text} }}\n").read()
    return decays(spec.runs["train"])


TINY = tiny.spec().partition("train  {")[0]


# ---- profiles


@pytest.mark.parametrize(("std", "gamma"), [(0.05, 16.9722), (0.10, 6.93720)])
def test_exponents_are_those_of_the_paper(std, gamma):
    assert exponent(std) == pytest.approx(gamma, rel=1e-5)


def test_the_width_of_a_decay_is_read_off_its_numbers():
    own = "(1 - 1 / step)^3.5"
    found = decay(f"[ema_power(0.05), {own}, 0.999, ema_warmup(0.9999), 1 - 1 / step, 0]")
    gamma = 2.5
    std = (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5
    expected = [0.05, std, None, None, WIDEST, None]
    assert [width(d) for d in found] == [e and pytest.approx(e, rel=1e-9) for e in expected]
    assert exponent(std) == pytest.approx(gamma, rel=1e-9)


GIVEN = [Profile(t, std) for t in (40, 100, 1000) for std in (0.03, 0.1, 0.25)]


def test_inner_products_are_integrals():
    nodes, weights = np.polynomial.legendre.leggauss(200)
    for a in GIVEN:
        for b in GIVEN:
            end = min(a.updates, b.updates)
            t = end * (nodes + 1) / 2
            values = [
                (exponent(p.std) + 1) / p.updates * (t / p.updates) ** exponent(p.std)
                for p in (a, b)
            ]
            integral = (values[0] * values[1] * weights).sum() * end / 2
            assert inner([a], [b]).item() == pytest.approx(integral, rel=1e-7)


def test_a_profile_is_what_the_decays_make():
    (one,) = decay("ema_power(0.12)")
    inputs, last = [t for t in walk(one) if t.op == "input"], 60
    held = np.zeros(last)
    for n in range(1, last + 1):
        stays = value(one, dict.fromkeys(inputs, n))
        held = stays * held + (1 - stays) * (np.arange(1, last + 1) == n)
    edges = (np.arange(last + 1) / last) ** (exponent(0.12) + 1)
    assert held == pytest.approx(np.diff(edges), abs=1e-12)


# ---- other widths


def trajectory(last: int) -> np.ndarray:
    """Weights [last, 3] around 1 that fall as a loss does, and wander."""
    noise = np.random.default_rng(0).normal(size=(last, 3))
    falling = np.exp(-np.arange(1, last + 1) / (last / 4))[:, None] * [2, -1, 0.5]
    return 1 + falling + 0.05 * noise.cumsum(0) / last**0.5 + 0.1 * noise


def tracked(weights: np.ndarray, std: float) -> np.ndarray:
    """The average [last, 3] after every update."""
    average, found = weights[0], []
    for n, now in enumerate(weights, 1):
        stays = (1 - 1 / n) ** (exponent(std) + 1)
        average = stays * average + (1 - stays) * now
        found.append(average)
    return np.array(found)


@pytest.fixture(scope="module")
def path():
    """A trajectory of 4000 updates with two averages of it every 125."""
    weights, widths, every = trajectory(4000), (0.05, 0.10), range(125, 4001, 125)
    averaged = {std: tracked(weights, std) for std in widths}
    kept = {Profile(n, std): averaged[std][n - 1] for n in every for std in widths}
    return weights, kept


@pytest.mark.parametrize("std", [0.04, 0.075, 0.12, 0.15, 0.2])
@pytest.mark.parametrize("last", [4000, 2000])
def test_a_third_width_is_as_if_it_had_been_tracked(path, std, last):
    weights, kept = path
    given = {p: v for p, v in kept.items() if p.updates <= last}
    factors, off = shares(list(given), Profile(last, std))
    made = factors @ np.array(list(given.values()))
    apart = np.abs(weights[:last] - made).mean()
    assert np.abs(made - tracked(weights, std)[last - 1]).max() < 0.01 * apart
    assert off < 0.05


@pytest.mark.parametrize("std", [0.05, 0.10])
@pytest.mark.parametrize("last", [4000, 125])
def test_a_tracked_width_is_exact(path, std, last):
    given = [p for p in path[1] if p.updates <= last]
    factors, off = shares(given, Profile(last, std))
    assert factors == pytest.approx([float(p == Profile(last, std)) for p in given], abs=1e-9)
    assert off < 1e-6


def test_what_stands_still_stays(path):
    given = [p for p in path[1] if p.updates > 3000]
    assert shares(given, Profile(4000, 0.2))[0].sum() == pytest.approx(1, abs=1e-12)


def test_the_reach_of_snapshots(path):
    few, many = [Profile(1000, s) for s in (0.05, 0.10)], list(path[1])
    low, high = reach(few, 1000)
    assert low < 0.05 and 0.10 < high < 0.15
    wider = reach(many, 4000)
    assert wider[0] < low and wider[1] > 0.25
    assert all(shares(few, Profile(1000, std))[1] <= 0.1 for std in (low, high))


# ---- the step


def bench(text: str, precision="fp32") -> Bench:
    return Bench(precision, text=SPEC.replace("ema_warmup(0.9)", text))


def start(one: Bench) -> dict:
    further = [f"average.{n}" for n in recipe(one.bundle.read()).further]
    return states.fresh(one.weights.clone(), 0, 4, further, one.precision)


def test_the_step_moves_every_average():
    one = bench("[ema_power(0.1), 0.5, ema_warmup(0.9)]")
    state = start(one)
    made = decays(one.bundle.read().runs["train"])
    buffers = ("average", "average.2", "average.3")
    expected = {b: state[b].double() for b in buffers}
    for k in range(4):
        one.module.step(state, one.batch(k), one.modules, one.plan, one.tables)
        for buffer, term in zip(buffers, made, strict=True):
            inputs = [t for t in walk(term) if t.op == "input"]
            stays = value(term, dict.fromkeys(inputs, k + 1))
            moved = state["weights"].double()
            expected[buffer] = stays * expected[buffer] + (1 - stays) * moved
    for buffer in buffers:
        assert torch.allclose(state[buffer].double(), expected[buffer], atol=1e-6)
    apart = (state["average"] - state["average.2"]).abs().max()
    assert apart > 1e-4


def test_equal_averages_are_equal_wherever_they_stand():
    one = bench("[ema_power(0.1), 0.9, ema_power(0.1)]")
    state, _ = one.run(one.module.step, state=start(one))
    assert torch.equal(state["average"], state["average.3"])


def test_one_average_is_as_the_first_of_several():
    alone, several = bench("ema_power(0.1)"), bench("[ema_power(0.1), 0.9]")
    ours, _ = alone.run(alone.module.step)
    theirs, _ = several.run(several.module.step, state=start(several))
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_what_moves_an_average_is_traced_whole():
    torch._dynamo.reset()
    moving = bench(POWERS).module.decay_of_2

    def move(state, count):
        follow(state, "average.2", moving, count)
        return state["average.2"]

    traced = torch.compile(move, fullgraph=True, dynamic=False, backend="aot_eager")
    first, second = ({"weights": torch.arange(3.0), "average.2": torch.ones(3)} for _ in "ab")
    for count in torch.arange(1.0, 4):
        assert torch.allclose(traced(first, count), move(second, count))


def test_after_an_overflow_no_average_moves():
    one = bench(POWERS, "fp16")
    state, batch = start(one), one.batch(0)
    batch["x0"] = batch["x0"] * float("inf")
    one.module.step(state, batch, one.modules, one.plan, one.tables)
    assert torch.equal(state["average.2"], one.weights) and state["updates"] == 0


def test_what_comes_in_late_has_all_its_digits():
    decay = bench("ema_power(0.05)").module.averaging
    moved = nearer(torch.zeros(1), torch.ones(1), decay, torch.tensor(1e6))
    assert moved.item() == pytest.approx(17.9722e-6, rel=1e-5)


# ---- whole runs


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run of ten steps, two averages and a snapshot every two; and one that
    tracked another width. Tests only read it."""
    folder = tiny.home(
        tmp_path_factory.mktemp("averages"), train=f"ema = {POWERS}, snapshots_every = 2"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fast = ["train", "--steps", "10", "--set", "train.optimizer.lr=0.02"]
        assert main([*fast, "--out", "two"]) == 0
        third = ("train.ema=ema_power(0.08)", "train.snapshots_every=0")
        assert main([*fast, "--set", third[0], "--set", third[1]]) == 0
    return folder


@pytest.fixture
def there(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


def average(path) -> dict[str, torch.Tensor]:
    return {n: v for n, v in load_file(path).items() if n.startswith("average/")}


def test_snapshots_hold_every_average(home):
    found = sorted(p.name for p in (home / "two" / "snapshots").iterdir())
    assert found == [f"step-{n:09d}.safetensors" for n in (2, 4, 6, 8, 10)]
    last, whole = (home / "two" / at / found[-1] for at in ("snapshots", "checkpoints"))
    short, long = load_file(last), load_file(whole)
    assert set(short) == {n for n in long if n.startswith(("average/", "average.2/"))}
    assert all(torch.equal(v, long[n].half()) for n, v in short.items())
    with safe_open(last, "pt") as file:
        facts = file.metadata()
    assert facts["step"] == facts["updates"] == "10"
    assert json.loads(facts["widths"]) == pytest.approx({"average": 0.05, "average.2": 0.1})


def test_without_the_option_there_are_none(home):
    assert not (home / "runs" / "tiny" / "snapshots").exists()


def test_another_width_is_as_if_it_had_been_tracked(there, capsys, tmp_path):
    made = tmp_path / "made.safetensors"
    assert main(["ema", "two", "--std", "0.08", "-o", str(made)]) == 0
    told = capsys.readouterr()
    assert told.out == f"{made}\n"
    assert told.err.startswith("width 0.08 at step 10 of 10 averages, ")
    name = "step-000000010.safetensors"
    theirs = average(there / "runs/tiny/checkpoints" / name)
    first, ours = average(there / "two/checkpoints" / name), average(made)
    assert ours.keys() == theirs.keys()
    far, near = (sum((w[n] - theirs[n]).norm() ** 2 for n in theirs) for w in (first, ours))
    assert near < 0.1**2 * far


def test_a_tracked_width_is_its_snapshot(there, tmp_path):
    made = tmp_path / "made.safetensors"
    assert main(["ema", "two", "--std", "0.1", "--step", "6", "-o", str(made)]) == 0
    snapshot = load_file("two/snapshots/step-000000006.safetensors")
    for name, ours in average(made).items():
        theirs = snapshot[name.replace("average/", "average.2/")]
        assert torch.allclose(ours, theirs.float(), atol=1e-7)


def test_samples_of_another_width(here, capsys, tmp_path):
    here(train=f"ema = {POWERS}, snapshots_every = 1")
    assert main(["train", "--steps", "2"]) == 0
    assert main(["ema", "runs/tiny", "--std", "0.07"]) == 0
    made = "runs/tiny/averages/std-0.07-step-000000002.safetensors"
    assert capsys.readouterr().out.endswith(f"{made}\n")
    elsewhere = tmp_path / "elsewhere.safetensors"
    elsewhere.write_bytes((tmp_path / made).read_bytes())
    assert main(["sample", made, "-o", "a.png"]) == 0
    assert main(["sample", "runs/tiny", "--weights", str(elsewhere), "-o", "b.png"]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert Image.open("a.png").text["width"] == "0.07"
    assert main(["train", "--steps", "1", "--set", f'train.start_from="{made}"']) == 0


def test_a_resumed_run_equals_an_uninterrupted_one(here):
    folder = here(train=f"ema = {POWERS}, snapshots_every = 2, save_every = 0")
    assert main(["train", "--steps", "6", "--out", "whole"]) == 0
    assert main(["train", "--steps", "4"]) == 0
    assert main(["train", "--steps", "6", "--resume", "auto"]) == 0
    for at in ("checkpoints", "snapshots"):
        name = f"{at}/step-000000006.safetensors"
        whole, resumed = (load_file(folder / run / name) for run in ("whole", "runs/tiny"))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    assert any(name.startswith("average.2/") for name in whole)


def test_numbers_too_large_for_fp16_stay_as_they_are(tmp_path):
    modules = {"student": torch.nn.Linear(2, 1)}
    plan = layout(modules)
    current = {"average": torch.tensor([1e5, 1.0, 0.5]), "updates": torch.tensor(3)}
    path = averages.keep(tmp_path, current, plan, {"step": "3"}, {}, {"average": 0.1})
    kept = load_file(path)
    assert kept["average/student.weight"].dtype == torch.float32
    assert kept["average/student.bias"].dtype == torch.float16


def test_a_compiled_spec_counts_every_buffer(there):
    assert main(["compile", "tiny.diff", "-o", "packed"]) == 0
    manifest = json.loads(unpack(there / "packed")["manifest.json"])
    assert manifest["state"]["buffers"] == [*states.BUFFERS, "average.2"]


# ---- what is refused


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["runs/tiny", "--std", "0.1"],
            "`runs/tiny` has no snapshots: train with `snapshots_every` in `train`, such as"
            " `snapshots_every = 1000`",
        ),
        (["away", "--std", "0.1"], "there is no run `away`: give a folder that training wrote"),
        (
            ["two", "--std", "0.1", "--step", "5"],
            "`two` has no snapshot of step 5: choose one of 2, 4, 6, 8, 10",
        ),
        (
            ["two", "--std", "0.012"],
            "the snapshots of `two` cannot be put together to an average of width 0.012 (what comes"
            " nearest is 51% off): choose one between 0.035 and 0.17",
        ),
        (
            ["two", "--std", "0.5"],
            "`0.5` is no width of an average: give a number between 0 and 0.288",
        ),
        (["two"], "`difftrain ema` needs --std"),
    ],
)
def test_what_ema_refuses(there, capsys, argv, says):
    assert main(["ema", *argv]) == 2
    assert capsys.readouterr().err == f"error: {says}\n"


@pytest.mark.parametrize(
    "out",
    ["/dev/null", "two/manifest.json", "two/checkpoints/step-000000010.safetensors", "two"],
)
def test_an_average_replaces_averages_alone(there, capsys, out):
    before = os.stat(out)
    assert main(["ema", "two", "--std", "0.08", "-o", out]) == 2
    what = "is a folder" if out == "two" else "is there already and is no average that `difftrain"
    what += "" if out == "two" else " ema` wrote"
    assert capsys.readouterr().err == f"error: `{out}` {what}: give the name of another file\n"
    after = os.stat(out)
    assert (after.st_ino, after.st_mtime) == (before.st_ino, before.st_mtime)


def test_other_averages_are_told_at_once_and_refused(here, capsys):
    here(train="ema = [0.9, ema_warmup(0.99)], snapshots_every = 1")
    assert main(["train", "--steps", "1"]) == 0
    assert "warning: no average is a power function of the step" in capsys.readouterr().err
    assert main(["ema", "runs/tiny", "--std", "0.1"]) == 2
    assert capsys.readouterr().err == (
        "error: the averages of `runs/tiny` are no power functions of the step, and only those can"
        " be put together: train with `ema = [ema_power(0.05), ema_power(0.10)]`\n"
    )


def test_training_does_not_go_on_from_an_average(there, capsys):
    path = "two/snapshots/step-000000010.safetensors"
    assert main(["train", "--steps", "12", "--resume", path, "--out", "more"]) == 2
    assert capsys.readouterr().err.endswith(
        f"error: `{path}` holds an average, and training goes on from all of its state: resume from"
        " a checkpoint\n"
    )


def test_weights_that_are_not_there(there, capsys):
    assert main(["sample", "two", "--weights", "away.safetensors"]) == 2
    assert capsys.readouterr().err == (
        "error: there is no file `away.safetensors`: give a checkpoint, or one that `difftrain ema`"
        " wrote\n"
    )
