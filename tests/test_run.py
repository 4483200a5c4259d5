"""Whole runs: what they leave behind, how they go on, what they say."""

import gc
import json

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from difftrain.cli import main
from difftrain.commands.failure import FAILED
from difftrain.training import evaluate, samples, state
from difftrain.training.bundle import Bundle, compile_spec

LAST = "checkpoints/step-000000004.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a finished run of four steps; tests only read it."""
    folder = tiny.home(tmp_path_factory.mktemp("home"), held_out=3, sample="seed = 5")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "tiny.diff"]) == 0
    return folder


def told(capsys, *argv: str) -> tuple[int, list[str]]:
    """The exit code and what was said, without the progress bar."""
    code = main(list(argv))
    lines = capsys.readouterr().err.replace("\r", "\n").split("\n")
    return code, [line.strip() for line in lines if line.strip() and "step/s" not in line]


# ---- what a run leaves behind


def test_files_of_a_run(home):
    run = home / "runs" / "tiny"
    kept = {p.name for p in run.iterdir()}
    assert kept >= {"spec.diff", "manifest.json", "step.py", "graph.txt", "log", "validation.json"}
    tensors = load_file(run / LAST)
    assert {name.partition("/")[0] for name in tensors} == {
        *state.BUFFERS, *state.COUNTERS, "scale", "seed"
    }  # fmt: skip
    assert tensors["turn"] == 4
    facts = state.facts(run / LAST, json.loads((run / "manifest.json").read_text())["graph"])
    assert facts["step"] == "4" and len(json.loads(facts["vocabulary"])) > 8


def test_the_grid_says_how_it_was_made(home):
    text = Image.open(home / "runs" / "tiny" / "samples.png").text
    assert text["step"] == "4" and text["guidance"] == "2" and text["seed"] == "5"
    assert text["solver"].startswith("ddim")


def test_scalars_are_for_tensorboard(home):
    log = EventAccumulator(str(home / "runs" / "tiny" / "log")).Reload()
    assert set(log.Tags()["scalars"]) >= {"loss", "gradient", "rate"}
    assert [event.step for event in log.Scalars("loss")] == [1, 2, 3, 4]


def test_losses_on_unseen_pictures(home):
    losses = json.loads((home / "runs" / "tiny" / "validation.json").read_text())
    assert set(losses) == {"loss", "shuffled", "mean"} and all(0 < v < 100 for v in losses.values())


# ---- drawing from it


def test_samples_are_those_of_the_run(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    before = tiny.contents(home)
    out = tmp_path / "grid.png"
    assert main(["sample", "runs/tiny", "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes() == (home / "runs/tiny/samples.png").read_bytes()
    assert tiny.contents(home) == before


def test_prompts_counts_and_settings(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    made = [tmp_path / f"{i}.png" for i in range(3)]
    drawn = [
        samples.sample(f"runs/tiny/{LAST}", prompts=["picture a"], count=3, out=made[0]),
        samples.sample("runs/tiny", prompts=["picture a", "picture b"], out=made[1]),
        samples.sample("runs/tiny", {"sample.guidance": "5"}, prompts=["picture a"], out=made[2]),
    ]
    assert drawn == made
    assert [Image.open(path).size for path in made] == [(140, 164), (72, 164), (72, 84)]
    assert Image.open(made[2]).text["guidance"] == "5"


# ---- going on


def test_a_resumed_run_equals_an_uninterrupted_one(here, capsys):
    folder = here(train="save_every = 0")
    assert main(["train", "--steps", "6", "--out", "whole"]) == 0
    assert main(["train", "--steps", "3"]) == 0
    capsys.readouterr()
    code, said = told(capsys, "train", "--steps", "6", "--resume", "auto")
    name = "checkpoints/step-000000006.safetensors"
    assert code == 0
    assert f"resumed at step 3 from runs/tiny/{name.replace('6', '3')}" in said
    whole, resumed = (load_file(folder / run / name) for run in ("whole", "runs/tiny"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    grids = [(folder / run / "samples.png").read_bytes() for run in ("whole", "runs/tiny")]
    assert grids[0] == grids[1]


def test_another_network_that_the_weights_fit_is_told(here, capsys):
    """Heads are no shape of any weight, and dropout may change in the middle of a run."""
    here()
    assert main(["train", "--steps", "1"]) == 0
    capsys.readouterr()
    code, said = told(
        capsys, "train", "--steps", "1", "--resume", "auto", "--set", "backbone.heads=4"
    )
    assert code == 0
    assert "its network had `heads = 2`, and goes on with `heads = 4`" in said
    code, said = told(capsys, "train", "--steps", "1", "--resume", "auto")
    assert code == 0 and not any("its network had" in line for line in said)


def test_a_run_is_never_written_over(here, capsys):
    folder = here()
    assert main(["train", "--steps", "1"]) == 0
    first = tiny.contents(folder / "runs" / "tiny")
    assert main(["train", "--steps", "1"]) == 0
    assert sorted(p.name for p in (folder / "runs").iterdir()) == [".latents", "tiny", "tiny-2"]
    capsys.readouterr()
    code, said = told(capsys, "train", "--steps", "1", "--out", "runs/tiny")
    assert code == 2
    assert said[-1] == (
        "error: `runs/tiny` is there already, and a new run never writes over an old one:"
        " give another folder, or go on with `--resume auto`"
    )
    assert tiny.contents(folder / "runs" / "tiny") == first


def test_a_run_of_no_steps_is_kept_as_well(here, capsys):
    folder = here()
    assert main(["train", "--steps", "0", "--out", "none"]) == 0
    first = folder / "none" / "checkpoints" / "step-000000000.safetensors"
    assert load_file(first)["turn"] == 0
    code, said = told(capsys, "train", "--steps", "1", "--resume", str(first), "--out", "one")
    assert code == 0 and f"resumed at step 0 from {first}" in said


@pytest.mark.parametrize(("module", "name"), [(samples, "draw"), (evaluate, "validate")])
def test_memory_that_is_full_behind_the_steps_is_told(here, monkeypatch, capsys, module, name):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    here(held_out=3)
    monkeypatch.setattr(module, name, full)
    code, said = told(capsys, "train", "--steps", "1")
    assert code == FAILED and "the memory is full while" in said[-1]
    assert "the last checkpoint is runs/tiny/checkpoints" in said[-1]


def test_after_a_run_garbage_is_looked_for_everywhere(here):
    here()
    gc.freeze()
    assert main(["train", "--steps", "0"]) == 0 and gc.get_freeze_count() == 0


def test_settings_are_part_of_the_run(here):
    folder = here()
    assert main(["train", "--set", "train.steps=1", "--set", "drop_condition.rate=0.3"]) == 0
    run = folder / "runs" / "tiny"
    assert (run / "checkpoints" / "step-000000001.safetensors").exists()
    settings = json.loads((run / "manifest.json").read_text())["settings"]
    assert settings == {"train.steps": "1", "drop_condition.rate": "0.3"}
    assert "0.3" in (run / "step.py").read_text()


def test_imported_files_come_along(here, tmp_path, monkeypatch):
    here()
    text = tiny.spec().replace("import std.sd\n", "import std.sd\nimport mine\n")
    text = text.replace("drop_condition(0.1)", "[drop_condition(0.1), mine.twice]")
    (tmp_path / "tiny.diff").write_text(text)
    (tmp_path / "mine.diff").write_text("diff 1\nstrategy twice { fit' = 2 * fit }\n")
    bundle = compile_spec("tiny.diff")
    assert "strategy twice" in bundle.texts["imports/mine.diff"]
    (tmp_path / "mine.diff").unlink()
    steps = Bundle(bundle.texts).read({"train.steps": "7"}).runs["train"]["steps"]
    assert steps == 7


# ---- what is said


@pytest.mark.parametrize(
    ("asked", "compilers", "says"),
    [
        ("off", True, "not compiled: `compile = off`"),
        ("auto", True, "not compiled: too few steps are left to gain from it"),
        ("auto", False, "not compiled: there is no C++ compiler on this machine"),
    ],
)
def test_whether_it_is_compiled(here, capsys, monkeypatch, asked, compilers, says):
    here(train=f"compile = {asked}")
    if not compilers:
        monkeypatch.setenv("PATH", "")
        monkeypatch.delenv("CXX", raising=False)
    code, said = told(capsys, "train", "--steps", "1")
    assert code == 0 and says in said
    assert "no losses on unseen pictures: the data have no held-out split to validate on" in said


def test_a_measured_decision(here, capsys):
    here(backbone=tiny.FROZEN)
    code, said = told(capsys, "train")
    assert code == 0
    assert any(line.startswith("not compiled: 4 steps of 0.") for line in said)
    warning = "warning: the text encoder is random and stays so: give it `weights`, or"
    assert f"{warning} `train = true`" in said


def test_a_loss_that_is_not_finite_ends_the_run(here, capsys):
    folder = here(more="  loss = fit + exp(100 * step)\n", train="save_every = 1, keep = 5")
    code, said = told(capsys, "train")
    assert code == 4
    kept = "runs/tiny/checkpoints/step-000000001.safetensors"
    assert said[-1] == (
        f"error: the loss is inf at step 2, so the run stops: the last checkpoint is {kept};"
        " try a smaller learning rate"
    )
    assert [p.name for p in (folder / kept).parent.iterdir()] == ["step-000000001.safetensors"]
