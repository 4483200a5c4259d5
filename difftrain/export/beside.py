"""A pipeline of diffusers, run beside the run that it was made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from difftrain.compiler.lowering import exact
from difftrain.export.errors import Parted
from difftrain.export.opened import Opened
from difftrain.export.parity import SAMPLES, Recorded, apart
from difftrain.models.text import TextEncoder
from difftrain.sampling import solvers
from difftrain.training import evaluate

TOLERANCE = 1e-3  # of relative errors: diffusers computes levels in fp32
WORD = "a picture of something"


@dataclass(frozen=True, eq=False)
class Made:
    """A pipeline, how it is called, and which of its modules is the network."""

    pipe: object
    call: Mapping[str, object]
    network: str
    lowers: bool = False  # whether it writes prompts in lower case


@torch.no_grad()
def compare(run: Opened, folder: Path, made: Made) -> float:
    """The largest relative error between the run and the pipeline in a folder, of what the network
    is asked, the last latents and the pictures. Raises Parted above TOLERANCE."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder).to(run.device)
    pipe.set_progress_bar_config(disable=True)
    texts = [p.lower().strip() if made.lowers else p for p in prompts(run)]
    with exact():
        asked, latents = _ours(run, texts)
        theirs, found = _theirs(pipe, made, texts, asked[0], run)
        decoded = pipe.vae.decode(found / pipe.vae.config.scaling_factor).sample
        pictures = run.parts.codec.decode(latents)
    pairs = [*zip(theirs, asked, strict=True), (found, latents), (decoded, pictures)]
    errors = [apart(a, b) for a, b in pairs]
    places = [f"before evaluation {n} of {len(asked)}" for n in range(1, len(asked) + 1)]
    places += ["in the last latents", "in the pictures"]
    for place, error in zip(places, errors, strict=True):
        if not error <= TOLERANCE:
            raise Parted(
                f"the pipeline parts from the run {place}: the relative error is {error:.1e}, and"
                f" {TOLERANCE:.0e} is allowed; nothing was written"
            )
    return max(errors)


def _ours(run: Opened, texts: list[str]) -> tuple[list[Tensor], Tensor]:
    """What the network is asked, and the latents at the end; noise comes from one generator."""
    index, generator = torch.arange(len(texts), device=run.device), _generator(run)
    plain = evaluate.sampler(run.model, run.sampling, index, texts)
    model = Recorded(**{f.name: getattr(plain, f.name) for f in fields(plain)})

    def law(like: Tensor, streams) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    draws = solvers.Draws(0, index, law)
    like = torch.zeros(len(texts), *run.shape, device=run.device)
    x = run.walk(model, solvers.start(model, like, run.grid, draws), run.grid, draws)
    return model.asked, x


def _theirs(
    pipe, made: Made, texts: list[str], x: Tensor, run: Opened
) -> tuple[list[Tensor], Tensor]:
    """The same of a pipeline, from the latents x [B, ...] on."""
    generator = _generator(run)
    torch.randn(x.shape, generator=generator)  # what our run began with
    told = {"prompt": texts, "latents": x, "generator": generator, "output_type": "latent"}
    with _asked(getattr(pipe, made.network)) as asked:
        found = pipe(**told, **made.call).images
    return [both[: len(x)] for both in asked], found


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


def prompts(run: Opened) -> list[str]:
    """A few prompts: those of the spec, or words that the encoder knows."""
    own = list(run.sampling["prompts"]) or _words(run.parts.text) or [WORD]
    return (own * SAMPLES)[:SAMPLES]


def _words(text: TextEncoder) -> list[str]:
    """Texts of the words that are tokens of an encoder whose table was cut to them."""
    known = text.vocabulary
    words = [word for word, ids in text.tokens.words(known) if len(ids) == 1] if known else []
    return [" ".join(some) for some in (words[-4:], words[:4]) if some]
