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
LATENTS, PICTURES = "in the last latents", "in the pictures"


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
    scaled: tuple[float, ...] = ()  # what the network's inputs are multiplied by, where they are


@torch.no_grad()
def compare(run: Opened, folder: Path, made: Made) -> float:
    """The largest relative error between the run and the pipeline in a folder, of what the network
    is asked, the last latents and the pictures. Raises Parted above TOLERANCE."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder).to(run.device)
    pipe.set_progress_bar_config(disable=True)
    texts = [p.lower().strip() if made.lowers else p for p in prompts(run)]
    with exact():
        theirs = _theirs(pipe, made, texts, run)
        ours = _ours(run, texts, next(iter(theirs.values())), made.scaled)
    errors = [apart(found, ours[place]) for place, found in theirs.items()]
    for place, error in zip(theirs, errors, strict=True):
        if not error <= TOLERANCE:
            raise Parted(
                f"the pipeline parts from the run {place}: the relative error is {error:.1e}, and"
                f" {TOLERANCE:.0e} is allowed; nothing was written"
            )
    return max(errors)


def _ours(
    run: Opened, texts: list[str], first: Tensor, scaled: tuple[float, ...]
) -> dict[str, Tensor]:
    """What the network is asked, the latents at the end and the pictures, where it is asked `first`
    [B, ...] first; noise comes from one generator."""
    index, generator = torch.arange(len(texts), device=run.device), _generator(run)
    torch.randn(first.shape, generator=generator)  # what the pipeline began with
    plain = evaluate.sampler(run.model, run.sampling, index, texts)
    model = Recorded(**{f.name: getattr(plain, f.name) for f in fields(plain)})

    def law(like: Tensor, streams) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    x = first / scaled[0] if scaled else first
    latents = run.walk(model, x, run.grid, solvers.Draws(0, index, law))
    asked = [x * s for x, s in zip(model.asked, scaled, strict=True)] if scaled else model.asked
    pictures = run.parts.codec.decode(latents)
    return {**_numbered(asked), LATENTS: latents, PICTURES: pictures}


def _theirs(pipe, made: Made, texts: list[str], run: Opened) -> dict[str, Tensor]:
    """The same of a pipeline, as far as it has it: without a codec latents are the pictures."""
    with _met(getattr(pipe, made.network)) as asked, _decoded(getattr(pipe, "vae", None)) as ends:
        told = {**made.told(texts), **made.call, "generator": _generator(run)}
        shown = 2 * pipe(**told, output_type="pt").images - 1
    return _numbered([both[: len(texts)] for both, _ in asked]) | (ends or {PICTURES: shown})


def _numbered(asked: list[Tensor]) -> dict[str, Tensor]:
    return {f"before evaluation {n} of {len(asked)}": x for n, x in enumerate(asked, 1)}


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


@contextmanager
def _decoded(vae: nn.Module | None) -> Iterator[dict[str, Tensor]]:
    """The latents that a codec is given, and the pictures that it makes of them."""
    ends: dict[str, Tensor] = {}
    if vae is None:
        yield ends
        return
    first = vae.decoder if vae.post_quant_conv is None else vae.post_quant_conv
    with _met(first) as last, _met(vae.decoder) as shown:
        yield ends
    ends |= {LATENTS: last[0][0] * vae.config.scaling_factor, PICTURES: shown[0][1]}


def prompts(run: Opened) -> list[str]:
    """A few prompts: those of the spec, or words that the encoder knows."""
    text = run.parts.text
    own = list(run.sampling["prompts"]) or ([] if text is None else _words(text)) or [WORD]
    return (own * SAMPLES)[:SAMPLES]


def _words(text: nn.Module) -> list[str]:
    """Texts that an encoder knows: classes, or words that are tokens of a table cut to them."""
    if hasattr(text, "classes"):
        return text.vocabulary or [str(i) for i in range(text.classes)]
    known = text.vocabulary
    words = [word for word, ids in text.tokens.words(known) if len(ids) == 1] if known else []
    return [" ".join(some) for some in (words[-4:], words[:4]) if some]
