"""Runs on continuous times as pipelines of diffusers."""

import json
import re

import pipeline
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from test_export_diffusers import (
    LOADED,
    PROMPTS,
    SCHEDULER,
    T5,
    first,
    opened,
    pictures,
    pixart,
    quiet,
    text,
    told,
    words,
)

from difftrain.export import diffusers, pipelines
from difftrain.export.beside import compare
from difftrain.export.errors import ExportError, Parted

THOUSAND = LOADED.replace("codec", "time_scale = 1000, codec")


def straight(backbone=THOUSAND, solver="euler(steps = 5)", **more) -> str:
    """A spec of a flow."""
    return text(backbone, **{"process": "linear", "prediction": "flow", "solver": solver, **more})


def growing(backbone=LOADED, factors="edm_precondition(data = 0.7)", **more) -> str:
    """A spec of a preconditioned network where noise is added to data."""
    parts = {"process": "edm", "prediction": "sample", "solver": "euler(steps = 5)", **more}
    return text(backbone, **parts).replace(
        "drop_condition(0.1)", f"[{factors}, drop_condition(0.1)]"
    )


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a pretrained pipeline in `sd`."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    return pipeline.save(tmp_path / "sd").parent


WALKS = {
    "euler": straight(),
    "shifted": straight(solver="ddim(steps = 5, shift = 3)"),
    "one step, which draws nothing": straight(solver="ddim(steps = 1, eta = 1)"),
    "one step": straight(LOADED, "euler(steps = 1)"),
    "preconditioned": growing(solver="euler(steps = 4, low = 0.01, high = 20, rho = 5)"),
    "preconditioned dpm": growing(solver="dpm_solver_pp(steps = 6)"),
}


@pytest.mark.parametrize("spec", WALKS.values(), ids=WALKS)
def test_diffusers_draws_the_same_pictures(home, spec):
    run = opened(spec)
    pipe = DiffusionPipeline.from_pretrained(diffusers.export(run, home / "out", quiet))
    assert isinstance(pipe, StableDiffusionPipeline)
    called = {"num_inference_steps": len(run.grid) - 1, "guidance_scale": 2.0}
    x = first(run) / pipe.scheduler.init_noise_sigma
    theirs = pipe(PROMPTS, output_type="pt", latents=x, **called).images
    ours = (pictures(run).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert (ours[0] - ours[1]).abs().max() > 0.01


def test_times_are_shifted_as_those_that_were_trained(home):
    shifted = straight(process="own").replace(
        "objective tiny", "process own from linear { t' = shift(t, 3) }\nobjective tiny"
    )
    folder = diffusers.export(opened(shifted), home / "out", quiet)
    config = json.loads((folder / SCHEDULER).read_text())
    assert (config["shift"], config["num_train_timesteps"]) == (3.0, 1000)


DAMAGES = {
    "before evaluation 2 of 5": ("shift", 1.1),
    "parts from the run": ("num_train_timesteps", 900),
}


def test_where_a_pipeline_parts_is_told(home):
    run = opened(straight())
    folder, made = diffusers.export(run, home / "out", quiet), pipelines.pipeline(run)
    whole = (folder / SCHEDULER).read_text()
    for place, (name, value) in DAMAGES.items():
        (folder / SCHEDULER).write_text(whole)
        told(SCHEDULER, name, value)(folder)
        with pytest.raises(Parted, match=place):
            compare(run, folder, made)


def test_a_pixart_run_is_a_pixart_pipeline(home):
    words(home / "px")
    whole = pixart(process="linear", prediction="flow", solver="euler(steps = 4)")
    whole = whole.replace(T5, f"{T5}, time_scale = 1000")
    run = opened(whole)
    with torch.no_grad():  # a new one says nothing
        torch.nn.init.normal_(run.parts.modules["student"].module.proj_out.weight, std=0.1)
    said = []
    diffusers.export(run, home / "out", said.append)
    assert float(said[0].split()[-1]) < 1e-5
    with pytest.raises(ExportError, match="PixArt's pipeline cannot be given"):
        diffusers.export(opened(whole.replace("euler", "multistep")), home / "other", quiet)


LISTED = {"euler(steps = 4, grid = power)": 4, "multistep(times = [0.7, 0.2])": 3}


@pytest.mark.parametrize("solver", LISTED)
def test_times_that_are_not_even_are_told(home, solver):
    said = []
    run = opened(straight(solver=solver))
    folder = diffusers.export(run, home / "out", said.append)
    assert float(said[0].split()[-1]) < 1e-5
    (times,) = re.findall(r"sigmas=\[(.*)\]", (folder / "README.md").read_text())
    assert len(times.split(", ")) == LISTED[solver]


def test_noise_of_a_preconditioned_run_is_held_against_the_same(home):
    said = []
    run = opened(growing(solver="dpm_solver_pp(steps = 5, scale = 1)"))
    folder = diffusers.export(run, home / "out", said.append)
    assert float(said[0].split()[-1]) < 1e-5
    assert json.loads((folder / SCHEDULER).read_text())["sigma_data"] == 0.7
    assert "noise of standard deviation 80.00625" in (folder / "README.md").read_text()


REFUSED = {
    "along the straight path alone, alpha = 1 - t and sigma = t: train on `linear`": straight(
        process="gvp"
    ),
    "the moves of `heun` as it is asked for here, at the times of this process: use `euler`": (
        straight(solver="heun(steps = 4)")
    ),
    "the moves of `ddim` as it is asked for here, at the times of this process": (
        straight(solver="ddim(steps = 4, eta = 1)")
    ),
    "no prediction type `sample` on continuous times": straight(prediction="sample"),
    "`time_scale = 1.5`, and schedulers of diffusers tell times whole numbers as large": (
        straight(LOADED.replace("codec", "time_scale = 1.5, codec"))
    ),
    "the moves of `heun` as it is asked for here, for a preconditioned network: use `euler`": (
        growing(solver="heun(steps = 4)")
    ),
    "the moves of `ddim` as it is asked for here, for a preconditioned network": (
        growing(solver="ddim(steps = 4, eta = 0.5)")
    ),
    "preconditions networks of the prediction type `sample`, not `epsilon`": (
        growing(prediction="epsilon")
    ),
    "goes through the times of `euler` here: use `grid = power`": (
        growing(solver="euler(steps = 4, grid = even)")
    ),
    "`time_scale = 1000`, and the pipelines of diffusers tell": growing(THOUSAND),
    "rescales the guidance of what a network answers": (
        growing().replace("count = 4", "count = 4, guidance_rescale = 0.5")
    ),
    "inside `c_in`, and diffusers calls it bare where it does not know": (
        growing(process="linear", prediction="flow")
    ),
}


@pytest.mark.parametrize(("message", "spec"), REFUSED.items(), ids=REFUSED)
def test_what_has_no_form_in_diffusers_is_refused(home, message, spec):
    with pytest.raises(ExportError) as problem:
        diffusers.export(opened(spec), home / "out", quiet)
    assert message in str(problem.value)
    assert [p.name for p in home.iterdir()] == ["sd"]
