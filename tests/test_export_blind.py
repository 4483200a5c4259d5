"""UNets without a condition, as pipelines of diffusers that draw pictures alone."""

import pytest
import torch
from diffusers import DiffusionPipeline
from test_export_diffusers import opened, quiet, text

from difftrain.export import diffusers
from difftrain.export.errors import ExportError
from difftrain.training import evaluate

NETWORK = "channels = [16, 16], layers = 1, heads = 2, attention = [0], groups = 4"


def spec(parts: str = "text = [], codec = sd.pixels", **more) -> str:
    """A spec of a UNet that is told nothing, or a class."""
    whole = text(f"sd.unet({parts}, {NETWORK})", prompts=[], **more)
    whole = whole.replace("  strategy        = drop_condition(0.1)\n", "").replace(
        "prompts = []", ""
    )
    return whole.replace("guidance = 2, count = 4, ", "guidance = 1, count = 4")


RUNS = {
    "ddim(steps = 4)": "DDIMPipeline",
    "ddim(steps = 4, eta = 0.3)": "DDIMPipeline",
    "ancestral(steps = 5)": "DDPMPipeline",
    "dpm_solver_pp(steps = 6)": "DDPMPipeline",
}


@pytest.mark.parametrize("solver", RUNS)
def test_what_is_drawn_is_held_against_the_run(tmp_path, solver):
    torch.manual_seed(0)
    said = []
    run = opened(spec(solver=solver, prediction="epsilon"))
    pipe = DiffusionPipeline.from_pretrained(diffusers.export(run, tmp_path / "out", said.append))
    assert type(pipe).__name__ == RUNS[solver]
    assert float(said[0].split()[-1]) < 1e-5


def test_diffusers_draws_the_same_pictures(tmp_path):
    torch.manual_seed(0)
    run = opened(spec())
    folder = diffusers.export(run, tmp_path / "out", quiet)
    assert "batch_size=1,\n    num_inference_steps=4,\n)" in (folder / "README.md").read_text()
    drawn = {"generator": torch.Generator().manual_seed(5), "output_type": "pt"}
    pipe = DiffusionPipeline.from_pretrained(folder)
    theirs = pipe(batch_size=2, num_inference_steps=4, **drawn).images
    x = torch.randn(2, *run.shape, generator=torch.Generator().manual_seed(5))
    asked = evaluate.sampler(run.model, run.sampling, torch.arange(2), ["", ""])
    with torch.no_grad():
        ours = run.parts.codec.decode(run.walk(asked, x, run.grid, run.draws(2)))
    torch.testing.assert_close(theirs, (ours + 1) / 2, rtol=0, atol=1e-4)
    assert (ours[0] - ours[1]).abs().max() > 0.01


REFUSED = {
    "no pipeline for a UNet of latents that reads no text": spec("text = []"),
    "no pipeline for a UNet that is told a class": spec(
        'text = label.classes(field = "k", count = 3), codec = sd.pixels'
    ).replace("import std.sd", "import std.sd\nimport std.label"),
    "a UNet that reads no text, on continuous times": spec(process="linear", prediction="flow"),
}


@pytest.mark.parametrize(("message", "whole"), REFUSED.items(), ids=REFUSED)
def test_what_has_no_form_in_diffusers_is_refused(tmp_path, message, whole):
    with pytest.raises(ExportError, match=message):
        diffusers.export(opened(whole), tmp_path / "out", quiet)
