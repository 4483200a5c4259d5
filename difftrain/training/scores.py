"""Scores of samples, on request: how near they are to real pictures, whether they show what was
asked for, and whether they are copies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import chain

import torch
from torch import Tensor

from difftrain.language.options import Run
from difftrain.models.vision import PACKAGE
from difftrain.sampling import kid, quality
from difftrain.sampling.fid import fid, metric
from difftrain.sampling.quality import Reals
from difftrain.training.bundle import ARRAYS, SettingError
from difftrain.training.parts import held_out, opened
from difftrain.training.sources import Pictures

LEAST = 3  # pictures, for a distance with an error
CONCEPT, STYLE = "label", "style"  # fields of the data that say what a picture shows, and how
Row = tuple[str, str, str]  # a score, of the samples, of real pictures


@dataclass(frozen=True)
class Real:
    """Real pictures [N, 3, H, W] in [-1, 1], and their records."""

    found: Pictures
    pictures: Tensor

    def said(self, field: str) -> Iterator[tuple[str, str]]:
        """Each caption with what a field of its record says, where it says something."""
        for record in self.found.records:
            if field in record.fields:
                yield from ((text, str(record.fields[field])) for text in record.captions)


def possible(data: Run, count: int, inception: str = "") -> None:
    """Refuses what could not be scored once it is drawn. Raises SettingError, PartError, and
    ModuleNotFoundError where what pictures are seen with is not installed."""
    if data["source"].module == ARRAYS:
        raise SettingError("`--score` compares pictures, and this run makes arrays: leave it out")
    if count < LEAST:
        raise SettingError(f"`--score` takes {LEAST} pictures or more: say `-n`, a hundred or more")
    import_module(PACKAGE)
    if inception:
        metric(inception)


def table(made: Tensor, texts: Sequence[str], data: Run, read: str, inception: str = "") -> str:
    """The scores of samples [N, 3, H, W] in [-1, 1] of these prompts, as a table. `inception` is a
    file of weights for the Frechet distance."""
    train = decoded(opened(data, "train", read), data["size"])
    unseen = held_out(data, read)
    other = decoded(unseen, data["size"]) if unseen and len(unseen) >= LEAST else None
    rows = [*_distances(made, train, other), *_copies(made, train, other)]
    rows += _wishes(made, texts, train, other)
    if inception:
        value = fid(made, train.pictures, inception)
        rows.append((f"FID to {len(train.pictures)} training pictures", f"{value:.2f}", ""))
    head = f"| score | {len(made)} samples | real pictures |"
    return "\n".join([head, "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])


def decoded(found: Pictures, size: int) -> Real:
    """Every picture of a set."""
    images = [found.image(row, size) for row in range(len(found))]
    return Real(found, torch.stack(images).float() / 127.5 - 1)


def _distances(made: Tensor, train: Real, other: Real | None) -> Iterator[Row]:
    """KID to what training has not seen, or else to what it has."""
    if other is None:
        near = kid.kid(kid.features(made), kid.features(train.pictures))
        yield f"KID to {len(train.pictures)} training pictures", _estimate(near), ""
        return
    found = kid.score(made, other.pictures, train.pictures)
    title = f"KID to {len(other.pictures)} held-out pictures"
    yield title, _estimate(found["kid"]), _estimate(found["real"])
    yield "its position: 0 is real, 1 is noise", f"{found['position']:.2f}", "0"


def _estimate(found: kid.Estimate) -> str:
    return f"{found[0]:.4f} +- {found[1]:.4f}"


def _copies(made: Tensor, train: Real, other: Real | None) -> Iterator[Row]:
    """The distance to the nearest training picture, by the usual one between those."""
    none = torch.zeros(len(train.pictures), dtype=torch.int64)
    reals = Reals(train.pictures, none, none)
    groups = [made, other and other.pictures]
    ratios = [None if g is None else quality.memorisation(g, reals)[1] for g in groups]
    median, share = (
        ["" if r is None else shown(r) for r in ratios]
        for shown in (
            lambda r: f"{float(r.median()):.2f}",
            lambda r: f"{float((r < quality.COPY).float().mean()):.1%}",
        )
    )
    yield "distance to the nearest training picture, median", *median
    yield f"copies: nearer than {quality.COPY}", *share


def _wishes(made: Tensor, texts: Sequence[str], train: Real, other: Real | None) -> Iterator[Row]:
    """Whether the nearest real picture shows what was asked for, where the data tell what that is:
    for captions of theirs that always mean the same."""
    for field, accuracy in ((CONCEPT, quality.concept_accuracy), (STYLE, quality.style_accuracy)):
        meant: dict[str, set[str]] = {}
        for text, value in chain(train.said(field), other.said(field) if other else ()):
            meant.setdefault(text, set()).add(value)
        if not all(len(meant.get(text, ())) == 1 for text in texts) or not _told(train, field):
            continue
        shown = [str(record.fields[field]) for record in train.found.records]
        asked = [next(iter(meant[text])) for text in texts]
        names = sorted({*shown, *asked})
        labels, wanted = (torch.tensor([names.index(v) for v in vs]) for vs in (shown, asked))
        reals = Reals(train.pictures, labels, labels)
        title = f"`{field}` of the nearest training picture as asked for"
        chance = f"{quality.chance(wanted, labels):.1%} by chance"
        yield title, f"{accuracy(made, wanted, reals):.1%}", chance


def _told(real: Real, field: str) -> bool:
    return all(field in record.fields for record in real.found.records)
