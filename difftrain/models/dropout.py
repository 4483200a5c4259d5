"""Dropout whose masks are named random streams, so that two forwards can share them.

Consistency training compares a network with itself at two noise levels under one mask
(arXiv:2303.01469), and a mask that is a function of (seed, step, sample) survives a resumed run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import NormalDist

from torch import Tensor, nn


class Masks:
    """What the dropouts of one network read their masks from, for as long as a call lasts."""

    def __init__(self):
        self.draws = None

    @contextmanager
    def handed(self, draws) -> Iterator[None]:
        """Inside, dropouts draw from `draws` (a `Draws`); None switches them off."""
        self.draws = draws
        try:
            yield
        finally:
            self.draws = None


class Dropout(nn.Module):
    """x [B, ...] with a fraction `rate` of its elements at 0 and the rest scaled up.

    The mask is the stream of this name: equal wherever the draws are. Without draws it is x.
    """

    def __init__(self, rate: float, stream: str, masks: Masks):
        super().__init__()
        self.rate, self.stream, self.masks = rate, stream, masks
        self.below = NormalDist().inv_cdf(rate)

    def forward(self, x: Tensor) -> Tensor:
        if self.masks.draws is None:
            return x
        kept = self.masks.draws.noise(self.stream, x.detach().float()) > self.below
        return x * kept / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"{self.rate}, {self.stream}"


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
