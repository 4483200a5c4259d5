"""Several text encoders as one: their sequences stand one after the other (arXiv:2403.03206)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from difftrain.models.errors import PartError


class Joined(nn.Module):
    """A function of ids [B, T1 + T2 + ...] that gives [B, T1 + T2 + ..., width].

    Narrower states are filled up with zeros to the widest. The empty text is each encoder's own.
    """

    def __init__(self, encoders: Sequence[nn.Module]):
        super().__init__()
        _alike(encoders)
        self.encoders = nn.ModuleList(encoders)
        self.field = encoders[0].field
        self.lengths = [encoder.length for encoder in encoders]
        self.length = sum(self.lengths)
        self.width = max(encoder.width for encoder in encoders)

    def forward(self, ids: Tensor) -> Tensor:
        parts = zip(self.encoders, ids.split(self.lengths, dim=1), strict=True)
        states = [encoder(part) for encoder, part in parts]
        return torch.cat([pad(s, (0, self.width - s.shape[2])) for s in states], dim=1)

    def ids(self, texts: Iterable[str]) -> Tensor:
        """Checked ids [B, length] of texts."""
        texts = list(texts)
        return torch.cat([encoder.ids(texts) for encoder in self.encoders], dim=1)

    def check(self, ids: Tensor) -> None:
        """Refuse ids that an encoder does not hold."""
        for encoder, part in zip(self.encoders, ids.split(self.lengths, dim=1), strict=True):
            encoder.check(part)

    def fingerprint(self) -> str | None:
        """Equal for encoders that give equal states of equal ids; None where one has none."""
        asked = [getattr(encoder, "fingerprint", None) for encoder in self.encoders]
        return None if None in asked else " ".join(ask() for ask in asked)

    @property
    def vocabulary(self) -> list[int]:
        """The ids in the token tables that are cut, sorted."""
        return sorted({id_ for encoder in self.encoders for id_ in encoder.vocabulary})


def _alike(encoders: Sequence[nn.Module]) -> None:
    if any(encoder.width == 0 for encoder in encoders):
        raise PartError("class labels cannot be joined with other encoders: give them alone")
    fields = sorted({encoder.field for encoder in encoders})
    if len(fields) > 1:
        raise PartError(
            f"the encoders read `{fields[0]}` and `{fields[1]}`: join encoders of one field"
        )
