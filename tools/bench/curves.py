"""Losses of two runs step by step: their means over windows, how far these differ, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = ("#9ecae8", "#d9601a")  # the first lies broad under the other
SIZE, MARGIN = (960, 480), 60
POINTS = 100  # of a curve, each the mean of a window


@dataclass(frozen=True)
class Window:
    """Means of the losses of two runs over the steps `first` to `last`, and the standard error of
    such a mean: how far it is left to chance which pictures and noises these steps saw."""

    first: int
    last: int
    means: tuple[float, float]
    error: float

    @property
    def difference(self) -> float:
        return self.means[0] - self.means[1]


def windows(one: Sequence[float], other: Sequence[float], size: int) -> list[Window]:
    """All whole windows of `size` steps that both runs have."""
    count = min(len(one), len(other)) // size
    pairs = np.array([one[: count * size], other[: count * size]]).reshape(2, count, size)
    means, errors = pairs.mean(-1), standard_error(pairs).max(0)
    return [
        Window(n * size + 1, (n + 1) * size, (float(means[0, n]), float(means[1, n])), errors[n])
        for n in range(count)
    ]


def standard_error(losses: np.ndarray) -> np.ndarray:
    """The standard error of the mean [...] of losses [..., n], from neighbours, so that a curve
    that falls is not taken for one that scatters."""
    return np.sqrt(np.square(np.diff(losses)).mean(-1) / 2 / losses.shape[-1])


def drawn(curves: Mapping[str, Sequence[float]], path: Path) -> None:
    """Writes a PNG of two curves over their steps; each is the mean of a hundredth of the run."""
    steps = max(map(len, curves.values()))
    size = max(1, steps // POINTS)
    means = {n: np.array(c[: len(c) // size * size]).reshape(-1, size) for n, c in curves.items()}
    means = {name: rows.mean(-1) for name, rows in means.items() if len(rows)}
    low, high = (f([f(m) for m in means.values()]) for f in (min, max))
    picture = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(picture)
    across, down = SIZE[0] - 2 * MARGIN, SIZE[1] - 2 * MARGIN
    pen.rectangle([MARGIN, MARGIN, SIZE[0] - MARGIN, SIZE[1] - MARGIN], outline="#888888")
    for value, y in ((high, MARGIN), (low, SIZE[1] - MARGIN)):
        pen.text((8, y - 6), f"{value:.4f}", "black")
    pen.text((MARGIN, SIZE[1] - MARGIN + 8), "1", "black")
    pen.text((SIZE[0] - MARGIN - 30, SIZE[1] - MARGIN + 8), f"{steps} steps", "black")
    for number, (name, mean) in enumerate(means.items()):
        x = MARGIN + (np.arange(len(mean)) + 0.5) * size / steps * across
        y = MARGIN + (high - mean) / max(high - low, 1e-12) * down
        colour, width = COLOURS[number], 6 if number == 0 else 2
        pen.line(list(zip(x.tolist(), y.tolist(), strict=True)), colour, width)
        pen.text((SIZE[0] - MARGIN - 200, MARGIN + 10 + 16 * number), name, colour)
    picture.save(path)
