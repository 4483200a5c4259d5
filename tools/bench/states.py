"""Text as training reads it once it was encoded ahead: states that are looked up, not computed."""

import torch
from torch import Tensor, nn

WORDS = 256


class States(nn.Module):
    """Ids [B, length] to states [B, length, width], of which there is one for each id."""

    vocabulary: list[int] = []

    def __init__(self, length: int, width: int):
        super().__init__()
        self.length, self.width = length, width
        self.register_buffer("table", torch.randn(WORDS, width))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]

    def ids(self, texts: list[str]) -> Tensor:
        """Ids [B, length] of texts: their bytes, and 0 behind them."""
        rows = [list(text.encode()[: self.length]) for text in texts]
        return torch.tensor([row + [0] * (self.length - len(row)) for row in rows])

    def check(self, ids: Tensor) -> None:
        """Every id has a state."""


def held(length: int = 77, width: int = 768) -> States:
    """What `module = "states:held"` names."""
    return States(length, width)
