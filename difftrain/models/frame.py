"""The frame that calls foreign networks alike: more times and inputs, taps, named dropout, forward
mode. What it adds to a network starts as zero."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from difftrain.models.dropout import install
from difftrain.models.embedding import Scalar
from difftrain.models.errors import PartError
from difftrain.models.forward import differentiable

KNOWN = ("w", "guess")
SCALE = 1000  # of a guidance scale, arXiv:2310.04378 section 4.3


class Frame(nn.Module):
    """Calls a module as network(x, t, cond, **extra), which gives [B, C, h, w].

    x [B, C, h, w]; t [B] (an index, or real: it is multiplied by `time_scale` first); cond
    [B, T, width] or labels [B, 1]; further times [B] by name, each of which adds an embedding of
    t minus it; `w` [B], a guidance scale; `guess` [B, C, h, w]. With `tap` it gives the tokens
    [B, T, tap_width] of that place as well. `width` is that of what the module is told.
    """

    own_scale = False  # whether the module itself embeds `w`

    def __init__(
        self,
        module: nn.Module,
        width: int,
        *,
        time_scale: float = 1.0,
        times: Sequence[str] = ("t",),
        inputs: Sequence[str] = (),
        tap: int = 0,
        dropout: float = 0.0,
        forward_mode: bool = False,
    ):
        super().__init__()
        self.module, self.time_scale, self.tap = module, time_scale, tap
        self.times, self.inputs = tuple(times[1:]), _named(inputs)
        scalars = self.times if self.own_scale or "w" not in self.inputs else (*self.times, "w")
        self.further = nn.ModuleDict({name: _silent(Scalar(width)) for name in scalars})
        self.masks = install(module, dropout) if dropout else None
        if forward_mode:
            differentiable(module)

    def forward(self, x: Tensor, t: Tensor, cond=None, *, masks=None, guess=None, **extra):
        x = x if guess is None else torch.cat([x, guess], dim=1)
        with self.masks.handed(masks) if self.masks else nullcontext():
            told = self._told(t, extra)
            output, tokens = self.run(x, t * self.time_scale, cond, told, extra.get("w"))
        return (output, tokens) if self.tap else output

    def run(self, x: Tensor, t: Tensor, cond, told: Tensor | int, w: Tensor | None):
        """(output, tokens) of the module, which is told `told` [B, width] more than t."""
        raise NotImplementedError

    def _told(self, t: Tensor, extra: dict[str, Tensor]) -> Tensor | int:
        numbers = {name: (t - extra[name]) * self.time_scale for name in self.times}
        if "w" in extra:
            numbers["w"] = extra["w"] * SCALE
        return sum(embed(numbers[name]) for name, embed in self.further.items())


def _named(inputs: Sequence[str]) -> tuple[str, ...]:
    """The last names of further inputs, as they arrive."""
    names = tuple(name.rpartition(".")[2] for name in inputs)
    if wrong := [name for name in names if name not in KNOWN]:
        raise PartError(
            f"this network cannot be given `{wrong[0]}`: its `inputs` may be a guidance scale `w` "
            "and an earlier estimate `guess`"
        )
    return names


def _silent(scalar: Scalar) -> Scalar:
    """The embedding, adding nothing yet."""
    nn.init.zeros_(scalar.mlp[-1].weight)
    nn.init.zeros_(scalar.mlp[-1].bias)
    return scalar


def widened(old: nn.Conv2d, more: int) -> nn.Conv2d:
    """The convolution with further channels to look at, whose weights are zero."""
    channels = old.in_channels + more
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride, old.padding)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, : old.in_channels] = old.weight
        new.bias.copy_(old.bias)
    return new


def agree(weights: str, takes: int, reads: int | None, codec, text) -> None:
    """Refuse a pretrained network of `takes` latent channels that reads text of width `reads` (None
    for no text) where the codec or the encoder makes others."""
    if codec and takes != codec.channels:
        raise PartError(
            f"the network in `{weights}` takes {takes} latent channels, but the codec makes "
            f"{codec.channels}: use the codec that it was trained with"
        )
    if reads and text and reads != text.width:
        raise PartError(
            f"the network in `{weights}` reads text of width {reads}, but the text encoder gives "
            f"{text.width}: use the encoder that it was trained with"
        )
