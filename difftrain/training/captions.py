"""Captions that a frozen encoder reads once, before the run, instead of in every step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from difftrain.training.cache import Say, remembered, warn
from difftrain.training.sources import DataError

SHARE = 8  # of the memory of a machine, what is encoded may take
TOGETHER = 64  # texts that are encoded at a time
UNTOLD = 2**33  # bytes of memory, where the system does not say
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


@dataclass(frozen=True)
class States:
    """What an encoder gives for every distinct caption, `table` [N, T, width]; `places` are the
    captions' rows, of which the empty text has the first."""

    places: Mapping[str, int]
    table: Tensor

    @property
    def null(self) -> Tensor:
        """Those of the empty text, [1, T, width]."""
        return self.table[:1]

    def rows(self, texts: Iterable[str]) -> Tensor:
        """The rows, int64 [B], of texts."""
        return torch.tensor([self.places[text] for text in texts])


def frozen(text: nn.Module | None) -> bool:
    """Whether there is an encoder to run ahead: none of its weights is trained, and it has some."""
    weights = [] if text is None else list(text.parameters())
    return bool(weights) and not any(weight.requires_grad for weight in weights)


@torch.no_grad()
def states(
    text: nn.Module,
    captions: Iterable[str],
    kind: torch.dtype,
    *,
    cache: str | Path,
    device: torch.device | str = "cpu",
    say: Say = warn,
) -> States | None:
    """The states of captions and of the empty text, encoded in fp32 and held in `kind` on the CPU;
    None, which is said, where they would take too much of the memory.

    They are kept in the folder `cache` under a key of the token ids and `text.fingerprint()`.
    """
    texts = _distinct(captions)
    size = _bytes(text, len(texts), kind, device)
    held, much = f"the states of {len(texts):,} captions", f"{size / 2**20:,.1f} MiB"
    if size * SHARE > memory():
        say(
            f"text is encoded in every step: {held} would take {much}, more than an eighth of the"
            " memory"
        )
        return None
    ids = text.ids(texts)
    table = _table(text, texts, ids, kind, cache, device, say)
    say(f"text is encoded ahead: {held} take {much}")
    return States({one: row for row, one in enumerate(texts)}, table)


@torch.no_grad()
def null(
    text: nn.Module, captions: Iterable[str], kind: torch.dtype, device: torch.device | str
) -> Tensor | None:
    """The states [1, T, width] of the empty text in `kind`; None where `states` gives None."""
    fits = _bytes(text, len(_distinct(captions)), kind, device) * SHARE <= memory()
    return _empty(text, device).to(kind) if fits else None


def memory() -> int:
    """The bytes of memory that this machine has, or the container that it is."""
    if not hasattr(os, "sysconf"):
        return UNTOLD
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = LIMIT.read_text().strip() if LIMIT.is_file() else "max"
    return whole if limit == "max" else min(whole, int(limit))


def _distinct(captions: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(["", *captions]))


def _empty(text: nn.Module, device) -> Tensor:
    return text(text.ids([""]).to(device))


def _bytes(text: nn.Module, count: int, kind: torch.dtype, device) -> int:
    """What the states of so many texts take."""
    return count * _empty(text, device).numel() * kind.itemsize


def _table(
    text: nn.Module, texts: Sequence[str], ids: Tensor, kind: torch.dtype, cache, device, say: Say
) -> Tensor:
    """States [N, T, width] of ids [N, T], out of the cache or encoded and put there."""
    known = getattr(text, "fingerprint", lambda: None)()
    if known is None:
        say("the text is not kept: its encoder has no `fingerprint()` to know it by")
        return _encoded(text, texts, ids, kind, device)
    told = [known, str(kind), list(ids.shape), sha256(ids.numpy()).hexdigest()]
    key = sha256(json.dumps(told).encode()).hexdigest()
    return remembered("texts", key, cache, lambda: _encoded(text, texts, ids, kind, device), say)


def _encoded(
    text: nn.Module, texts: Sequence[str], ids: Tensor, kind: torch.dtype, device
) -> Tensor:
    """States [N, T, width] of ids [N, T], all of them finite."""
    table = torch.empty(len(ids), *_empty(text, device).shape[1:], dtype=kind)
    with tqdm(total=len(ids), desc="encoding captions", unit="", disable=None) as bar:
        for rows in torch.arange(len(ids)).split(TOGETHER):
            found = table[rows] = text(ids[rows].to(device)).to("cpu", kind)
            lost = (~found.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
            if lost:
                raise DataError(
                    f"the encoder's states of `{texts[rows[lost[0]]][:40]}` are not finite in"
                    f" {str(kind).removeprefix('torch.')}: train in bf16 or fp32"
                )
            bar.update(len(rows))
    return table
