"""The Frechet distance of arXiv:1706.08500, computed by torchmetrics from Inception's features.

Published values come from one network, which is not shipped: it is given as the TorchScript file
that several trainers use, `inception-2015-12-05.pt`, and resizes pictures itself.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from difftrain.models.errors import PartError
from difftrain.sampling.pictures import to_bytes

FILE = "its TorchScript file, such as `inception-2015-12-05.pt`"


def fid(made: Tensor, real: Tensor, weights: str | Path, batch: int = 64) -> float:
    """The distance of pictures [M, 3, H, W] from [N, 3, H, W], both in [-1, 1]; it falls as M
    grows, so values compare at one M. Raises PartError for a file that is not Inception's."""
    distance = metric(weights)
    for pictures, is_real in ((real, True), (made, False)):
        for some in to_bytes(pictures).permute(0, 3, 1, 2).split(batch):
            distance.update(some, real=is_real)
    return distance.compute().item()


def metric(weights: str | Path):
    """An empty metric of torchmetrics around the features of a file. Raises PartError."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    return FrechetInceptionDistance(feature=Inception(weights))


class Inception(nn.Module):
    """Features [N, D] of pictures, uint8 [N, 3, H, W], by a TorchScript file."""

    def __init__(self, weights: str | Path):
        super().__init__()
        self.weights = weights
        if not Path(weights).is_file():
            raise PartError(f"there is no file `{weights}`: give Inception by {FILE}")
        try:
            self.network = torch.jit.load(str(weights), map_location="cpu").eval()
        except (RuntimeError, ValueError) as cause:
            raise PartError(_wrong(weights)) from cause

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        try:
            return self.network(pictures, return_features=True)
        except RuntimeError as cause:  # whatever else the file holds
            raise PartError(_wrong(self.weights)) from cause


def _wrong(weights: str | Path) -> str:
    return f"`{weights}` is not Inception: give {FILE}, which takes pictures and `return_features`"
