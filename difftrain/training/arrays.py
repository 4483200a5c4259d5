"""Data of any shape: arrays out of an `.npz` file, with a text or a number for each row."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from difftrain.training.sources import DataError, Record, of_split, record

NUMBERS = "fiu"  # kinds of numpy types


@dataclass(frozen=True)
class Arrays:
    """One split of an `.npz`: its records in the order of the file, and `values` [N, C, ...]."""

    name: str
    records: tuple[Record, ...]
    values: Tensor

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"{len(self)} arrays {list(self.values.shape[1:])} of `{self.name}`"

    @property
    def texts(self) -> Iterator[str]:
        """Every phrasing of every record, in order."""
        return (text for record in self.records for text in record.captions)


def open_arrays(
    path: str | Path, key: str = "x", *, caption: str = "", split: str = "train"
) -> Arrays:
    """One split of the arrays `key` [N, C, ...] of an `.npz`; [N, L] becomes [N, 1, L].

    Every other array [N] of numbers or texts is a field: `caption` names the one that samples are
    conditioned on ("" for none), and `split` says which split a row belongs to.
    """
    name, found = str(path), _read(path)
    if key not in found:
        there = ", ".join(f"`{k}`" for k in found) or "nothing"
        first = next(iter(found), key)
        raise DataError(f'`{name}` has no `{key}`, only {there}: say which, as in x = "{first}"')
    values = _values(found.pop(key), key, name)
    fields = {k: v for k, v in found.items() if v.shape == (len(values),)}
    rows = [
        record(f"row {i}", {"row": i, **fields_of(fields, i)}, caption, f"row {i} of `{name}`")
        for i in range(len(values))
    ]
    chosen = of_split(rows, name, split)
    return Arrays(name, tuple(chosen), values[[r.fields["row"] for r in chosen]])


def fields_of(fields: Mapping[str, np.ndarray], row: int) -> dict[str, object]:
    """The fields of one row: texts and numbers."""
    return {name: values[row].item() for name, values in fields.items()}


def _read(path: str | Path) -> dict[str, np.ndarray]:
    """Every array of the file."""
    if not Path(path).is_file():
        raise DataError(f"there is no file `{path}`: check the path (seen from `{os.getcwd()}`)")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: _plain(file, name, path) for name in file.files}
    except (OSError, EOFError, zipfile.BadZipFile, ValueError, TypeError) as cause:
        raise DataError(
            f"`{path}` is no whole `.npz`: write it with `numpy.savez`, or copy it again"
        ) from cause


def _plain(file, name: str, path: str | Path) -> np.ndarray:
    try:
        return file[name]
    except ValueError as cause:  # what numpy could only read as a pickle
        raise DataError(
            f"`{name}` in `{path}` holds Python objects: save it as numbers, or as texts with"
            " `astype(str)`"
        ) from cause


def _values(array: np.ndarray, key: str, name: str) -> Tensor:
    """Floats [N, C, ...], all of them finite."""
    if array.dtype.kind not in NUMBERS or array.ndim < 2 or not array.size:
        found = f"{array.dtype} {list(array.shape)}"
        raise DataError(f"`{key}` in `{name}` is {found}: give numbers [N, C, ...] or [N, L]")
    values = torch.from_numpy(array.astype(np.float32))
    lost = (~values.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if lost:
        raise DataError(
            f"row {lost[0]} of `{key}` in `{name}` is not finite ({len(lost)} of {len(values)}"
            " rows): take these out"
        )
    return values[:, None] if values.dim() == 2 else values
