"""Class labels: the condition of networks that embed a class themselves (arXiv:2212.09748)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from difftrain.language.nearest import nearest
from difftrain.models.errors import PartError


class Labels(nn.Module):
    """A function of ids [B, 1] that gives them as they are: 0 .. classes - 1, and `classes`, the
    null class, which the empty text stands for."""

    width, length = 0, 1

    def __init__(self, classes: int, names: Sequence[str], field: str):
        super().__init__()
        self.classes, self.field = classes, field
        self.vocabulary = list(names)
        # names that are all numbers stand for themselves
        named = not all(name.isdecimal() for name in self.vocabulary)
        self.place = {name: i for i, name in enumerate(self.vocabulary)} if named else {}

    def forward(self, ids: Tensor) -> Tensor:
        return ids

    def ids(self, texts: Iterable[str]) -> Tensor:
        """Ids, int64 [B, 1], of names, or of numbers written out."""
        rows = [[self._id(str(text).strip())] for text in texts]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), 1)

    def check(self, ids: Tensor) -> None:
        """Refuse ids that are no class."""
        for id_ in ids.flatten().tolist():
            if id_ not in range(self.classes + 1):
                raise PartError(self._unknown(str(id_)))

    def _id(self, text: str) -> int:
        if not text:
            return self.classes
        if text in self.place:
            return self.place[text]
        if text.isdecimal() and int(text) < self.classes:
            return int(text)
        raise PartError(self._unknown(text))

    def _unknown(self, text: str) -> str:
        shown = ", ".join(f"`{name}`" for name in list(self.place)[:8])
        hint = f"use {shown}" if shown else f"use 0 to {self.classes - 1}, or raise `count`"
        hint = f"use one of {shown}, ..." if len(self.place) > 8 else hint
        if near := nearest(text, self.place):
            hint = f"did you mean `{near}`?"
        return f"`{text}` is no class of `{self.field}`: {hint}"


def label(*, field: str = "label", count: int = 1000, vocabulary: Sequence[str] = ()) -> Labels:
    """The labels in a field of the data; `vocabulary` lists its values, the class of each being its
    place in the list."""
    names = [str(name) for name in vocabulary]
    made = Labels(count, names, field)
    if len(made.place) > count:
        raise PartError(
            f"`{field}` has {len(names)} values and `count` is {count}: set `count = {len(names)}`"
        )
    return made
