"""The data that the specs of this folder read: random latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np

FILE = "latents.npz"  # as the specs call it
CLASSES = 1000


def write_data(folder: Path, count: int, side: int) -> None:
    """Random latents [count, 4, side, side], each with a caption and a class."""
    random = np.random.default_rng(0)
    latents = random.standard_normal((count, 4, side, side), dtype=np.float32)
    classes = random.integers(0, CLASSES, count)
    captions = np.array([f"latents of picture {i}" for i in range(count)])
    np.savez(folder / FILE, x=latents, label=classes, caption=captions)
