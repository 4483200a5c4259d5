"""Transformers that are told classes, as pipelines of diffusers' DiT."""

import pipeline
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from test_export_diffusers import opened, quiet, text

from difftrain.export import diffusers, pipelines
from difftrain.export.beside import compare
from difftrain.export.errors import ExportError, Parted
from difftrain.export.opened import Opened
from difftrain.training import evaluate
from difftrain.training.known import Known

NETWORK = (
    'transformer(text = label.classes(field = "k", count = 3), codec = sd.vae("sd"),'
    " depth = 2, width = 16, heads = 2{more})"
)
FLOW = {"process": "linear", "prediction": "flow", "solver": "euler(steps = 6)"}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def spec(library="dit", more="", prompts=("0", "2"), **parts) -> str:
    """A spec of a network that is told classes."""
    backbone = f"{library}.{NETWORK.format(more=more)}"
    whole = text(backbone, prompts=prompts, **parts)
    return whole.replace("import std.sd", f"import std.sd\nimport std.label\nimport std.{library}")


def learned(whole: str, known: Known | None = None) -> Opened:
    """A run whose network says something, of times as well."""
    run = opened(whole, known=known)
    with torch.no_grad():
        for weight in run.parts.modules["student"].parameters():
            torch.nn.init.normal_(weight, std=0.2)
    return run


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a codec in `sd`."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    pipeline.vae().save_pretrained(tmp_path / "sd" / "vae")
    return tmp_path


def both(run, pipe, steps: int):
    """The pictures of the classes 0 and 2 by a run and by a pipeline, [2, 3, H, W] in 0..1."""
    drawn = {"generator": torch.Generator().manual_seed(5), "output_type": "pt"}
    theirs = pipe([0, 2], num_inference_steps=steps, guidance_scale=2.0, **drawn).images
    x = torch.randn(2, *run.shape, generator=torch.Generator().manual_seed(5))
    asked = evaluate.sampler(run.model, run.sampling, torch.arange(2), ["0", "2"])
    with torch.no_grad():
        ours = run.parts.codec.decode(run.walk(asked, x, run.grid, run.draws(2)))
    return theirs, (ours.clamp(-1, 1) + 1) / 2


RUNS = {
    "steps": {},
    "no signal at the end": {"process": "ddpm(terminal_snr = zero)"},
    "dpm": {"prediction": "epsilon", "solver": "dpm_solver_pp(steps = 10)"},
    "many steps": {"solver": "ddim(steps = 50)"},
    "one step, which draws nothing": {"solver": "ddim(steps = 1, eta = 1)"},
    "flow": {"library": "sit", **FLOW},
    "flow of large times": {"library": "sit", "more": ", time_scale = 1000", **FLOW},
    "flow towards noise": {
        "more": ", clock = noise, time_scale = 1000, patch = 1, tap = 1",
        **FLOW,
    },
}


@pytest.mark.parametrize("parts", RUNS.values(), ids=RUNS)
def test_diffusers_draws_the_same_pictures(home, parts):
    run = learned(spec(**parts))
    pipe = DiffusionPipeline.from_pretrained(diffusers.export(run, home / "out", quiet))
    assert type(pipe).__name__ == "DiTPipeline"
    theirs, ours = both(run, pipe, len(run.grid) - 1)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert (ours[0] - ours[1]).abs().max() > 0.01


def test_a_network_of_other_rates_is_not_the_same(home):
    """With our first layer of times as it is, the same names are another network."""
    run = learned(spec())
    folder, made = diffusers.export(run, home / "out", quiet), pipelines.pipeline(run)
    state = load_file(folder / WEIGHTS)
    own = run.parts.modules["student"].t_embedder.mlp[0].weight.detach()
    state |= {n: own.clone() for n in state if n.endswith("timestep_embedder.linear_1.weight")}
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(Parted, match="before evaluation 2"):
        compare(run, folder, made)


def test_small_times_are_known_at_any_number_of_steps(home):
    run, more = (learned(spec("sit", **{**FLOW, "solver": f"euler(steps = {n})"})) for n in (6, 9))
    student, other = (r.parts.modules["student"] for r in (run, more))
    other.load_state_dict(student.state_dict())
    folder = diffusers.export(run, home / "out", quiet)
    assert "export again" not in (folder / "README.md").read_text()
    theirs, ours = both(more, DiffusionPipeline.from_pretrained(folder), 9)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_the_folder_says_how_it_is_called(home):
    run = learned(spec(prompts=["owl", ""]), Known(("cat", "dog", "owl")))
    folder = diffusers.export(run, home / "out", quiet)
    said = (folder / "README.md").read_text()
    assert "class_labels=[2],\n    num_inference_steps=4" in said
    assert "at those of 4 steps alone" in said
    assert DiffusionPipeline.from_pretrained(folder).get_label_ids(["cat", "owl"]) == [0, 2]


REFUSED = {
    "goes through the times of `euler` here: use `grid = even`": {
        "process": "linear",
        "prediction": "flow",
        "solver": "euler(steps = 4, grid = power)",
    },
    "along the straight path alone": {"process": "gvp", "prediction": "flow"},
    "a bare network on continuous times": {"process": "edm", "prediction": "sample"},
    "the DiT of diffusers has no `norm = rms`": {"more": ", norm = rms"},
    "has no `rotary = true`": {"more": ", rotary = true"},
    "has no `mlp = swiglu`": {"more": ", mlp = swiglu"},
    "knows the 100 times of this solver as the network does": {"solver": "ddim(steps = 100)"},
    "draws what its solver adds without a seed": {"solver": "ddim(steps = 4, eta = 1)"},
    "DiT's pipeline cannot be given the scheduler that makes the moves of `multistep`": {
        **FLOW,
        "solver": "multistep(steps = 1)",
    },
}


@pytest.mark.parametrize(("message", "parts"), REFUSED.items(), ids=REFUSED)
def test_what_dit_does_not_do_is_refused(home, message, parts):
    with pytest.raises(ExportError, match=message):
        diffusers.export(opened(spec(**parts)), home / "out", quiet)
    assert [p.name for p in home.iterdir()] == ["sd"]


def test_more_classes_than_the_pipeline_knows_are_refused(home):
    with pytest.raises(ExportError, match="which is one of the 1001 classes here"):
        many = spec().replace("count = 3", "count = 1001")
        diffusers.export(opened(many), home / "out", quiet)


def test_noise_that_does_not_begin_at_one_is_refused(home):
    grown = spec(process="edm", prediction="sample", solver="euler(steps = 4)")
    factors = grown.replace("drop_condition(0.1)", "[edm_precondition, drop_condition(0.1)]")
    with pytest.raises(ExportError, match="begins with noise of deviation 1"):
        diffusers.export(opened(factors), home / "out", quiet)


def test_rescaled_guidance_is_refused(home):
    with pytest.raises(ExportError, match="DiT's pipeline rescales no guidance"):
        rescaled = spec().replace("count = 4", "count = 4, guidance_rescale = 0.5")
        diffusers.export(opened(rescaled), home / "out", quiet)
