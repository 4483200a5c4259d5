"""Dropout whose masks are named random streams, so that two forwards can share them.

Consistency training compares a network with itself at two noise levels under one mask
(arXiv:2303.01469), and a mask that is a function of (seed, step, sample) survives a resumed run.
One number is drawn per sample and call; the masks are hashes of it, the stream's name and the place
of each element: a tenth of the arithmetic of full draws, in every one of many layers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

WORD = 1 << 31  # products of such words and the multipliers stay inside int64
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)


class Masks:
    """What the dropouts of one network make their masks from, for as long as a call lasts."""

    def __init__(self):
        self.key: Tensor | None = None

    @contextmanager
    def handed(self, draws) -> Iterator[None]:
        """Inside, dropouts have the masks of `draws` (a `Draws`); None switches them off."""
        self.key = None if draws is None else draws.integer("dropout masks", WORD)
        try:
            yield
        finally:
            self.key = None


class Dropout(nn.Module):
    """x [B, ...] with a fraction `rate` of its elements at 0 and the rest scaled up.

    The mask is the stream of this name: equal wherever the draws are. Without draws it is x.
    """

    def __init__(self, rate: float, stream: str, masks: Masks):
        super().__init__()
        self.rate, self.stream, self.masks = rate, stream, masks
        self.number = zlib.crc32(stream.encode()) % WORD

    def forward(self, x: Tensor) -> Tensor:
        if self.masks.key is None:
            return x
        sample = hashed(self.masks.key ^ self.number)
        place = hashed(torch.arange(x[0].numel(), device=x.device))
        word = hashed(sample[:, None] ^ place).reshape(x.shape)
        return x * (word >= round(self.rate * WORD)) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"{self.rate}, {self.stream}"


def hashed(word: Tensor) -> Tensor:
    """Integers 0 .. WORD - 1 that look random, one to one for those that come in; int64."""
    for multiplier in MULTIPLIERS:
        word = ((word ^ (word >> 15)) * multiplier) % WORD
    return word ^ (word >> 15)


def install(module: nn.Module, rate: float) -> Masks:
    """What the network's dropouts read: every `nn.Dropout` inside becomes a named one.

    Call the network inside `masks.handed(draws)`. With rate 0 there is no dropout left.
    """
    masks = Masks()
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.Dropout):
            parent, _, last = name.rpartition(".")
            named = Dropout(rate, f"dropout.{name}", masks) if rate else nn.Identity()
            setattr(module.get_submodule(parent), last, named)
    return masks
