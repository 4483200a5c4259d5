"""The loss of a batch that any loader made, with modules as their libraries give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from difftrain.answer import unwrap
from difftrain.compiler.objective import Objective
from difftrain.language.term import walk
from difftrain.models.codec import spread, statistics
from difftrain.training.batches import read, warn_once
from difftrain.training.latents import Say
from difftrain.training.sources import DataError


def loss(
    objective: Objective,
    batch: object,
    *,
    codec=None,
    text=None,
    size: int | None = None,
    step: int = 0,
    seed: int = 0,
    say: Say = warn_once,
) -> Tensor:
    """The loss per sample [B] of a batch, after everything that the spec redefines.

        objective = difftrain.objective("spec.diff", unet)
        for step, batch in enumerate(loader):
            loss = difftrain.batch_loss(objective, batch, codec=vae, text=clip, step=step)
            loss.mean().backward()

    `batch` is a mapping, or an object with these attributes, one row per sample:

    - `latents` [B, C, ...]: what is trained on. Given ones win, and the codec is not called
    - `image`, where there are no latents: floats [B, 3, H, W] in [-1, 1], uint8, or paths that are
      read at `size`. Goes through the codec; without one it is trained on itself
    - `timesteps` [B]: given ones win over drawn ones, and over every redefinition of t
    - `input_ids` [B, T]: become the condition `text(input_ids)`; `null_ids` [1, T] or [B, T], the
      empty text, become the one of dropped rows. A text encoder of difftrain knows the empty text
    - `index` [B]: the global sample index that, with `seed` and `step`, keys every draw
    - `metadata`: anything; not read

    The network is called as `network(noisy_latents, timesteps, encoder_hidden_states)`, `codec` as
    `codec.encode(image)`, `text` as `text(input_ids)`. Each may return a tensor, a tuple, or an
    object with `.sample`, `.last_hidden_state` or `.latent_dist`. Latents of a codec with a
    `config` are shifted and scaled as that says. What wins over what is said once.

    Raises DataError for a batch that lacks what the objective reads.
    """
    needs = () if text is None else ("input_ids",)
    device = next((p.device for p in objective.parameters()), None)
    framed = None if codec is None else Framed(codec)
    made = read(batch, needs=needs, codec=framed, size=size, device=device, say=say)
    if text is None and "input_ids" in made:
        say("the batch has `input_ids`, and no `text` is given to read them")
    given = conditions(objective, made, text) | {"t": made.get("timesteps")}
    x0 = made["latents"] if "latents" in made else made["image"]
    return objective.loss(x0, **given, step=step, seed=seed, index=made.get("index"))


@dataclass(frozen=True)
class Framed:
    """A codec of any library, as something that encodes to one tensor."""

    codec: object

    def encode(self, image: Tensor) -> Tensor:
        """Latents [B, C, h, w] of pictures [B, 3, H, W], as the codec's `config` shifts and scales
        them."""
        z = unwrap(self.codec.encode(image))
        config = getattr(self.codec, "config", None)
        if not isinstance(config, Mapping):
            return z
        scale, shift = (spread(number).to(z) for number in statistics(config))
        return (z - shift) * scale


def conditions(objective: Objective, batch: Mapping, text) -> dict[str, Tensor]:
    """`cond` [B, T, D], and `null` where the objective reads it."""
    if text is None:
        return {}
    cond = unwrap(text(batch["input_ids"]))
    if not reads_null(objective):
        return {"cond": cond}
    ids = batch.get("null_ids")
    if ids is None and not hasattr(text, "ids"):
        raise DataError(
            "the objective drops conditions, and the batch has no `null_ids`: add the token ids of "
            "the empty text"
        )
    ids = text.ids([""]).to(cond.device) if ids is None else ids
    return {"cond": cond, "null": unwrap(text(ids))}


def reads_null(objective: Objective) -> bool:
    """Whether some rows may get the empty condition."""
    terms = walk(objective.declared.quantity("loss"))
    return any(t.op == "input" and t["name"] == "null" for t in terms)
