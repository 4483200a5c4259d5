"""Pieces traced: programs whose batch may vary."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.export import Dim, ExportedProgram

from difftrain.export.errors import ExportError
from difftrain.export.modules import Piece
from difftrain.export.running import BATCH
from difftrain.models.foreign import reason


def batches(name: str, batch: tuple[int, int]) -> tuple[int, int]:
    """From how many to how many samples a piece takes: of texts also the empty one, alone."""
    return (1, max(2, batch[1])) if name == "text" else batch


@torch.no_grad()
def traced(name: str, piece: Piece, batch: tuple[int, int]) -> ExportedProgram:
    """The program of a piece for batches from the one size to the other. Raises ExportError."""
    low, high = batch
    inputs = piece.example(max(2, low) if low < high else high)
    size = Dim(BATCH, min=low, max=high) if low < high else None
    axes = {n: {piece.batch[n]: size} if n in piece.batch else None for n in inputs}
    try:
        with quiet():
            return torch.export.export(
                piece.module, (), kwargs=inputs, dynamic_shapes=axes, strict=False
            )
    except Exception as cause:  # a network may do anything
        raise ExportError(
            f"`{name}` cannot be traced for batches of {low} to {high} ({reason(cause)}): ask for"
            " fewer at once, as in `batch = 1..4`, or export another network"
        ) from cause


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps what torch says of its own workings to itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
