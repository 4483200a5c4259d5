"""Files of samples, written as they are drawn: only a batch is held, and what a grid shows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from difftrain.sampling.pictures import sheet_png, whole, write_pngs
from difftrain.training.outputs import ARRAYS

COLUMNS = 8  # at most
SHOWN = 64  # of the pictures that are all saved


def write(
    made: Iterable[Tensor],
    settings: Mapping,
    texts: Sequence[str],
    path: Path,
    place: Path | None = None,
) -> Path:
    """Writes batches of samples, one a text, into a file that carries their settings: a PNG of
    pictures, uint8 [B, H, W, 3], or an `.npz` of what are none. `place` is for all pictures: a file
    ending in `.npz` too (uint8), or a folder of PNGs; the PNG then shows the first."""
    if path.suffix == ARRAYS:
        write_arrays(path, texts, settings, "x", (batch.numpy() for batch in made))
        return path
    shown = [*made] if place is None else _write_all(place, made, texts, settings)
    texts = texts[: sum(map(len, shown))]
    columns = min(COLUMNS, max(1, round(len(texts) ** 0.5)))
    sheet_png(path, torch.cat(shown), columns, texts, {**settings, "prompts": list(texts)})
    return path


def _write_all(
    place: Path, pixels: Iterable[Tensor], texts: Sequence[str], settings: Mapping
) -> list[Tensor]:
    """Writes all pictures, batches of uint8 [B, H, W, 3], into one file, or each into one of its
    own. The first SHOWN."""
    first: list[Tensor] = []
    pixels = keeping(pixels, first, SHOWN)
    if place.suffix == ARRAYS:
        write_arrays(place, texts, settings, "pictures", (_planes(batch) for batch in pixels))
    else:
        each = ({**settings, "prompt": text, "index": i} for i, text in enumerate(texts))
        write_pngs(place, pixels, each)
    return first


def keeping(
    made: Iterable[Tensor], kept: list[Tensor], most: int | None = None
) -> Iterator[Tensor]:
    """The batches, of which the first `most` rows are also put into a list."""
    for batch in made:
        room = len(batch) if most is None else most - sum(map(len, kept))
        if room > 0:  # an empty piece of a batch would hold all of it
            kept.append(batch[:room])
        yield batch


def _planes(pixels: Tensor) -> np.ndarray:
    """uint8 [B, H, W, 3] as [B, 3, H, W]."""
    return pixels.permute(0, 3, 1, 2).numpy()


def write_arrays(
    path: Path,
    texts: Sequence[str],
    settings: Mapping[str, object],
    name: str,
    batches: Iterable[np.ndarray],
) -> None:
    """Writes batches [B, ...], one row a text, as one array of an `.npz`, with the captions and the
    settings; whole or not at all."""
    with whole(path) as beside, ZipFile(beside, "w") as file:
        with file.open(f"{name}.npy", "w", force_zip64=True) as out:
            for number, batch in enumerate(batches):
                if number == 0:
                    _begin(out, batch.dtype, (len(texts), *batch.shape[1:]))
                out.write(batch.tobytes())
        for word, value in (("captions", list(texts)), ("settings", json.dumps(settings))):
            with file.open(f"{word}.npy", "w") as out:
                npy.write_array(out, np.array(value))


def _begin(out, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Writes what stands before the numbers of an array."""
    head = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_2_0(out, head)
