"""Training on data as they are: the codec of whatever has no other."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import torch
from torch import Tensor, nn

from difftrain.models.errors import PartError


class Raw(nn.Module):
    """A codec whose latents [B, C, ...] are the data, or (data - mean) / std with one number each
    for every channel.

    `of` is the shape of a sample; without it samples are pictures in [-1, 1].
    """

    def __init__(self, of: Sequence[int], mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.of = tuple(of)
        spread = (-1, *(1,) * (len(self.of) - 1))
        self.register_buffer("mean", torch.tensor(mean or [0.0]).reshape(spread))
        self.register_buffer("std", torch.tensor(std or [1.0]).reshape(spread))

    @property
    def channels(self) -> int:
        return self.shape(1)[0]

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, C, ...] of data of the same shape; there is nothing to sample."""
        return (x - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        """The data [B, C, ...] of latents."""
        return latents * self.std + self.mean

    def shape(self, size: int) -> tuple[int, ...]:
        """The shape of a sample; that of a picture of `size` pixels a side, where it is one."""
        return self.of or (3, size, size)

    def fingerprint(self) -> str:
        """Equal for codecs that give equal latents."""
        numbers = (self.of, self.mean.flatten().tolist(), self.std.flatten().tolist())
        return sha256(repr(numbers).encode()).hexdigest()


def raw(
    *,
    standardise: bool = False,
    shape: Sequence[int] = (),
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Raw:
    """The codec that leaves data alone; with `standardise`, but for their mean and standard
    deviation in every channel, which the run finds in its training data."""
    if standardise and not shape:
        raise PartError(
            "`standardise` is for arrays, and pictures are in [-1, 1] already: leave it out"
        )
    return Raw(shape, mean, std) if standardise else Raw(shape, (), ())
