"""A run as a pipeline folder of diffusers, which samples as the run does.

The folder is written, loaded again and run beside the run on the same noise; where the two part,
nothing is left of it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import difftrain
from difftrain.export import dit, saved
from difftrain.export.beside import Made, compare, prompts
from difftrain.export.errors import ExportError
from difftrain.export.opened import Opened
from difftrain.export.schedulers import of_steps, scheduler
from difftrain.language.forms import clock
from difftrain.language.term import is_const
from difftrain.models.text import TextEncoder
from difftrain.training.folder import writable

EVERY = 1000  # times that stand for all of a continuous process
EXACT_ANYWHERE = 1e-4  # of a layer that was solved for
WRAPPED = {"c_in": 1, "c_out": 1, "c_skip": 0}  # what a network is called bare with


def export(run: Opened, folder: Path, say: Callable[[str], object] = print) -> Path:
    """Writes the pipeline folder of a run. Raises ExportError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"`{folder}` is there already: say with `-o` where the folder goes")
    writable(folder)
    _samples_bare(run)
    made = _pipeline(run)
    beside = folder.with_name(f"{folder.name}.partial")
    try:
        made.pipe.save_pretrained(beside)
        saved.label(beside, _facts(run))
        error = compare(run, beside, made)
        say(f"latents and pictures are those of the run: relative error {error:.1e}")
        (beside / "README.md").write_text(_card(run, made, folder, error), encoding="utf-8")
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


# ---- what diffusers has no form for


def _samples_bare(run: Opened) -> None:
    """Refuses what no pipeline does: more than a network at (x, t, condition) that returns the
    prediction, and noise that is not standard normal."""
    objective, student = run.objective, run.parts.modules["student"]
    derivation = objective.derivation()
    wrapped = [n for n, v in WRAPPED.items() if not is_const(derivation.read(n), v)]
    if derivation.read("c_noise") is not derivation.read(clock(objective.equations)):
        wrapped.append("c_noise")
    further = [*objective.backbone.interface.times[1:], *getattr(student, "further", ())]
    if further:
        raise ExportError(_no_pipeline(f"a network that is told `{further[0]}` as well"))
    if run.guess:
        raise ExportError(_no_pipeline("a network that is shown its earlier estimate"))
    if wrapped:
        raise ExportError(
            f"the network is trained inside `{wrapped[0]}`, and diffusers calls it bare: sample the"
            " run with `difftrain sample`, or train it without preconditioning"
        )
    if run.model.programs.noise is not None:
        raise ExportError(_no_pipeline("noise that is not standard normal"))


def _no_pipeline(what: str) -> str:
    return f"diffusers has no pipeline for {what}: export to another target, such as `onnx`"


def _guidance(run: Opened) -> float:
    """The scale that a pipeline is called with."""
    scale, inside = run.guidance
    for option, means in {"guide": "a weaker model", "guidance_interval": "an interval"}.items():
        if run.sampling[option]:
            raise ExportError(
                f"`{option}`: the pipelines of diffusers have no guidance by {means}: leave it out"
            )
    asked = run.sampling["guidance"]
    if run.parts.text is not None and not inside and scale < 1:
        raise ExportError(f"`guidance = {scale:g}`: diffusers has none below 1")
    if any(value != asked - 1 for value in inside.values()):
        raise ExportError(
            "the network is given its guidance, and pipelines of diffusers give it the scale less"
            " 1: declare `has_guidance = 1 + w`"
        )
    return float(asked)


# ---- pipelines


def _pipeline(run: Opened) -> Made:
    """The pipeline of the network's kind, made of copies."""
    student = run.parts.modules["student"]
    network = getattr(student, "module", student)
    make = PIPELINES.get(type(network).__name__)
    if make is None:
        raise ExportError(NONE.get(type(network).__name__, _no_pipeline("this backbone")))
    return make(run, network)


def _stable_diffusion(run: Opened, network: nn.Module) -> Made:
    from diffusers import StableDiffusionPipeline

    text = _text(run, "CLIPTextModel", "sd.clip")
    pipe = StableDiffusionPipeline(
        **_framed(run),
        unet=saved.copied(network, sample_size=run.shape[1]),
        text_encoder=saved.encoder(text),
        tokenizer=saved.byte_pairs(text),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return Made(pipe, _called(run), "unet")


def _pixart(run: Opened, network: nn.Module) -> Made:
    from diffusers import PixArtSigmaPipeline

    text = _text(run, "T5EncoderModel", "t5.encoder")
    if text.compact is not None or text.padding is None or not hasattr(text.tokens, "after"):
        raise ExportError(
            "PixArt's pipeline hides padding from a T5 encoder with its own tokenizer: use"
            " `t5.encoder` with `weights`, and leave `padding = hidden`"
        )
    _rescales_nothing(run, "PixArt")
    if network.use_additional_conditions:
        raise ExportError(_no_pipeline("a PixArt network that is told the sides of the picture"))
    pipe = PixArtSigmaPipeline(
        **_framed(run),
        transformer=saved.copied(network, sample_size=run.shape[1]),
        text_encoder=saved.encoder(text),
        tokenizer=text.tokens.backend,
    )
    more = {"max_sequence_length": text.length, "clean_caption": False}
    call = {**_called(run), **more, "use_resolution_binning": False}
    return Made(pipe, call, "transformer", lowers=True)


def _dit(run: Opened, network: nn.Module) -> Made:
    from diffusers import DiTPipeline

    dit.fits(network.form)
    if run.table.draws:
        raise ExportError(
            "DiT's pipeline draws what its solver adds without a seed: use a solver that draws"
            " nothing, such as `ddim`"
        )
    _rescales_nothing(run, "DiT")
    call = _called(run)
    scale = 1 if of_steps(run) else max(1, round(network.form.time_scale))
    transformer, off = dit.transformer(network, run.shape[1], _times(run, scale))
    pipe = DiTPipeline(transformer, **_shared(run, scale))
    labels = run.parts.text
    pipe.register_to_config(id2label={str(i): name for name, i in labels.place.items()} or None)
    known = "" if off <= EXACT_ANYWHERE else _steps_alone(call["num_inference_steps"])

    def told(texts: list[str]) -> dict[str, object]:
        ids = labels.ids(texts)[:, 0].tolist()
        return {"class_labels": [dit.NULL if i == labels.classes else i for i in ids]}

    return Made(pipe, call, "transformer", told=told, known=known)


def _rescales_nothing(run: Opened, name: str) -> None:
    if run.sampling["guidance_rescale"]:
        raise ExportError(f"{name}'s pipeline rescales no guidance: leave `guidance_rescale` out")


def _times(run: Opened, scale: int) -> dit.Times:
    """The times of the solver and of the whole process."""
    kind, low, high = run.bundle.manifest["time"]
    every = torch.arange(int(high)) if kind == "index" else torch.linspace(low, high, EVERY)
    return dit.Times(run.grid[:-1], every, scale)


def _steps_alone(steps: int) -> str:
    return (
        f"\nThe network of this pipeline embeds times at other rates than the one that was trained,"
        f" and is the same\nat the times of {steps} steps alone: export again to sample with"
        " another number.\n"
    )


PIPELINES = {
    "UNet2DConditionModel": _stable_diffusion,
    "PixArtTransformer2DModel": _pixart,
    "Transformer": _dit,
}
NONE = {
    "SD3Transformer2DModel": "the pooled text of this network is a projection of its own, and"
    " Stable Diffusion 3's pipeline takes CLIP's: export to another target, such as `onnx`",
    "UNet2DModel": _no_pipeline("a UNet that reads no text"),
}


def _framed(run: Opened) -> dict[str, object]:
    """What pipelines share that call the network itself, which is told times as the scheduler
    has them."""
    scale = run.parts.modules["student"].time_scale
    if of_steps(run) and scale != 1:
        raise ExportError(
            f"`time_scale = {scale:g}`, and the pipelines of diffusers tell this network its times"
            " as they are: train it with `time_scale = 1`"
        )
    if scale < 1 or scale % 1:
        raise ExportError(
            f"`time_scale = {scale:g}`, and schedulers of diffusers tell times whole numbers as"
            " large: train it with one, such as `time_scale = 1000`"
        )
    made = _shared(run, int(scale))
    if not hasattr(made["scheduler"], "init_noise_sigma"):  # pipelines ask for it
        made["scheduler"].register_to_config(init_noise_sigma=1.0)
    return made


def _shared(run: Opened, scale: int) -> dict[str, object]:
    """The scheduler, which tells times `scale` times as large, and the codec as pipelines of
    latents know it."""
    codec = run.parts.codec
    if type(codec.model).__name__ != "AutoencoderKL":
        raise ExportError(
            "the pipelines of diffusers decode latents of an AutoencoderKL, and the codec is none:"
            " use `codec = sd.vae`"
        )
    return {"scheduler": scheduler(run, scale), "vae": saved.autoencoder(codec)}


def _text(run: Opened, kind: str, instead: str) -> TextEncoder:
    """The text encoder, which the pipeline can only have of one kind."""
    text = run.parts.modules.get("text")
    model = getattr(text, "model", None)
    if type(model).__name__ != kind or text.before is not None:
        raise ExportError(
            f"{run.encoder} encodes the prompts of this run, and the pipeline of its network reads"
            f" them through one `{instead}`: train with `text = {instead}`, or export to another"
            " target, such as `onnx`"
        )
    return text


def _called(run: Opened) -> dict[str, object]:
    """What a pipeline is called with."""
    eta = run.sampling["solver"].options.get("eta", 0)
    call = {"num_inference_steps": len(run.grid) - 1, "guidance_scale": _guidance(run)}
    more = {"eta": float(eta), "guidance_rescale": float(run.sampling["guidance_rescale"])}
    return {**call, **{name: value for name, value in more.items() if value}}


def _facts(run: Opened) -> dict[str, str]:
    """What a file of weights says of itself."""
    manifest, step = run.bundle.manifest, str(run.model.step)
    own = {name: manifest[name] for name in ("name", "spec", "graph")}
    return {**own, "step": step, "difftrain": difftrain.__version__}


def _card(run: Opened, made: Made, folder: Path, error: float) -> str:
    manifest = run.bundle.manifest
    given = {**made.told(prompts(run)[:1]), **made.call}
    call = ",".join(f"\n    {name}={value!r}" for name, value in given.items())
    return f"""# {manifest["name"]}

A pipeline of diffusers, exported by difftrain {difftrain.__version__} from step {run.model.step} of
the spec {manifest["spec"]} (graph {manifest["graph"]}).

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder.name}")
picture = pipe({call},
).images[0]
```

On the same first latents it makes those of `difftrain sample`: the relative error was {error:.1e}.
Pipelines begin with noise of standard deviation 1; the run begins with sigma of its first time.
{made.known}"""
