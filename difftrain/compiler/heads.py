"""Modules that an objective trains beside its network, where none are supplied."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

FREQUENCIES = 128


class LogVariance(nn.Module):
    """The learned log-variance of the error at c_noise [B]: [B], 0 at first.

    Fixed random Fourier features and one linear map (arXiv:2312.02696 eq. 21 and appendix B.2).
    """

    def __init__(self, frequencies: int = FREQUENCIES):
        super().__init__()
        made = torch.Generator().manual_seed(0)  # fixed: the same in every run
        turns = 2 * math.pi
        self.register_buffer("frequency", turns * torch.randn(frequencies, generator=made))
        self.register_buffer("phase", turns * torch.rand(frequencies, generator=made))
        self.linear = nn.Linear(frequencies, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, c_noise: Tensor) -> Tensor:
        angle = c_noise.to(self.frequency.dtype)[:, None] * self.frequency + self.phase
        features = math.sqrt(2) * angle.cos()
        wide = torch.promote_types(c_noise.dtype, self.linear.weight.dtype)  # of an index as well
        return self.linear(features.to(self.linear.weight.dtype))[:, 0].to(wide)


class Projection(nn.Module):
    """Tokens [B, T, width] as tokens [B, T, out]: three linear maps with SiLU between
    (arXiv:2410.06940 appendix; 2,048 hidden units in its code)."""

    def __init__(self, width: int, out: int, hidden: int = 2048):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, out),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(tokens)
