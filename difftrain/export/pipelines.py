"""The pipeline of diffusers for a network of ours, by the network's kind."""

from __future__ import annotations

from inspect import signature

import torch
from torch import nn

from difftrain.export import dit, saved
from difftrain.export.beside import Made
from difftrain.export.continuous import other_times, preconditioned, stepped
from difftrain.export.errors import ExportError, no_pipeline
from difftrain.export.opened import Opened
from difftrain.export.schedulers import scheduler
from difftrain.models import is_foreign
from difftrain.models.codec import Codec, Pixels
from difftrain.models.labels import Labels
from difftrain.models.text import TextEncoder

EVERY = 1000  # times that stand for all of a continuous process
EXACT_ANYWHERE = 1e-4  # of a layer that was solved for


def pipeline(run: Opened) -> Made:
    """The pipeline of the network's kind, made of copies."""
    if is_foreign(run.objective.backbone.part):  # its class may be called as one of ours
        raise ExportError(no_pipeline("a network from Python"))
    student = run.parts.modules["student"]
    network = getattr(student, "module", student)
    make = PIPELINES.get(type(network).__name__)
    if make is None:
        raise ExportError(NONE.get(type(network).__name__, no_pipeline("this backbone")))
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
    return Made(pipe, _called(run, pipe), "unet", scaled=_scaled(run))


def _pixart(run: Opened, network: nn.Module) -> Made:
    from diffusers import PixArtSigmaPipeline

    text = _text(run, "T5EncoderModel", "t5.encoder")
    if text.compact is not None or text.padding is None or not hasattr(text.tokens, "after"):
        raise ExportError(
            "PixArt's pipeline hides padding from a T5 encoder with its own tokenizer: use"
            " `t5.encoder` with `weights`, and leave `padding = hidden`"
        )
    _rescales_nothing(run, "PixArt")
    _is_not_noised_again(run, "PixArt")
    if network.use_additional_conditions:
        raise ExportError(no_pipeline("a PixArt network that is told the sides of the picture"))
    pipe = PixArtSigmaPipeline(
        **_framed(run),
        transformer=saved.copied(network, sample_size=run.shape[1]),
        text_encoder=saved.encoder(text),
        tokenizer=text.tokens.backend,
    )
    more = {"max_sequence_length": text.length, "clean_caption": False}
    call = {**_called(run, pipe), **more, "use_resolution_binning": False}
    return Made(pipe, call, "transformer", lowers=True, scaled=_scaled(run))


def _dit(run: Opened, network: nn.Module) -> Made:
    from diffusers import DiTPipeline

    dit.fits(network.form)
    if not isinstance(run.parts.text, Labels):
        raise ExportError(no_pipeline("classes that Python tells"))
    _fits_dit(run)
    scale = 1 if run.indexed else max(1, round(network.form.time_scale))
    steps = scheduler(run, scale)
    transformer, off = dit.transformer(network, run.shape[1], _times(run, scale))
    pipe = DiTPipeline(transformer, vae=_autoencoder(run), scheduler=steps)
    labels, call = run.parts.text, _called(run, pipe)
    pipe.register_to_config(id2label={str(i): name for name, i in labels.place.items()} or None)

    def told(texts: list[str]) -> dict[str, object]:
        ids = labels.ids(texts)[:, 0].tolist()
        return {"class_labels": [dit.NULL if i == labels.classes else i for i in ids]}

    known = "" if off <= EXACT_ANYWHERE else _steps_alone(call["num_inference_steps"])
    return Made(pipe, call, "transformer", told=told, known=known)


def _fits_dit(run: Opened) -> None:
    """Refuses what DiT's pipeline does not do around its network."""
    if run.table.draws:
        raise ExportError(
            "DiT's pipeline draws what its solver adds without a seed: use a solver that draws"
            " nothing, such as `ddim`"
        )
    _rescales_nothing(run, "DiT")
    _is_not_noised_again(run, "DiT")
    if preconditioned(run) is not None:
        raise ExportError(
            "DiT's pipeline begins with noise of deviation 1, and this process ends in more:"
            " export to another target, such as `onnx`"
        )


def _blind(run: Opened, network: nn.Module) -> Made:
    """The pipeline of pictures that follow no condition."""
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline

    if network.config.num_class_embeds is not None:
        raise ExportError(no_pipeline("a UNet that is told a class"))
    if not isinstance(run.parts.codec, Pixels):
        raise ExportError(no_pipeline("a UNet of latents that reads no text"))
    if not run.indexed:
        raise ExportError(no_pipeline("a UNet that reads no text, on continuous times"))
    steps = _framed_scheduler(run)
    kind = DDIMPipeline if isinstance(steps, DDIMScheduler) else DDPMPipeline
    pipe = kind(unet=saved.copied(network, sample_size=run.shape[1]), scheduler=steps)
    known = signature(pipe.__call__).parameters
    call = {name: value for name, value in _called(run, pipe).items() if name in known}
    return Made(pipe, call, "unet", told=lambda texts: {"batch_size": len(texts)})


def _rescales_nothing(run: Opened, name: str) -> None:
    if run.sampling["guidance_rescale"]:
        raise ExportError(f"{name}'s pipeline rescales no guidance: leave `guidance_rescale` out")


def _is_not_noised_again(run: Opened, name: str) -> None:
    if not run.indexed and run.sampling["solver"].module == "multistep":
        raise ExportError(
            f"{name}'s pipeline cannot be given the scheduler that makes the moves of `multistep`"
            " on continuous times: use `euler`"
        )


def _times(run: Opened, scale: int) -> dit.Times:
    """The times of the solver and of the whole process."""
    kind, low, high = run.bundle.manifest["time"]
    every = torch.arange(int(high)) if kind == "index" else torch.linspace(low, high, EVERY)
    return dit.Times(run.grid[:-1], every, scale)


def _steps_alone(steps: int) -> str:
    return (
        "its network is told times at other rates than the one that was trained, and is the same"
        f" at those of {steps} step{'s' * (steps != 1)} alone: export again to sample with another"
        " number"
    )


PIPELINES = {
    "UNet2DConditionModel": _stable_diffusion,
    "PixArtTransformer2DModel": _pixart,
    "Transformer": _dit,
    "UNet2DModel": _blind,
}
NONE = {
    "SD3Transformer2DModel": "the pooled text of this network is a projection of its own, and"
    " Stable Diffusion 3's pipeline takes CLIP's: export to another target, such as `onnx`",
}


def _framed(run: Opened) -> dict[str, object]:
    """What pipelines share that call the network itself, with a condition."""
    made = {"scheduler": _framed_scheduler(run), "vae": _autoencoder(run)}
    if not hasattr(made["scheduler"], "init_noise_sigma"):  # pipelines ask for it
        made["scheduler"].register_to_config(init_noise_sigma=1.0)
    return made


def _framed_scheduler(run: Opened):
    """The scheduler for a network that is told times as the scheduler has them."""
    scale = run.parts.modules["student"].time_scale
    if scale != 1 and (run.indexed or preconditioned(run) is not None):
        raise ExportError(
            f"`time_scale = {scale:g}`, and the pipelines of diffusers tell this network its times"
            " as they are: train it with `time_scale = 1`"
        )
    if scale < 1 or scale % 1:
        raise ExportError(
            f"`time_scale = {scale:g}`, and schedulers of diffusers tell times whole numbers as"
            " large: train it with one, such as `time_scale = 1000`"
        )
    return scheduler(run, int(scale))


def _autoencoder(run: Opened) -> nn.Module:
    """The codec as pipelines of latents know it."""
    codec = run.parts.codec
    if not isinstance(codec, Codec) or type(codec.model).__name__ != "AutoencoderKL":
        raise ExportError(
            "the pipelines of diffusers decode latents of an AutoencoderKL, and the codec is none:"
            " use `codec = sd.vae`"
        )
    return saved.autoencoder(codec)


def _scaled(run: Opened) -> tuple[float, ...]:
    """What the scheduler multiplies the network's input by, at every evaluation of a
    preconditioned network."""
    data = preconditioned(run)
    if data is None:
        return ()
    if run.sampling["guidance_rescale"]:
        raise ExportError(
            "diffusers rescales the guidance of what a network answers, and here that is not the"
            " prediction: leave `guidance_rescale` out"
        )
    return tuple((1 / (run.grid[:-1] ** 2 + data**2).sqrt()).tolist())


def _text(run: Opened, kind: str, instead: str) -> TextEncoder:
    """The text encoder, which the pipeline can only have of one kind."""
    text = run.parts.modules.get("text")
    known = isinstance(text, TextEncoder) and type(text.model).__name__ == kind
    if not known or text.before is not None:
        raise ExportError(
            f"{run.encoder} encodes the prompts of this run, and the pipeline of its network reads"
            f" them through one `{instead}`: train with `text = {instead}`, or export to another"
            " target, such as `onnx`"
        )
    return text


def _called(run: Opened, pipe) -> dict[str, object]:
    """What a pipeline is called with."""
    call, solver = stepped(run, pipe.scheduler), run.sampling["solver"]
    known = signature(pipe.__call__).parameters
    if not call.keys() <= known.keys():
        raise ExportError(other_times(solver, "`grid = even`"))
    more = {
        "eta": solver.options.get("eta", 0) if "eta" in known else 0,
        "guidance_rescale": run.sampling["guidance_rescale"],
    }
    more = {name: float(value) for name, value in more.items() if value}
    return {**call, "guidance_scale": _guidance(run), **more}


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
