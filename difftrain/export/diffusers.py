"""A run as a pipeline folder of diffusers, which samples as the run does.

The folder is written, loaded again and run beside the run on the same noise; where the two part,
nothing is left of it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import difftrain
from difftrain.export import saved
from difftrain.export.errors import ExportError, Parted
from difftrain.export.opened import Opened
from difftrain.export.schedulers import scheduler
from difftrain.language.forms import clock
from difftrain.language.term import is_const
from difftrain.models.text import TextEncoder
from difftrain.sampling import solvers
from difftrain.training import evaluate

TOLERANCE = 1e-3  # of relative errors, at every evaluation and of the last latents and pictures
COUNT = 2  # samples that are compared
WORD = "a picture of something"
WRAPPED = {"c_in": 1, "c_out": 1, "c_skip": 0}  # what a network is called bare with


@dataclass(frozen=True, eq=False)
class Made:
    """A pipeline, how it is called, and which of its modules is the network."""

    pipe: object
    call: Mapping[str, object]
    network: str
    lowers: bool = False  # whether it writes prompts in lower case


def export(run: Opened, folder: Path, say: Callable[[str], object] = print) -> Path:
    """Writes the pipeline folder of a run. Raises ExportError."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"`{folder}` is there already: say with `-o` where the folder goes")
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
    network = getattr(run.parts.modules["student"], "module", None)
    make = PIPELINES.get(type(network).__name__)
    if make is None:
        raise ExportError(NONE.get(type(network).__name__, _no_pipeline("this backbone")))
    return make(run, network)


def _stable_diffusion(run: Opened, network: nn.Module) -> Made:
    from diffusers import StableDiffusionPipeline

    text = _text(run, "CLIPTextModel", "sd.clip")
    pipe = StableDiffusionPipeline(
        **_shared(run),
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
    if run.sampling["guidance_rescale"]:
        raise ExportError("PixArt's pipeline rescales no guidance: leave `guidance_rescale` out")
    if network.use_additional_conditions:
        raise ExportError(_no_pipeline("a PixArt network that is told the sides of the picture"))
    pipe = PixArtSigmaPipeline(
        **_shared(run),
        transformer=saved.copied(network, sample_size=run.shape[1]),
        text_encoder=saved.encoder(text),
        tokenizer=text.tokens.backend,
    )
    more = {"max_sequence_length": text.length, "clean_caption": False}
    call = {**_called(run), **more, "use_resolution_binning": False}
    return Made(pipe, call, "transformer", lowers=True)


PIPELINES = {
    "UNet2DConditionModel": _stable_diffusion,
    "PixArtTransformer2DModel": _pixart,
}
NONE = {
    "SD3Transformer2DModel": "the pooled text of this network is a projection of its own, and"
    " Stable Diffusion 3's pipeline takes CLIP's: export to another target, such as `onnx`",
    "UNet2DModel": _no_pipeline("a UNet that reads no text"),
}


def _shared(run: Opened) -> dict[str, object]:
    """The scheduler, and the codec as pipelines of latents know it."""
    codec, scale = run.parts.codec, run.parts.modules["student"].time_scale
    if scale != 1:
        raise ExportError(
            f"`time_scale = {scale:g}`, and the pipelines of diffusers tell this network its times"
            " as they are: train it with `time_scale = 1`"
        )
    if type(codec.model).__name__ != "AutoencoderKL":
        raise ExportError(
            "the pipelines of diffusers decode latents of an AutoencoderKL, and the codec is none:"
            " use `codec = sd.vae`"
        )
    return {
        "scheduler": scheduler(run),
        "vae": saved.autoencoder(codec),
    }


def _text(run: Opened, kind: str, instead: str) -> TextEncoder:
    """The text encoder, which the pipeline can only have of one kind."""
    text = run.parts.modules.get("text")
    model = getattr(text, "model", None)
    if type(model).__name__ != kind or text.before is not None:
        raise ExportError(
            f"the pipeline of this network reads text through one `{instead}`, and the backbone has"
            f" something else: write `text = {instead}`"
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
    call = "".join(f",\n    {name}={value!r}" for name, value in made.call.items())
    return f"""# {manifest["name"]}

A pipeline of diffusers, exported by difftrain {difftrain.__version__} from step {run.model.step} of
the spec {manifest["spec"]} (graph {manifest["graph"]}).

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder.name}")
picture = pipe(
    {_prompts(run)[0]!r}{call},
).images[0]
```

On the same first latents it makes those of `difftrain sample`: the relative error was {error:.1e}.
Pipelines begin with noise of standard deviation 1; the run begins with sigma of its first time.
"""


# ---- the gate


@torch.no_grad()
def compare(run: Opened, folder: Path, made: Made) -> float:
    """The largest relative error between the run and the pipeline in a folder, of what the network
    is asked, the last latents and the pictures. Raises Parted above TOLERANCE."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder).to(run.device)
    pipe.set_progress_bar_config(disable=True)
    prompts = [p.lower().strip() if made.lowers else p for p in _prompts(run)]
    asked, latents = _ours(run, prompts)
    theirs, found = _theirs(pipe, made, prompts, asked[0][: len(prompts)], run)
    pictures = run.parts.codec.decode(latents)
    decoded = pipe.vae.decode(found / pipe.vae.config.scaling_factor).sample
    places = [f"before evaluation {n} of {len(asked)}" for n in range(1, len(asked) + 1)]
    pairs = [*zip(asked, theirs, strict=True), (latents, found), (pictures, decoded)]
    errors = [_apart(a, b) for a, b in pairs]
    places += ["in the last latents", "in the pictures"]
    for place, error in zip(places, errors, strict=True):
        if not error <= TOLERANCE:
            raise Parted(
                f"the pipeline parts from the run {place}: the relative error is {error:.1e}, and"
                f" {TOLERANCE:.0e} is allowed; nothing was written"
            )
    return max(errors)


def _ours(run: Opened, prompts: list[str]) -> tuple[list[Tensor], Tensor]:
    """What the network is asked, and the latents at the end; noise comes from one generator."""
    index, generator = torch.arange(len(prompts), device=run.device), _generator(run)
    model = evaluate.sampler(run.model, run.sampling, index, prompts)

    def law(like: Tensor, streams) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    draws = solvers.Draws(0, index, law)
    like = torch.zeros(len(prompts), *run.shape, device=run.device)
    with _asked(run.parts.modules["student"]) as asked:
        x = run.walk(model, solvers.start(model, like, run.grid, draws), run.grid, draws)
    return asked, x


def _theirs(pipe, made: Made, prompts: list[str], x: Tensor, run: Opened):
    """The same of a pipeline, from the latents x [B, ...] on."""
    generator = _generator(run)
    torch.randn(x.shape, generator=generator)  # what our run began with
    told = {"prompt": prompts, "latents": x, "generator": generator, "output_type": "latent"}
    with _asked(getattr(pipe, made.network)) as asked:
        found = pipe(**told, **made.call).images
    return asked, found


def _generator(run: Opened) -> torch.Generator:
    return torch.Generator().manual_seed(run.sampling["seed"])


@contextmanager
def _asked(network: nn.Module) -> Iterator[list[Tensor]]:
    """The noisy samples that a network is asked about, in order."""
    asked: list[Tensor] = []
    hook = network.register_forward_pre_hook(lambda _, given: asked.append(given[0].clone()))
    try:
        yield asked
    finally:
        hook.remove()


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """|a - b| / |a|; infinite for other shapes."""
    if ours.shape != theirs.shape:
        return float("inf")
    return ((ours - theirs).norm() / ours.norm()).item()


def _prompts(run: Opened) -> list[str]:
    """COUNT prompts: those of the spec, or words that the encoder knows."""
    own = list(run.sampling["prompts"]) or _words(run.parts.text) or [WORD]
    return (own * COUNT)[:COUNT]


def _words(text: TextEncoder) -> list[str]:
    """The words that are tokens of an encoder whose table was cut to them."""
    known = text.vocabulary
    return [word for word, ids in text.tokens.words(known) if len(ids) == 1] if known else []
