"""Samples of finished runs: what `sample` takes, writes and remembers, and models that guide."""

import json
import os
import re

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

from difftrain.cli import main
from difftrain.training import evaluate, samples
from difftrain.training.bundle import block
from difftrain.training.folder import open_run

FIRST, LAST = (f"runs/tiny/checkpoints/step-{n:09d}.safetensors" for n in (1, 4))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a finished run of four steps and all its checkpoints, and one of another
    process; tests write beside them."""
    folder = tmp_path_factory.mktemp("home")
    tiny.home(folder, held_out=3, sample="seed = 5", train="save_every = 1, keep = 9")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "tiny.diff"]) == 0
        other = ["--set", "process=ddpm(beta = linear)", "--steps", "1", "--out", "runs/other"]
        assert main(["train", "tiny.diff", *other]) == 0
        pixels = ["--set", "backbone.codec=sd.pixels", "--steps", "1", "--out", "runs/pixels"]
        assert main(["train", "tiny.diff", *pixels]) == 0
    return folder


@pytest.fixture(autouse=True)
def inside(home, monkeypatch):
    monkeypatch.chdir(home)


def sampled(*more: str, out: str = "out.png") -> Image.Image:
    """The grid that `sample` draws of one prompt."""
    assert main(["sample", "runs/tiny", "--prompt", "picture a", *more, "-o", out]) == 0
    return Image.open(out)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.array(picture.convert("RGB")).astype(int)


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().split("\n")[-1]


# ---- what it takes and writes


def test_options_stand_for_settings():
    text = sampled("--solver", "dpm_solver_pp(scale = 1)", "--steps", "3", "--guidance", "4").text
    assert "steps = 3" in text["solver"] and "scale = 1" in text["solver"]
    assert text["solver"].startswith("dpm_solver_pp(") and text["guidance"] == "4"
    same = sampled(
        "--set", "sample.solver=dpm_solver_pp(scale = 1, steps = 3)", "--set", "sample.guidance=4",
        out="set.png",
    )  # fmt: skip
    assert (pixels(same) == pixels(Image.open("out.png"))).all()


def test_each_picture_is_a_file_that_says_how_it_was_made(home):
    grid = sampled("-n", "3", "--steps", "3", "--guidance", "2.5")
    files = sorted((home / "out-pictures").iterdir())
    assert [file.name for file in files] == ["0000.png", "0001.png", "0002.png"]
    third = Image.open(files[2])
    assert third.size == (64, 64) and third.text["prompt"] == "picture a"
    assert third.text["index"] == "2" and json.loads(grid.text["prompts"]) == ["picture a"] * 3
    manifest = json.loads((home / "runs/tiny/manifest.json").read_text())
    assert [third.text[k] for k in ("spec", "graph")] == [manifest[k] for k in ("spec", "graph")]
    assert third.text["step"] == "4" and third.text["seed"] == "5" and third.text["size"] == "64"
    assert json.loads(third.text["versions"]).keys() >= {"difftrain", "torch"}


def test_a_picture_is_made_again_from_what_it_says():
    sampled("-n", "2", "--solver", "ancestral(steps = 3)", "--set", "sample.guidance_rescale=0.5")
    first = Image.open("out-pictures/0001.png")
    said = [("solver", first.text["solver"]), ("guidance", first.text["guidance"])]
    said += [(n, first.text[n]) for n in ("guidance_rescale", "guidance_interval", "seed")]
    asked = [word for name, value in said for word in ("--set", f"sample.{name}={value}")]
    sampled("-n", "2", *asked, out="again.png")
    again = Image.open("again-pictures/0001.png")
    assert again.text == first.text and (pixels(again) == pixels(first)).all()


def test_fewer_pictures_leave_none_of_before(home):
    for count in ("3", "1"):
        sampled("-n", count, "--steps", "1", out="few.png")
    assert [file.name for file in (home / "few-pictures").iterdir()] == ["0000.png"]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["--solver", "huen"], "there is no solver `huen`"),
        (["--solver", "7"], "`7` is not a solver"),
        (["--guidance", "x"], "`guidance` is a number, and `x` is none"),
        (["--solver", "ddim(steps = 1001)"], "does not fit a process of 1000 steps"),
        (["--steps", "0"], "`steps` cannot be `0`"),
    ],
)
def test_a_slip_is_a_finding(capsys, asked, says):
    assert main(["sample", "runs/tiny", *asked]) == 1
    assert says in capsys.readouterr().err


def test_bytes_that_are_no_text_are_told(capsys):
    assert main(["sample", "runs/tiny", "--prompt", os.fsdecode(b"picture \xff")]) == 2
    says = "error: a prompt has bytes that are no UTF-8: write it as UTF-8"
    assert last_line(capsys) == says


def test_what_the_settings_make_doubtful_is_told_before_drawing(capsys):
    asked = ["--guidance", "1", "--set", "sample.guidance_rescale=0.5", "--steps", "1", "-n", "1"]
    sampled(*asked)
    told = capsys.readouterr().err
    assert told.startswith(
        "warning[DIF314]: `guidance_rescale` changes nothing here\n"
        " --> --set sample.guidance_rescale:1:20\n"
        "  |\n"
        "1 | guidance_rescale = 0.5\n"
        "  |                    ^^^\n"
        "  = because: guidance is 1, which is none\n"
        "  = help: leave it out, or set `guidance`          (difftrain explain DIF314)\n"
    )
    sampled("--steps", "1", "-n", "1")
    assert "DIF" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            "data.batch=3",
            "`data.batch` is how many samples a step of training reads, and nothing here does:"
            " leave it out",
        ),
        (
            'data.source=arrays("a.npz")',
            "`data.source` has arrays, and this run was trained on pictures: give a source of"
            " pictures",
        ),
    ],
)
def test_data_that_samples_do_not_depend_on_are_refused(capsys, changed, says):
    assert main(["sample", "runs/tiny", "--set", changed, "-n", "1"]) == 2
    assert last_line(capsys) == f"error: {says}"


def test_one_bar_counts_the_pictures(capsys):
    sampled("-n", "3", "--steps", "1")
    assert re.search(r"100%.*\b3/3 \[.*picture", capsys.readouterr().err)


def test_weights_of_another_network_are_told_also_where_they_fit(capsys):
    """Heads are no shape of any weight."""
    for option, value in (("heads", "4"), ("text.heads", "4"), ("text.length", "9")):
        other, asked = f"runs/{option}", ["--set", f"backbone.{option}={value}", "--steps", "0"]
        assert main(["train", "tiny.diff", *asked, "--out", other]) == 0
        file = f"{other}/checkpoints/step-000000000.safetensors"
        assert main(["sample", "runs/tiny", "--weights", file, "-n", "1"]) == 2
        own = {"heads": 2, "text.heads": 2, "text.length": 8}[option]
        assert last_line(capsys) == (
            f"error: the checkpoint `{file}` is of another network (`{option} = {value}`, and this"
            f" spec has `{option} = {own}`): sample the run that it is of"
        )
    sampled("--weights", FIRST, "-n", "1")


# ---- guidance


def test_ways_of_guiding_reach_the_pictures():
    plain = pixels(sampled("--guidance", "6"))
    never = sampled("--guidance", "6", "--set", "sample.guidance_interval=1000..2000")
    assert (pixels(never) == pixels(sampled("--guidance", "1"))).all()
    for name, value in (("guidance_interval", "0.1..1"), ("guidance_rescale", "1")):
        changed = sampled("--guidance", "6", "--set", f"sample.{name}={value}")
        assert (pixels(changed) != plain).any()


def test_an_earlier_checkpoint_guides():
    """What guides is as good as the model: then nothing is changed, whatever the scale."""
    own = sampled("--guidance", "1")
    by_itself = sampled("--guidance", "3", "--set", f"sample.guide={LAST}", out="itself.png")
    assert abs(pixels(by_itself) - pixels(own)).max() <= 1
    by_first = sampled("--guidance", "3", "--set", f"sample.guide={FIRST}", out="first.png")
    assert (pixels(by_first) != pixels(own)).any()
    assert by_first.text["guide_step"] == "1" and by_itself.text["guide_step"] == "4"


@pytest.mark.parametrize(
    ("guide", "says"),
    [
        (
            "runs/other",
            "error: `runs/other` cannot guide this run: its process has other levels of noise, so"
            " the two estimate from different things; give a run of the same process",
        ),
        (
            "runs/pixels",
            "error: `runs/pixels` cannot guide this run: it has another codec; give a run of the"
            " same one",
        ),
        ("runs/gone", "error: there is no run `runs/gone`: give a folder that training wrote"),
    ],
)
def test_what_cannot_guide_is_told(capsys, guide, says):
    asked = ["sample", "runs/tiny", "--set", f"sample.guide={guide}", "-n", "1"]
    assert main(asked) == 2
    assert last_line(capsys) == says


def test_training_refuses_at_once_what_cannot_guide(home, capsys):
    asked = ["train", "tiny.diff", "--set", "sample.guide=runs/other", "--out", "runs/guided"]
    assert main(asked) == 2
    assert "cannot guide this run" in last_line(capsys) and not (home / "runs/guided").exists()


# ---- grids while training


def test_grids_change_nothing_of_the_training(home):
    """Checkpoints are the same, bit for bit, with a grid after every step and with none."""
    asked = ["train", "tiny.diff", "--steps", "2", "--set", "train.save_every=0"]
    for every in ("0", "1"):
        assert main([*asked, "--set", f"train.sample_every={every}", "--out", f"every{every}"]) == 0
    assert (home / "every1/samples/step-000000001.png").is_file()
    none, each = (
        load_file(home / run / "checkpoints/step-000000002.safetensors")
        for run in ("every0", "every1")
    )
    assert all(torch.equal(none[name], each[name]) for name in none)


def test_a_grid_of_training_shows_the_averaged_weights(home):
    """It is what `sample` draws of the checkpoint, whose live weights are others."""
    assert main(["sample", "runs/tiny", "-o", "all.png"]) == 0
    grid = home / "runs/tiny/samples/step-000000004.png"
    assert (home / "all.png").read_bytes() == grid.read_bytes()
    bundle, checkpoint = open_run("runs/tiny")
    model = samples.open_model(bundle, bundle.read().objective(), checkpoint, 64)
    kept, moved = load_file(checkpoint), 0
    for name, weight in model.parts.plan.named(model.weights).items():
        assert torch.equal(weight.cpu(), kept[f"average/{name}"])
        moved += not torch.equal(kept[f"average/{name}"], kept[f"weights/{name}"])
    assert moved


def test_drawing_touches_no_state():
    bundle, checkpoint = open_run("runs/tiny")
    spec = bundle.read()
    model = samples.open_model(bundle, spec.objective(), checkpoint, 64)
    weights, random = model.weights.clone(), torch.get_rng_state()
    evaluate.sample(model, block(spec, "sample"), ["picture a"], 64)
    assert torch.equal(model.weights, weights) and torch.equal(torch.get_rng_state(), random)
