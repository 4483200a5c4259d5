"""A data set ready to train on: samples as latents, encoded once and kept, or read as needed."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from difftrain.training.arrays import Arrays
from difftrain.training.cache import Say, remembered, warn
from difftrain.training.captions import States
from difftrain.training.sources import TRANSFORM, DataError, Pictures

THREADS = 8  # decoders release the interpreter's lock
AHEAD = 2  # chunks being read while one is used


@dataclass(frozen=True)
class Prepared:
    """A data set at one size: latents [N, C, ...], or None where pictures are read batch by batch.

    `tokens` turns a list of captions into ids [B, T]; without it batches have no `input_ids`.
    `images` uint8 [N, 3, size, size] are the pictures themselves, where a step reads them too.
    With `states` batches have `cond` instead of `input_ids`: text that was encoded ahead.
    """

    pictures: Pictures | Arrays
    size: int
    tokens: Callable[[list[str]], Tensor] | None
    latents: Tensor | None
    images: Tensor | None = None
    states: States | None = None


def stream(pictures: Pictures, tokenizer, size: int, *, length: int = 77) -> Prepared:
    """The data set with pictures read and captions tokenised when needed: for large sets."""
    return Prepared(pictures, size, tokenizer and (lambda texts: tokenizer(texts, length)), None)


def prepare(
    pictures: Pictures | Arrays,
    codec,
    tokenizer,
    size: int,
    *,
    length: int = 77,
    cache: str | Path | None = None,
    device: torch.device | str = "cpu",
    batch: int = 64,
    images: bool = False,
    say: Say = warn,
) -> Prepared:
    """The data set with captions tokenised and samples encoded once: latents float32 on the CPU.

    `tokenizer(texts, length)` gives ids [B, length]; None leaves them out. `codec.encode` takes
    floats [B, 3, size, size] in [-1, 1]; `batch` pictures go to `device` at a time. The latents are
    kept in the folder `cache` under a key of the pictures' bytes, the size, how pictures are fitted
    and `codec.fingerprint()`. Every start reads those bytes again, so a change is never missed; a
    kept file that is not exactly what was written is said and made again. Arrays go through the
    codec as they are, each time. `images` keeps the pictures as well.
    """
    tokens = tokenizer and _table(list(dict.fromkeys(pictures.texts)), tokenizer, length)
    if isinstance(pictures, Arrays):
        chunks = pictures.values.split(batch)
        latents = torch.cat([encode(codec, x.to(device)).float().cpu() for x in chunks])
        return Prepared(pictures, size, tokens, _finite(latents, pictures))
    if cache is not None and not hasattr(codec, "fingerprint"):
        say("the latents are not kept: the codec has no `fingerprint()` to know them by")
        cache = None
    seen = _pixels(pictures, size, batch) if images else None
    latents = _latents(pictures, codec, size, cache, device, batch, say)
    return Prepared(pictures, size, tokens, latents, seen)


def _latents(
    pictures: Pictures, codec, size: int, cache: str | Path | None, device, batch: int, say: Say
) -> Tensor:
    """Latents [N, C, h, w], out of the cache or encoded and put there."""
    if cache is None:
        return _encoded(pictures, codec, size, device, batch)
    key = _key(pictures, codec.fingerprint(), size)
    make = partial(_encoded, pictures, codec, size, device, batch)
    return remembered("latents", key, cache, make, say)


def _table(texts: list[str], tokenizer, length: int) -> Callable[[list[str]], Tensor]:
    ids = tokenizer(texts, length)
    place = {text: row for row, text in enumerate(texts)}
    return lambda wanted: ids[[place[text] for text in wanted]]


def signed(image: Tensor) -> Tensor:
    """uint8 pictures as floats in [-1, 1]: 0 is -1 and 255 is 1."""
    return image.float() / 127.5 - 1


def encode(codec, image: Tensor) -> Tensor:
    """Latents [B, C, h, w] of pictures [B, 3, H, W], floats in [-1, 1]; no gradient."""
    with torch.no_grad():
        return codec.encode(image)


def images(pictures: Pictures, chunks: Iterable[Iterable[int]], size: int) -> Iterator[Tensor]:
    """uint8 [B, 3, size, size] for every chunk of rows, while the next chunks are being read."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting = deque()
        for rows in chunks:
            waiting.append([pool.submit(pictures.image, int(row), size) for row in rows])
            if len(waiting) > AHEAD:
                yield torch.stack([one.result() for one in waiting.popleft()])
        while waiting:
            yield torch.stack([one.result() for one in waiting.popleft()])


def _chunks(count: int, batch: int) -> list[range]:
    return [range(start, min(start + batch, count)) for start in range(0, count, batch)]


def _pixels(pictures: Pictures, size: int, batch: int) -> Tensor:
    """Every picture, uint8 [N, 3, size, size]."""
    return torch.cat(list(images(pictures, _chunks(len(pictures), batch), size)))


def _encoded(pictures: Pictures, codec, size: int, device, batch: int) -> Tensor:
    parts = []
    with tqdm(total=len(pictures), desc="encoding pictures", unit="", disable=None) as bar:
        for image in images(pictures, _chunks(len(pictures), batch), size):
            parts.append(encode(codec, signed(image.to(device))).float().cpu())
            bar.update(len(image))
    return _finite(torch.cat(parts).contiguous(), pictures)


def _finite(latents: Tensor, pictures: Pictures | Arrays) -> Tensor:
    """The latents, if they are all finite."""
    lost = (~latents.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
    if lost:
        raise DataError(
            f"the codec's latents of `{pictures.records[lost[0]].file}` are not finite "
            f"({len(lost)} of {len(pictures)} samples): run the codec in fp32"
        )
    return latents


def _key(pictures: Pictures, fingerprint: str, size: int) -> str:
    contents = [sha256(pictures.data(row)).hexdigest() for row in range(len(pictures))]
    return sha256(json.dumps([TRANSFORM, size, fingerprint, contents]).encode()).hexdigest()
