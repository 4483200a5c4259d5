"""Every method of the library, and a user's own, from text to samples: linted, explained, compiled,
trained for two steps and drawn from, on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from methods.library import (
    BEFORE,
    EDM,
    GUIDED,
    LABELS,
    METHODS,
    SEEN,
    SIT,
    STRAIGHT,
    TABLE,
    TRIG,
    UNET,
    spec,
)
from objectives import batch, declared, draws, nets
from PIL import Image
from safetensors.torch import load_file

from difftrain.cli import main
from difftrain.compiler.draws import Draws
from difftrain.compiler.executable import unpack
from difftrain.compiler.program import compile_quantities
from difftrain.training import evaluate
from difftrain.training.bundle import compile_spec
from difftrain.training.known import Known
from difftrain.training.parts import build_parts

LAST = "checkpoints/step-000000002.safetensors"


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """The folder of all runs, with labelled pictures."""
    folder = tmp_path_factory.mktemp("methods")
    tiny.photos(folder / "photos")
    table = folder / "photos" / "metadata.jsonl"
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    kinds = [{**line, "kind": ("warm", "cold")[i % 2]} for i, line in enumerate(lines)]
    table.write_text("\n".join(map(json.dumps, kinds)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def trained(name: str) -> Path:
    """The run of a method, made where it is not there."""
    Path(f"{name}.diff").write_text(spec(**METHODS[name]))
    if name in BEFORE:
        trained(BEFORE[name])
    if not Path(name).exists():
        assert main(["train", f"{name}.diff", "--out", name]) == 0
    return Path(name)


def drawn(run: Path, *more: str) -> np.ndarray:
    """Pictures uint8 [2, 3, 16, 16] of a run."""
    assert main(["sample", str(run), "--save", "drawn.npz", "-o", f"{run}.png", *more]) == 0
    with np.load("drawn.npz") as file:
        return file["pictures"]


# ---- from text to samples


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_and_samples(name, capsys):
    run = trained(name)
    for command in ("lint", "explain"):
        assert main([command, f"{name}.diff"]) == 0
    assert "no findings" in capsys.readouterr().err
    tensors = load_file(run / LAST)
    assert all(v.isfinite().all() for v in tensors.values() if v.is_floating_point())
    heads = ("student", "project", "logvar")  # text is heard when the gates, at first 0, are open
    for head in heads:
        gradients = [v for n, v in tensors.items() if n.startswith(f"second/{head}.")]
        assert not gradients or any(v.any() for v in gradients), head
    pictures = drawn(run)
    assert pictures.std() > 1 and not np.array_equal(pictures[0], pictures[1])
    assert Path(f"{name}.png").read_bytes() == (run / "samples.png").read_bytes()


def test_a_network_that_jumps_is_told_where_to():
    bundle = compile_spec(trained("mean_flow").with_suffix(".diff"))
    assert ", r=" in bundle.texts["estimates.py"]
    once = drawn(Path("mean_flow"), "--set", "sample.solver=jump(steps = 1)")
    assert not np.array_equal(once, drawn(Path("mean_flow")))


def test_guidance_inside_is_an_input_of_the_network():
    run = trained("lcm")
    assert json.loads((run / "manifest.json").read_text())["guidance"] == {"lcm.w": [1.0, -1.0]}
    weights = load_file(run / LAST)
    assert weights["average/student.further.w.mlp.2.weight"].any()
    strong, weak = (drawn(run, "--set", f"sample.guidance={scale}") for scale in (9, 1))
    assert not np.array_equal(strong, weak)


@pytest.mark.parametrize("name", ["lcm", "scd"])
def test_a_teacher_is_another_run_s_average(name, capsys):
    trained(BEFORE[name])
    Path("again.diff").write_text(spec(**METHODS[name]))
    still = ["--set", "train.optimizer=adamw(0, weight_decay = 0)", "--out", f"{name}-still"]
    assert main(["train", "again.diff", *still]) == 0
    assert f"the teacher is {BEFORE[name]}\n" in capsys.readouterr().err
    begun, theirs = load_file(f"{name}-still/{LAST}"), load_file(f"{BEFORE[name]}/{LAST}")
    shared = [n for n in begun if n.startswith("weights/student") and "further" not in n]
    assert all(torch.equal(begun[n], theirs[n.replace("weights/", "average/")]) for n in shared)


def test_sampling_starts_from_the_noise_of_the_objective():
    bundle = compile_spec(trained("noise").with_suffix(".diff"))
    Path("plain.diff").write_text(spec(**METHODS["sit"]))
    assert "noise.py" in bundle.texts and "noise.py" not in compile_spec("plain.diff").texts
    law = evaluate.programs(bundle, "cpu").noise
    like = {"x0": torch.zeros(64, 3, 16, 16)}
    noise = law.compute(like, Draws(0, 0, torch.arange(64)), {}, {})["eps@0"]
    assert -1 <= noise.min() < -0.99 and 0.99 < noise.max() <= 1 and abs(noise.mean()) < 0.01


@pytest.mark.parametrize("name", ["repa_mean_flow", "scd", "lcm", "two_encoders"])
def test_an_executable_is_measured(name):
    Path(f"{name}.diff").write_text(spec(**METHODS[name]))
    assert main(["compile", f"{name}.diff", "-o", f"{name}-made"]) == 0
    manifest = json.loads(unpack(f"{name}-made")["manifest.json"])
    assert manifest["flops"]["per sample"] > 0 and "student" in manifest["state"]["weights"]


def test_weights_in_bf16_are_measured_as_in_fp32():
    counts = []
    for precision in ("fp32", "bf16"):
        text = spec(**{**METHODS["sit"], "train": f"precision = {precision}"})
        Path("precise.diff").write_text(text)
        assert main(["compile", "precise.diff"]) == 0
        counts.append(json.loads(unpack("precise")["manifest.json"])["flops"]["per sample"])
    assert counts[0] == counts[1]


# ---- compositions


def test_a_weight_keeps_the_term_beside_it():
    objective = declared(
        "process = linear\nprediction_type = flow\nstrategy = [repa(0.5), min_snr(5)]"
    )
    names = ("loss", "fit", "repa.align", "snr", "x0_hat")
    made = compile_quantities(objective, names)
    tables, given = made.tables("cpu", torch.float64), batch()
    values = made.compute(given, draws(), nets(), tables)
    error = (values["x0_hat"] - given["x0"]).square().flatten(1).mean(1)
    torch.testing.assert_close(values["fit"], values["snr"].clamp(max=5) * error)
    torch.testing.assert_close(values["loss"], values["fit"] + 0.5 * values["repa.align"])


def test_dropout_is_the_same_in_both_forwards_of_a_step():
    bundle = compile_spec(trained("ict").with_suffix(".diff"))
    parts = build_parts(bundle.read().objective(), Known(("cold", "warm")), 0, "cpu", size=16)
    parts.weights.normal_()
    network, met = parts.nets(parts.weights, {})["student"], []
    x, t, cond = torch.ones(2, 3, 16, 16), torch.ones(2), torch.zeros(2, 1, dtype=torch.int64)

    def recorded(*args, masks=None):
        met.append(network(x, t, cond, masks=masks))
        return network(*args, masks=masks)

    made = evaluate.programs(bundle, "cpu")
    given = {"x0": x, "cond": cond, "null": cond[:1], "step": torch.zeros(())}
    for step in range(2):
        draw = Draws(0, step, torch.arange(2))
        made.step.compute(given, draw, {"student": recorded}, made.tables["step"])
    first, second, later, _ = met
    assert torch.equal(first, second) and not torch.equal(first, later)
    assert not torch.equal(first, network(x, t, cond))


# ---- a user's own process, prediction and strategy

OWN = """
process bent(wave in 0..1 = 0.3) {
  t ~ uniform(0.01, 0.99)
  alpha = cos(pi * t / 2) + wave * t * (1 - t)
  sigma = sin(pi * t / 2) * (1 + wave * t^2)
}
prediction tilted { target = 0.5 * x0 - alpha * eps }
strategy gentle(rate in 0..10 = 0.5) {
  eps' = eps + rate * sigma * stop(eps_hat - eps)
  fit' = log(1 + snr) * mse(x0_hat, x0)
}
"""
USED = """
process = {0}bent(wave = 0.2)
prediction_type = {0}tilted
strategy = [{0}gentle(rate = 0.25), drop_condition(0.5)]
logsnr ~ uniform(-4, 4)
"""


def own(imported: bool) -> str:
    """A spec with all three, defined in it or in the file `mine.diff` beside it."""
    text = spec(USED.format("mine." * imported), sample=GUIDED)
    Path("mine.diff").write_text(f"diff 1{OWN}")
    added = "diff 1\nimport mine" if imported else f"diff 1{OWN}"
    return text.replace("diff 1", added, 1) if imported else text.replace("\nobj", f"{OWN}\nobj", 1)


def test_own_definitions_are_equal_to_the_library_s(capsys):
    runs = []
    for name, imported in (("apart", True), ("whole", False)):
        Path(f"{name}.diff").write_text(own(imported))
        assert main(["lint", f"{name}.diff"]) == 0
        assert main(["train", f"{name}.diff", "--out", name]) == 0
        assert drawn(Path(name)).std() > 1
        runs.append(load_file(f"{name}/{LAST}"))
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[1])
    assert Path("apart.png").read_bytes() == Path("apart/samples.png").read_bytes()
    capsys.readouterr()
    assert main(["explain", "whole.diff"]) == 0
    page = capsys.readouterr().out
    assert "logsnr from 4 (data) to -4 (noise)" in page
    assert "1 forward with gradient, 1 forward without" in page


def test_the_executable_of_own_definitions_needs_no_other_file(tmp_path):
    Path("packed.diff").write_text(own(imported=True))
    assert main(["compile", "packed.diff", "-o", str(tmp_path / "packed")]) == 0
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [sys.executable, "-I", str(tmp_path / "packed"), "--out", "out", "--data"]
    photos = str(Path("photos").resolve())
    done = subprocess.run([*command, photos], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "out" / "samples.png").size[1] > 16


def test_a_level_without_a_closed_form_is_solved_for():
    Path("level.diff").write_text(own(imported=False))
    objective = compile_spec("level.diff").read().objective()
    made = compile_quantities(objective, ("logsnr",))
    drawing = draws(64)
    values = made.compute({"x0": torch.zeros(64, 1, 1, 1)}, drawing, {}, {})
    torch.testing.assert_close(values["logsnr"], drawing.uniform("t", -4, 4), atol=1e-6, rtol=0)


# ---- what cannot be

WRONG = {
    "without r": (
        {"lines": STRAIGHT + "strategy = mean_flow", "solver": "jump"},
        "the network is not given `r`, the earlier time of this objective",
    ),
    "fused attention": (
        {
            "lines": STRAIGHT + "strategy = mean_flow",
            "net": "times = [t, r], attention = fused",
            "solver": "jump",
        },
        "`attention = fused` cannot be differentiated along the path",
    ),
    "without tap": (
        {"lines": STRAIGHT + "strategy = repa" + SEEN},
        "the objective reads `tap`, and the network returns its output alone",
    ),
    "deep tap": (
        {"lines": STRAIGHT + "strategy = repa" + SEEN, "net": "tap = 3"},
        "there is no block 3 whose features could be `tap`",
    ),
    "not shown": (
        {"lines": STRAIGHT + "strategy = self_condition"},
        "`self_condition` changes nothing here",
    ),
    "times left out": (
        {"lines": STRAIGHT + "strategy = importance(uniform(0.2, 1))"},
        "this law leaves out times that the objective is about",
    ),
    "a curriculum backwards": (
        {"lines": EDM + "strategy = ict(total = 2, start = 20, end = 10)", "solver": "multistep"},
        "`ict` needs `start <= end`",
    ),
    "a second tap": (
        {"lines": EDM + "strategy = repa" + SEEN, "backbone": UNET.format(", tap = 2")},
        "`tap` cannot be `2`",
    ),
    "without data": (
        {"lines": STRAIGHT + "strategy = sct", "solver": "multistep"},
        "`linear` has no `data`",
    ),
    "another row": (
        {"lines": STRAIGHT + "strategy = ct(total = 2)", "solver": "multistep"},
        "`ct` needs `alpha == 1`",
    ),
    "without steps": (
        {
            "lines": "process = vp\nprediction_type = epsilon\nstrategy = lcm",
            "net": "inputs = [lcm.w]",
            "solver": "multistep",
        },
        "`vp` has no `steps`",
    ),
    "no score": (
        {
            "lines": STRAIGHT + "eps ~ uniform_noise(x0, -1, 1)",
            "solver": "euler_maruyama(steps = 3)",
        },
        "`euler_maruyama` cannot sample `o`",
    ),
    "no such estimate": (
        {"lines": TRIG + "strategy = sct"},
        "`euler` cannot sample `o`",
    ),
    "no teacher": (
        {"lines": TRIG + "strategy = scd", "solver": "multistep"},
        "the objective reads `teacher`, a trained network, and this file has none",
    ),
    "no teacher of a table": (
        {
            "lines": TABLE.format("epsilon") + "strategy = lcm(skip = 4)",
            "net": "inputs = [lcm.w]",
            "solver": "multistep",
        },
        "the objective reads `teacher`, a trained network, and this file has none",
    ),
    "no vision": (
        {"lines": STRAIGHT + "strategy = repa", "net": "tap = 1"},
        "the objective reads `vision`, an encoder of pictures, and this file has none",
    ),
}
LATE = {
    "another size": (
        {
            "lines": TRIG + "strategy = scd",
            "backbone": SIT.format(LABELS, "").replace("width = 16", "width = 32"),
            "train": 'teacher = "trig_flow"',
            "solver": "multistep",
        },
        "`trig_flow` does not fit the teacher of this spec, since it has `",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_one_finding(name, capsys):
    parts, says = WRONG[name]
    Path("wrong.diff").write_text(spec(**parts))
    assert main(["lint", "wrong.diff"]) == 1
    told = capsys.readouterr()
    assert told.out.startswith("error[DIF") and f"]: {says}\n" in told.out
    assert told.err == "1 error in 1 file\n"
    assert main(["train", "wrong.diff", "--out", "wrong"]) == 1 and not Path("wrong").exists()


@pytest.mark.parametrize("name", LATE)
def test_what_cannot_begin_is_told_before_anything_is_written(name, capsys):
    parts, says = LATE[name]
    trained("trig_flow")
    Path("late.diff").write_text(spec(**parts))
    assert main(["lint", "late.diff"]) == 0
    capsys.readouterr()
    assert main(["train", "late.diff", "--out", "late"]) in (1, 2) and not Path("late").exists()
    assert says in capsys.readouterr().err
