"""Batches: what a training step takes in, and the order in which a data set's samples come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from itertools import count, tee
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from difftrain.training.latents import Prepared, Say, encode, images, signed, warn
from difftrain.training.sources import DataError, picture

# field: what it must be, fewest and most axes, whole numbers (None: either)
TENSORS = {
    "image": ("floats [B, 3, H, W] in [-1, 1], uint8, or paths", 4, 4, None),
    "latents": ("floats [B, C, ...]", 3, 8, False),
    "input_ids": ("whole numbers [B, T]", 2, 2, True),
    "timesteps": ("numbers [B]", 1, 1, None),
    "index": ("whole numbers [B]", 1, 1, True),
}
FIELDS = (*TENSORS, "metadata")


def once(say: Say) -> Say:
    """`say`, but every sentence only the first time."""
    said = set()

    def first(message: str) -> None:
        if message not in said:
            said.add(message)
            say(message)

    return first


warn_once = once(warn)


def read(
    batch: object,
    *,
    needs: Iterable[str] = ("input_ids",),
    codec=None,
    size: int | None = None,
    device: torch.device | str | None = None,
    say: Say = warn_once,
) -> dict[str, object]:
    """A checked batch as a dict without absent fields, with `latents` wherever a codec is given.

    `batch` is a mapping, or an object with these attributes; every field has one row per sample:

    - `image`: floats [B, 3, H, W] in [-1, 1], uint8 [B, 3, H, W], or a path or list of B paths that
      are read at `size`; comes back as floats in [-1, 1]
    - `latents` [B, C, ...], optional: given ones win, `codec.encode(image)` is not called, and
      `image` is left out unless `needs` names it
    - `input_ids`: whole numbers [B, T]
    - `timesteps` [B], optional: given ones win over drawn ones
    - `metadata`: anything
    - `index` [B], optional: the global sample index that keys the draws

    A mapping's further fields pass unchanged. `needs` names what the objective reads. What wins is
    said, and by default said once.
    """
    given = _given(batch, tuple(needs))
    if "latents" in given and "image" in given and "image" not in needs:
        say("the batch has `latents`: they win over `image`, and the codec is not called")
        del given["image"]
    if "timesteps" in given:
        say("the batch has `timesteps`: they win, and none are drawn")
    found = {name: _checked(name, value, size) for name, value in given.items()}
    _one_row_each(found)
    if device is not None:
        found = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in found.items()}
    if codec is not None and "latents" not in found:
        found["latents"] = encode(codec, found["image"])
    return found


def _given(batch: object, needs: tuple[str, ...]) -> dict[str, object]:
    """The fields that a batch holds: all of `needs`, and something to train on."""
    if isinstance(batch, Mapping):
        fields = batch
    else:
        fields = {name: getattr(batch, name, None) for name in (*FIELDS, *needs)}
        # a named tuple has a method called `index`
        fields = {name: value for name, value in fields.items() if not callable(value)}
    given = {name: value for name, value in fields.items() if value is not None}
    has = ", ".join(f"`{name}`" for name in given) or "no field at all"
    if "latents" not in given and "image" not in given:
        raise DataError(f"the batch has {has}, neither `latents` nor `image`: add one of them")
    for name in needs:
        if name not in given and name != "latents":
            raise DataError(f"the batch has {has}, but the objective reads `{name}`: add it")
    return given


def _checked(name: str, value: object, size: int | None) -> object:
    if name == "image":
        return _image(value, size)
    return _tensor(name, value) if name in TENSORS else value


def _tensor(name: str, value: object) -> Tensor:
    """The value, if it is a tensor with the axes and numbers that its field asks for."""
    wanted, fewest, most, whole = TENSORS[name]
    if not isinstance(value, Tensor):
        raise DataError(f"`{name}` is a {type(value).__name__}: give {wanted}")
    real = value.is_floating_point()
    number = not value.is_complex() and value.dtype != torch.bool
    if not (number and value.numel() and fewest <= value.dim() <= most and whole is not real):
        found = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        raise DataError(f"`{name}` is {found}: give {wanted}")
    return value


def _image(value: object, size: int | None) -> Tensor:
    """Floats [B, 3, H, W] in [-1, 1] from a tensor or from paths."""
    paths = [value] if isinstance(value, str | Path) else value
    if isinstance(paths, list | tuple) and paths and all(isinstance(p, str | Path) for p in paths):
        return signed(_opened(paths, size))
    image = _tensor("image", value)
    if image.shape[1] != 3:
        last = image.shape[-1] == 3
        hint = "put them first, `image.permute(0, 3, 1, 2)`" if last else "convert it to RGB"
        raise DataError(
            f"`image` {list(image.shape)} needs 3 channels, not {image.shape[1]}: {hint}"
        )
    if image.dtype == torch.uint8:
        return signed(image)
    low, high = image.aminmax()
    # resizing may overshoot a little; NaN fails both comparisons
    if not (image.is_floating_point() and low >= -1.1 and high <= 1.1):
        span = f"{low.item():.4g} to {high.item():.4g}"
        raise DataError(f"`image` runs from {span}: scale it to floats in [-1, 1], or give uint8")
    return image


def _opened(paths: Iterable[str | Path], size: int | None) -> Tensor:
    if size is None:
        raise DataError("`image` is a path and no size is set: say `size = 64px`, or give tensors")
    return torch.stack([picture(_bytes(path), size, str(path)) for path in paths])


def _bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as cause:
        why = (cause.strerror or str(cause)).lower()
        raise DataError(f"`{path}` cannot be opened ({why}): check the path") from cause


def _one_row_each(found: Mapping[str, object]) -> None:
    rows = {k: len(found[k]) for k in FIELDS if isinstance(found.get(k), Tensor | list | tuple)}
    if len(set(rows.values())) > 1:
        each = ", ".join(f"`{name}` {count}" for name, count in rows.items())
        raise DataError(f"the numbers of rows differ ({each}): give one row per sample")


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, n: int) -> np.ndarray:
    """A permutation of 0 ... n-1, int64 [n], that depends on nothing but the arguments."""
    # raw Philox words stay the same in every numpy version; Generator.permutation need not
    bits = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64))
    rows = np.argsort(bits.random_raw(n), kind="stable")
    rows.flags.writeable = False  # shared by all callers
    return rows


def indices(seed: int, first_sample: int, count: int, n: int) -> np.ndarray:
    """The rows, int64 [count], of the global samples first_sample, first_sample + 1, ...

    Sample s is row `order(seed, s // n, n)[s % n]`: one epoch follows the other without a gap,
    whatever the batch size and the number of processes.
    """
    epochs, places = np.divmod(np.arange(first_sample, first_sample + count), n)
    rows = np.empty(count, np.int64)
    for epoch in np.unique(epochs):
        rows[epochs == epoch] = order(seed, int(epoch), n)[places[epochs == epoch]]
    return rows


def phrasing(seed: int, sample: int, choices: int) -> int:
    """Which of its picture's captions a global sample gets: uniform, and fixed for ever."""
    word = blake2b(f"caption {seed} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(word, "big") * choices >> 64


@dataclass(frozen=True)
class Batches:
    """An endless iterator over steps from `start_step` on, one dict in the batch contract a step.

    `batch_size` counts the samples of all processes; process `rank` of `world` gets its equal part.
    Step k holds the global samples from k * batch_size on, so one integer resumes a run. A dict has
    `index` int64 [B]; `latents` [B, C, ...]; `image` uint8 [B, 3, size, size] where pictures are
    kept or streamed; `input_ids` [B, T] where there is a tokenizer, or `cond` [B, T, width] where
    text was encoded ahead; `metadata`, B dicts.
    """

    data: Prepared
    seed: int
    batch_size: int
    start_step: int = 0
    rank: int = 0
    world: int = 1
    notes: bool = True  # whether batches have `metadata`
    device: torch.device | str = "cpu"  # where what is encoded is kept, and batches are made

    def __post_init__(self):
        if self.batch_size % self.world:
            raise DataError(
                f"a batch of {self.batch_size} does not divide among {self.world} processes: "
                f"use a multiple of {self.world}"
            )

    def __iter__(self) -> Iterator[dict[str, object]]:
        steps = count(self.start_step)
        return map(self.at, steps) if self._encoded else self._streamed(steps)

    def at(self, step: int) -> dict[str, object]:
        """The batch of any step."""
        if self._encoded:
            rows = self._chosen(step)
            return self._batch(step, {k: v[rows] for k, v in self._held.items()})
        return next(self._streamed([step]))

    @cached_property
    def _held(self) -> dict[str, Tensor]:
        """What is encoded, where batches are made: taking rows there costs no copy between."""
        held = {"latents": self.data.latents, "image": self.data.images}
        return {k: v.to(self.device) for k, v in held.items() if v is not None}

    def _chosen(self, step: int) -> Tensor:
        return torch.from_numpy(self._rows(step)).to(self.device)

    @property
    def _encoded(self) -> bool:
        return self.data.latents is not None

    def _streamed(self, steps: Iterable[int]) -> Iterator[dict[str, object]]:
        """The batches of some steps, the pictures of the next ones being read meanwhile."""
        ours, theirs = tee(steps)
        read_ahead = images(self.data.pictures, map(self._rows, theirs), self.data.size)
        for step, image in zip(ours, read_ahead, strict=True):
            yield self._batch(step, {"image": image})

    def _samples(self, step: int) -> tuple[int, int]:
        """The first global sample of this process in a step, and how many it has."""
        part = self.batch_size // self.world
        return step * self.batch_size + self.rank * part, part

    def _rows(self, step: int) -> np.ndarray:
        return indices(self.seed, *self._samples(step), len(self.data.pictures))

    def _batch(self, step: int, pixels: dict[str, Tensor]) -> dict[str, object]:
        first, size = self._samples(step)
        samples, rows = range(first, first + size), self._rows(step)
        index = torch.arange(first, first + size, device=self.device)
        batch = {"index": index, **pixels}
        if self._one_caption is not None and not self.notes:
            return batch | self._text(self._one_caption[self._chosen(step)])
        records = [self.data.pictures.records[row] for row in rows]
        texts = [
            record.captions[phrasing(self.seed, sample, len(record.captions))]
            for sample, record in zip(samples, records, strict=True)
        ]
        if self.data.tokens:
            batch |= self._text(self._words(texts))
        if self.notes:
            batch["metadata"] = [
                {**record.fields, "file": record.file, "caption": text}
                for record, text in zip(records, texts, strict=True)
            ]
        return batch

    def _words(self, texts: list[str]) -> Tensor:
        """The ids [B, T] of texts, or their rows [B] among the states."""
        states = self.data.states
        return self.data.tokens(texts) if states is None else states.rows(texts)

    def _text(self, words: Tensor) -> dict[str, Tensor]:
        """What a step reads of these words."""
        if self._states is None:
            return {"input_ids": words}
        return {"cond": self._states[words.to(self.device)]}

    @cached_property
    def _states(self) -> Tensor | None:
        states = self.data.states
        return None if states is None else states.table.to(self.device)

    @cached_property
    def _one_caption(self) -> Tensor | None:
        """The words of every row [N, ...], where each picture has one caption."""
        records = self.data.pictures.records
        if self.data.tokens is None or any(len(r.captions) != 1 for r in records):
            return None
        return self._words([r.captions[0] for r in records]).to(self.device)
