"""A pipeline of diffusers, run beside the run that it was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from difftrain.compiler.lowering import exact
from difftrain.export.errors import Parted
from difftrain.export.opened import Opened
from difftrain.export.parity import SAMPLES, Recorded, apart
from difftrain.sampling import solvers
from difftrain.training import evaluate

TOLERANCE = 1e-3  # of relative errors: diffusers computes levels in fp32
WORD = "a picture of something"


def _prompts(texts: list[str]) -> dict[str, object]:
    return {"prompt": texts}


@dataclass(frozen=True, eq=False)
class Made:
    """A pipeline, how it is called, and which of its modules is the network."""

    pipe: object
    call: Mapping[str, object]
    network: str
    lowers: bool = False  # whether it writes prompts in lower case
    told: Callable[[list[str]], Mapping[str, object]] = _prompts  # how it is told texts
    known: str = ""  # what a reader of its README should know


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
        theirs = _theirs(pipe, made, texts, run)
        pictures = run.parts.codec.decode(latents)
    errors = [apart(a, b) for a, b in zip(theirs, (*asked, latents, pictures), strict=True)]
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
    x = draws.noise(0, torch.zeros(len(texts), *run.shape, device=run.device))
    return model.asked, run.walk(model, x, run.grid, draws)


def _theirs(pipe, made: Made, texts: list[str], run: Opened) -> list[Tensor]:
    """What a pipeline asks its network, its last latents and its pictures; it begins with what the
    generator draws first, as the run does here."""
    vae = pipe.vae
    first = vae.decoder if vae.post_quant_conv is None else vae.post_quant_conv
    with (
        _met(getattr(pipe, made.network)) as asked,
        _met(first) as last,
        _met(vae.decoder) as shown,
    ):
        pipe(**made.told(texts), **made.call, generator=_generator(run), output_type="pt")
    latents = last[0][0] * vae.config.scaling_factor
    return [*(both[: len(texts)] for both, _ in asked), latents, shown[0][1]]


def _generator(run: Opened) -> torch.Generator:
    return torch.Generator().manual_seed(run.sampling["seed"])


@contextmanager
def _met(module: nn.Module) -> Iterator[list[tuple[Tensor, object]]]:
    """What a module is given first and what it answers, call by call."""
    calls: list[tuple[Tensor, object]] = []
    hook = module.register_forward_hook(
        lambda _, given, made: calls.append((given[0].clone(), made))
    )
    try:
        yield calls
    finally:
        hook.remove()


def prompts(run: Opened) -> list[str]:
    """A few prompts: those of the spec, or words that the encoder knows."""
    own = list(run.sampling["prompts"]) or _words(run.parts.text) or [WORD]
    return (own * SAMPLES)[:SAMPLES]


def _words(text: nn.Module) -> list[str]:
    """Texts that an encoder knows: classes, or words that are tokens of a table cut to them."""
    if hasattr(text, "classes"):
        return text.vocabulary or [str(i) for i in range(text.classes)]
    known = text.vocabulary
    words = [word for word, ids in text.tokens.words(known) if len(ids) == 1] if known else []
    return [" ".join(some) for some in (words[-4:], words[:4]) if some]
