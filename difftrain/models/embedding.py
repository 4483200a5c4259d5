"""What a transformer is told about a sample: patches, positions, times, labels and text."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difftrain.models.errors import PartError
from difftrain.models.still import moved

FREQUENCIES, PERIOD = 256, 10_000  # arXiv:2212.09748, as its code has them


# ---- patches


class Patches(nn.Module):
    """Pictures [B, C, h * p, w * p] as tokens [B, h * w, width], a patch of p x p each.

    The weight is that of a convolution [width, C, p, p], the arithmetic one matrix product: it is
    faster, and has a tangent under every compiler.
    """

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)
        self.patch = patch

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """How many patches a picture has, down and across."""
        if height % self.patch or width % self.patch:
            raise PartError(
                f"latents of {width} x {height} cannot be cut into patches of {self.patch}: "
                "choose another `size` or another `patch`"
            )
        return height // self.patch, width // self.patch

    def forward(self, x: Tensor) -> Tensor:
        p, (h, w) = self.patch, self.grid(*x.shape[2:])
        cut = x.unflatten(3, (w, p)).unflatten(2, (h, p)).permute(0, 2, 4, 1, 3, 5)
        flat, weight = cut.flatten(3).flatten(1, 2), self.proj.weight.flatten(1)
        return moved(F.linear, flat, weight, self.proj.bias)


def picture(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """[B, C, h * p, w * p] of tokens [B, h * w, p * p * C], in which the channel runs fastest."""
    cut = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, grid)
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


# ---- positions


def positions(grid: tuple[int, int], width: int, device, dtype: torch.dtype) -> Tensor:
    """Fixed embeddings [h * w, width] of the places in a grid: sines and cosines of the column in
    the first half, of the row in the second."""
    exact = torch.promote_types(dtype, torch.float32)
    rows, columns = (torch.arange(n, device=device, dtype=exact) for n in grid)
    omega = _falling(width // 4, device, exact)
    across, down = (_waves(at[:, None] * omega) for at in (columns, rows))
    h, w = grid
    both = (across.expand(h, w, -1), down[:, None].expand(h, w, -1))
    return torch.cat(both, dim=-1).flatten(0, 1).to(dtype)


def _waves(angle: Tensor) -> Tensor:
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


def _falling(count: int, device, dtype: torch.dtype) -> Tensor:
    """Frequencies [count], from 1 down towards 1 / PERIOD."""
    return PERIOD ** -(torch.arange(count, device=device, dtype=dtype) / count)


def rotations(grid: tuple[int, int], width: int, device, dtype: torch.dtype) -> Tensor:
    """Cosines and sines [2, h * w, width] of the angles by which the pairs of a head are turned:
    half of the pairs by the row, half by the column (arXiv:2104.09864, arXiv:2303.11331). They
    are float32 at least."""
    exact = torch.promote_types(dtype, torch.float32)
    rows, columns = (torch.arange(n, device=device, dtype=exact) for n in grid)
    omega = _falling(width // 4, device, exact).repeat_interleave(2)
    h, w = grid
    down = (rows[:, None] * omega)[:, None].expand(h, w, -1)
    across = (columns[:, None] * omega).expand(h, w, -1)
    angle = torch.cat((down, across), dim=-1).flatten(0, 1)
    return torch.stack((angle.cos(), angle.sin()))


# ---- numbers, labels, text


class Scalar(nn.Module):
    """Embeddings [B, width] of numbers [B], by their sines and cosines at FREQUENCIES / 2 rates.

    The angles keep the precision of the number, and are never less exact than float32.
    """

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, value: Tensor) -> Tensor:
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        half = FREQUENCIES // 2
        rates = torch.arange(half, device=value.device, dtype=value.dtype) / half
        angle = value[:, None] * torch.exp(-math.log(PERIOD) * rates)
        waves = torch.cat((angle.cos(), angle.sin()), dim=-1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class Label(nn.Module):
    """Embeddings [B, width] of classes [B, 1]; the row past the last class is the null one."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        # its own first draw, where tensors are shapes, would load all of torch's compiler
        rows = torch.empty(classes + 1, width)
        self.embedding_table = nn.Embedding.from_pretrained(rows, freeze=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding_table(ids[:, 0])


class TextStates(nn.Module):
    """Text states [B, T, states] in the width of the network: [B, T, width]."""

    def __init__(self, states: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(states, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )

    def forward(self, states: Tensor) -> Tensor:
        return self.mlp(states)
