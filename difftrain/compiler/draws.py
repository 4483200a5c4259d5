"""The draws of one step, by stream name, as the interpreter and the emitted step ask for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from difftrain.compiler import random


@dataclass(frozen=True)
class Draws:
    """Streams keyed by (seed, step, global sample index [B]); `dtype` is that of real draws."""

    seed: int | Tensor
    step: int | Tensor
    index: Tensor
    dtype: torch.dtype = torch.float32
    dropout: bool = True  # whether networks drop anything
    never: tuple[str, ...] = ()  # streams of chances that never come true

    @property
    def masks(self) -> Draws | None:
        """What networks draw their dropout masks from: the same in every forward of a step."""
        return self if self.dropout else None

    @property
    def key(self):
        return self.seed, self.step, self.index

    def uniform(self, stream: str, low, high) -> Tensor:
        """[B] between low and high."""
        return low + (high - low) * random.uniform(stream, *self.key, dtype=self.dtype)

    def normal(self, stream: str, mean, std) -> Tensor:
        """[B] with this mean and standard deviation."""
        return mean + std * random.normal(stream, *self.key, dtype=self.dtype)

    def integer(self, stream: str, n) -> Tensor:
        """[B] of 0 .. n - 1; n is a number or a tensor []."""
        n = n.long() if isinstance(n, Tensor) else int(n)
        return random.integer(stream, *self.key, n)

    def bernoulli(self, stream: str, p) -> Tensor:
        """[B], true with probability p."""
        if stream in self.never:
            return torch.zeros_like(self.index, dtype=torch.bool)
        return random.bernoulli(stream, *self.key, p)

    def choice(self, stream: str, weights) -> Tensor:
        """[B], an index as often as its weight says."""
        return random.choice(stream, *self.key, weights)

    def noise(self, stream: str, like: Tensor) -> Tensor:
        """Standard normal of the shape and type of `like` [B, ...]."""
        drawn = random.normal(
            stream, *self.key, like.shape[1:], torch.promote_types(like.dtype, torch.float32)
        )
        return drawn.to(like.dtype)
