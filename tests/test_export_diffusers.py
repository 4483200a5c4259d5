"""Runs as pipeline folders of diffusers: loaded by diffusers, and sampled beside the run."""

import json
import shutil

import pipeline
import pytest
import tiny
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers import StableDiffusionPipeline as StableDiffusion
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from difftrain.compiler import lowering
from difftrain.export import diffusers, pipelines, saved
from difftrain.export.beside import compare
from difftrain.export.errors import ExportError, Parted
from difftrain.export.opened import Opened
from difftrain.export.schedulers import scheduler
from difftrain.models.codec import _codec
from difftrain.models.text import clip
from difftrain.models.tokenizer import clip_tokenizer
from difftrain.training import evaluate
from difftrain.training.bundle import block, compile_text
from difftrain.training.known import Known
from difftrain.training.parts import build_parts
from difftrain.training.samples import Model

LOADED = 'sd.unet("sd", text = sd.clip("sd"), codec = sd.vae("sd"))'
SMALL = f"sd.unet(text = {tiny.TEXT.format(train='true')}, {tiny.NETWORK})"
CURVED = """process curved {
  t ~ integer(200)
  root  = sqrt(1 - ((count(200) + 1) / 201)^2)
  alpha = pick(root, t)
  sigma = sqrt(1 - alpha^2)
}
"""
SCHEDULER = "scheduler/scheduler_config.json"
DDPM = "ddpm(beta = scaled_linear(0.00085, 0.012))"
PROMPTS = ["a red apple", "a picture of two dogs"]


def text(
    backbone=LOADED, process=DDPM, prediction="v_prediction", solver="ddim(steps = 4)", **more
):
    """A spec with these parts."""
    listed = ", ".join(f'"{p}"' for p in more.pop("prompts", PROMPTS))
    whole = tiny.spec(backbone=backbone, sample=f"prompts = [{listed}]", size=32, **more)
    changes = {"ddpm(beta = scaled_linear(0.00085, 0.012))": process, "ddim(steps = 2)": solver}
    for before, after in (changes | {"= v_prediction": f"= {prediction}"}).items():
        whole = whole.replace(before, after)
    return whole


def opened(spec: str, words=(), known: Known | None = None) -> Opened:
    """A run of the spec before its first step."""
    bundle = compile_text("tiny", spec)
    read, device = bundle.read(), lowering.device("cpu")
    objective, data = read.objective(), block(read, "data")
    known = known or Known(tuple(clip_tokenizer().used(words)) if words else ())
    parts = build_parts(objective, known, 0, device, size=data["size"], sampling=True)
    model = Model(bundle, evaluate.programs(bundle, device), parts, parts.weights, 7)
    return Opened(model, objective, block(read, "sample"), None, data)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a pretrained pipeline in `sd`."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    return pipeline.save(tmp_path / "sd").parent


def quiet(line: str) -> None:
    pass


# ---- the same pictures


def pictures(run: Opened) -> torch.Tensor:
    """What `difftrain sample` draws, [B, 3, H, W] in [-1, 1]."""
    return evaluate.sample(run.model, run.sampling, PROMPTS, run.data["size"])


def first(run: Opened) -> torch.Tensor:
    """The latents that `difftrain sample` begins with."""
    sigma = run.levels.sigma(run.grid[:1]).item()
    return sigma * run.draws(2).noise(0, torch.zeros(2, *run.shape))


WALKS = {
    "ddim": {},
    "dpm": {"prediction": "epsilon", "solver": "dpm_solver_pp(steps = 6)"},
    "strides that are no whole ones": {"prediction": "sample", "solver": "ddim(steps = 7)"},
    "no signal at the end": {"process": "ddpm(terminal_snr = zero)"},
    "trained from nothing": {"backbone": SMALL},
}


@pytest.mark.parametrize("parts", WALKS.values(), ids=WALKS)
def test_diffusers_draws_the_same_pictures(home, parts):
    run = opened(text(**parts), PROMPTS if "backbone" in parts else ())
    pipe = DiffusionPipeline.from_pretrained(diffusers.export(run, home / "out", quiet))
    assert isinstance(pipe, StableDiffusion)
    told = {"num_inference_steps": len(run.grid) - 1, "guidance_scale": 2.0, "latents": first(run)}
    theirs = pipe(PROMPTS, output_type="pt", **told).images
    ours = (pictures(run).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    assert (ours[0] - ours[1]).abs().max() > 0.01


NOISY = {
    "ddim(steps = 5, eta = 0.5)": "DDIMScheduler",
    "ddim(steps = 6, eta = 1)": "DDPMScheduler",
    "ancestral(steps = 5)": "DDPMScheduler",
    "dpm_solver_pp(steps = 5, scale = 1)": "DPMSolverMultistepScheduler",
    "multistep(steps = 4)": "LCMScheduler",
    "multistep(times = [759, 499, 259])": "LCMScheduler",
}


@pytest.mark.parametrize("solver", NOISY)
def test_solvers_that_draw_are_held_against_the_run_with_the_same_noise(home, solver):
    run = opened(text(solver=solver))
    assert type(scheduler(run)).__name__ == NOISY[solver]
    said = []
    diffusers.export(run, home / "out", said.append)
    assert float(said[0].split()[-1]) < 1e-5


def test_a_network_with_its_guidance_inside_is_told_it(home):
    """`lcm` gives the network w, which is the guidance less 1: pipelines do as well."""
    backbone = LOADED.replace('sd.vae("sd")', 'sd.vae("sd"), inputs = [lcm.w]')
    teacher = 'teacher = "runs/wide"'
    spec = text(backbone=backbone, solver="multistep(steps = 2)", train=teacher)
    run = opened(spec.replace("drop_condition(0.1)", "lcm"))
    with torch.no_grad():
        torch.nn.init.normal_(run.parts.modules["student"].module.time_embedding.cond_proj.weight)
    pipe = DiffusionPipeline.from_pretrained(diffusers.export(run, home / "out", quiet))
    drawn = [
        pipe(PROMPTS, num_inference_steps=1, guidance_scale=g, latents=first(run), output_type="pt")
        for g in (2.0, 8.0)
    ]
    assert (drawn[0].images - drawn[1].images).abs().max() > 0.01


# ---- the folder


def test_the_folder_says_what_was_declared(home):
    run = opened(text(process="ddpm(terminal_snr = zero)"))
    folder = diffusers.export(run, home / "out", quiet)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert config["beta_schedule"] == "scaled_linear"
    assert (config["beta_start"], config["beta_end"]) == (0.00085, 0.012)
    assert config["rescale_betas_zero_snr"] and config["timestep_spacing"] == "trailing"
    assert config["prediction_type"] == "v_prediction" and not config["clip_sample"]
    assert json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] == 0.18215
    assert json.loads((folder / "unet" / "config.json").read_text())["sample_size"] == 16
    weights = sorted(folder.rglob("*.safetensors"))
    assert [w.parent.name for w in weights] == ["text_encoder", "unet", "vae"]
    for path in weights:
        with safe_open(path, framework="pt") as file:
            said = file.metadata()
        assert said["format"] == "pt" and said["step"] == "7"
        assert said["spec"] == run.bundle.manifest["spec"]
    card = (folder / "README.md").read_text()
    assert "num_inference_steps=4" in card and "guidance_scale=2.0" in card
    assert sorted(p.name for p in home.iterdir()) == ["out", "sd"]


def test_the_weights_are_the_averaged_ones(home):
    run = opened(text())
    run.model.weights.mul_(1.5)
    pipe = StableDiffusion.from_pretrained(diffusers.export(run, home / "out", quiet))
    ours = run.parts.modules["student"].module.state_dict()
    for name, value in pipe.unet.state_dict().items():
        assert torch.equal(value, ours[name])


@pytest.mark.parametrize(
    ("process", "named"),
    [
        ("ddpm(beta = linear(0.0001, 0.02), steps = 500)", {"beta_schedule": "linear"}),
        ("ddpm(beta = linear(0.0001, 0.02), terminal_snr = zero)", {"beta_end": 0.02}),
        ("ddpm(beta = cosine, terminal_snr = zero)", {"beta_schedule": "squaredcos_cap_v2"}),
        ("curved", {"num_train_timesteps": 200}),
    ],
)
def test_levels_are_those_of_the_process(home, process, named):
    run = opened(text(process=process).replace("objective tiny", CURVED + "objective tiny"))
    made = scheduler(run)
    assert named.items() <= dict(made.config).items()
    ours = run.levels.alpha(torch.arange(len(made.alphas_cumprod))) ** 2
    torch.testing.assert_close(made.alphas_cumprod.double(), ours, rtol=1e-4, atol=2e-6)
    assert (made.config.trained_betas is not None) == (process == "curved")


# ---- the gate


def told(file: str, name: str, value):
    """Damages one number of a configuration in the folder."""

    def damage(folder):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))

    return damage


def deaf(folder):
    """Makes the text encoder say the same of every text."""
    path = folder / "text_encoder" / "model.safetensors"
    save_file({n: 0 * v for n, v in load_file(path).items()}, path, {"format": "pt"})


DAMAGES = (
    ("before evaluation 2 of 4", told(SCHEDULER, "prediction_type", "sample")),
    ("before evaluation 2 of 4", deaf),
    ("in the pictures", told("vae/config.json", "scaling_factor", 0.2)),
)


def test_where_a_pipeline_parts_is_told(home):
    run = opened(text())
    folder, made = diffusers.export(run, home / "out", quiet), pipelines.pipeline(run)
    for i, (place, damage) in enumerate(DAMAGES):
        damage(other := shutil.copytree(folder, home / str(i)))
        with pytest.raises(Parted, match=f"the pipeline parts from the run {place}: the relative"):
            compare(run, other, made)


# ---- parts


@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.5},
        {"scaling_factor": 0.5, "shift_factor": 0.3},
        {"latents_mean": [0.1, -0.2], "latents_std": [2.0, 0.5]},
        {"shift_factor": 0.3, "use_quant_conv": False, "use_post_quant_conv": False},
    ],
    ids=["scale", "shift", "channels", "bare"],
)
def test_a_codec_keeps_its_latents_with_a_factor_alone(config):
    torch.manual_seed(0)
    layers = {"block_out_channels": (4,), "norm_num_groups": 2, "latent_channels": 2}
    codec = _codec(AutoencoderKL(**layers, **config))
    made = saved.autoencoder(codec)
    factor, x = made.config.scaling_factor, torch.randn(1, 3, 8, 8)
    assert made.config.shift_factor is None and made.config.latents_mean is None
    law, latents = codec.model.encode(x).latent_dist, codec.encode(x)
    torch.testing.assert_close(made.encode(x).latent_dist.mean * factor, latents)
    widths = (made.encode(x).latent_dist.std * factor, law.std * codec.scale)
    torch.testing.assert_close(*widths)
    torch.testing.assert_close(made.decode(latents / factor).sample, codec.decode(latents))


TEXTS = ["a red apple", "", "Two  DOGS!! it's 42", "na\u00efve caf\u00e9", "long " * 30]


def test_a_small_text_encoder_becomes_whole(tmp_path):
    own = clip(layers=1, width=16, heads=2, length=12, vocabulary=clip_tokenizer().used(TEXTS))
    saved.encoder(own).save_pretrained(tmp_path)
    saved.byte_pairs(own).save_pretrained(tmp_path)
    tokens, theirs = (
        CLIPTokenizer.from_pretrained(tmp_path),
        CLIPTextModel.from_pretrained(tmp_path),
    )
    filled = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = tokens(TEXTS, max_length=tokens.model_max_length, **filled).input_ids
    assert torch.equal(ids, own.ids(TEXTS))
    torch.testing.assert_close(theirs(ids)[0], own(ids))


# ---- PixArt


def words(folder) -> None:
    """Saves a T5 encoder and a tokenizer that knows the words of the prompts."""
    known = ["<pad>", "</s>", "<unk>", *sorted({w for p in PROMPTS for w in p.split()})]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    marks = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    tokens = PreTrainedTokenizerFast(tokenizer_object=backend, **marks)
    tokens.save_pretrained(folder / "tokenizer")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=len(known), feed_forward_proj="gated-gelu", **sizes)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")


PIXART = 'pixart.transformer(text = {}, codec = sd.vae("sd"), depth = 2, width = 16, heads = 2)'
T5 = 't5.encoder("px", length = 9)'


def pixart(encoder=T5, **parts) -> str:
    whole = text(backbone=PIXART.format(encoder), **parts)
    return whole.replace("import std.sd", "import std.sd\nimport std.pixart\nimport std.t5")


def test_a_pixart_run_is_a_pixart_pipeline(home):
    words(home / "px")
    run = opened(pixart(solver="ddim(steps = 4)"))
    with torch.no_grad():  # a new one says nothing
        torch.nn.init.normal_(run.parts.modules["student"].module.proj_out.weight, std=0.1)
    folder = diffusers.export(run, home / "out", quiet)
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe).__name__ == "PixArtSigmaPipeline"
    assert "max_sequence_length=9" in (folder / "README.md").read_text()
    deafened = pipe.text_encoder.shared.weight
    with torch.no_grad():
        deafened.zero_()
    pipe.save_pretrained(folder)
    with pytest.raises(Parted):
        compare(run, folder, pipelines.pipeline(run))


# ---- what has no form there

TWICE = LOADED.replace('sd.vae("sd")', 'sd.vae("sd"), times = [t, r]')
REFUSED = {
    "makes the moves of `ancestral` as it is asked for here": {
        "solver": "ancestral(steps = 3, variance = large)"
    },
    "goes through the times of `ddim` in 4 steps: use `grid = trailing`": {
        "solver": "ddim(steps = 4, grid = uniform)"
    },
    "no second order step from a last level without signal": {
        "process": "ddpm(terminal_snr = zero)",
        "solver": "dpm_solver_pp(steps = 4)",
    },
    "keep alpha^2 + sigma^2 at 1": {
        "process": "uneven",
        "prediction": "epsilon",
    },
    "diffusers has no prediction type `doubled`": {"prediction": "doubled"},
    "decode latents of an AutoencoderKL": {
        "backbone": SMALL.replace("channels", "codec = sd.pixels, channels")
    },
    "`t5` encodes the prompts of this run, and the pipeline of its network reads them through one"
    " `sd.clip`: train with `text = sd.clip`, or export to another target, such as `onnx`": {
        "backbone": f"sd.unet(text = t5.encoder(width = 16, heads = 2), {tiny.NETWORK})"
    },
    "no pipeline for a UNet of latents that reads no text": {
        "backbone": f"sd.unet(text = [], {tiny.NETWORK})"
    },
    "the pooled text of this network is a projection of its own, and Stable Diffusion 3's pipeline"
    " takes CLIP's: export to another target, such as `onnx`": {
        "backbone": "sd3.transformer(text = sd.clip, depth = 1, width = 16, heads = 2)"
    },
    "the pipeline of DiT tells its network a class, and this one reads text": {
        "backbone": "dit.transformer(text = sd.clip, depth = 1, width = 16, heads = 2)"
    },
    "hides padding from a T5 encoder with its own": {
        "backbone": PIXART.format("t5.encoder(width = 16, heads = 2)")
    },
}
OWN = (
    CURVED.replace("curved", "uneven").replace("sqrt(1 - alpha^2)", "pick(1 - root, t)")
    + "prediction doubled { target = 2 * eps }\n"
)


def whole(parts: dict) -> str:
    """A spec with these parts, and with definitions of its own."""
    imports = "".join(f"import std.{name}\n" for name in ("sd", "pixart", "sd3", "dit", "t5"))
    blind = "text = []" in parts.get("backbone", "")  # where there is nothing to guide towards
    made = text(**parts).replace("guidance = 2", f"guidance = {1 if blind else 2}")
    return made.replace("import std.sd\n", imports + OWN)


@pytest.mark.parametrize(("message", "parts"), REFUSED.items(), ids=REFUSED)
def test_what_has_no_form_in_diffusers_is_refused(home, message, parts):
    run = opened(whole(parts), PROMPTS)
    with pytest.raises(ExportError) as problem:
        diffusers.export(run, home / "out", quiet)
    assert message in str(problem.value)
    assert [p.name for p in home.iterdir()] == ["sd"]


GUIDED = {
    "no guidance by an interval": ("count = 4", "count = 4, guidance_interval = 0.3..3"),
    "diffusers has none below 1": ("guidance = 2", "guidance = 0.5"),
    "`c_in`, and diffusers calls it bare": ("drop_condition(0.1)", "edm_precondition"),
    "shown its earlier estimate": ('sd.vae("sd")', 'sd.vae("sd"), inputs = [guess]'),
    "network its times as they are": ('sd.vae("sd")', 'sd.vae("sd"), time_scale = 2'),
}


@pytest.mark.parametrize(("message", "change"), GUIDED.items(), ids=GUIDED)
def test_what_pipelines_do_not_do_is_refused(home, message, change):
    with pytest.raises(ExportError, match=message):
        diffusers.export(opened(text().replace(*change)), home / "out", quiet)


def test_a_network_that_jumps_is_refused(home):
    spec = text(TWICE, process="linear", prediction="flow", solver="jump(steps = 1)")
    with pytest.raises(ExportError, match="no pipeline for a network that is told `r` as well"):
        run = opened(spec.replace("drop_condition(0.1)", "mean_flow"))
        diffusers.export(run, home / "out", quiet)


def test_rescaled_guidance_is_the_same(home):
    run = opened(text().replace("count = 4", "count = 4, guidance_rescale = 0.7"))
    card = diffusers.export(run, home / "out", quiet) / "README.md"
    assert "guidance_rescale=0.7" in card.read_text()


def test_a_folder_that_holds_something_is_left_alone(home):
    with pytest.raises(ExportError, match="`.*sd` is there already"):
        diffusers.export(opened(text()), home / "sd", quiet)
    (home / "out.partial").mkdir()  # whatever it is called
    diffusers.export(opened(text()), home / "out", quiet)
    assert sorted(p.name for p in home.iterdir()) == ["out", "out.partial", "sd"]
