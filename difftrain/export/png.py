"""PNG files without a package for pictures."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

import numpy as np

GAP = 4  # white pixels between pictures and around them
COLUMNS = 8  # at most


def sheet(pictures: np.ndarray) -> np.ndarray:
    """Pictures uint8 [N, H, W, 3] beside and below each other: uint8 [H', W', 3]."""
    count, height, width, _ = pictures.shape
    columns = min(COLUMNS, max(1, round(count**0.5)))
    rows = -(-count // columns)
    shape = GAP + rows * (height + GAP), GAP + columns * (width + GAP), 3
    page = np.full(shape, 255, np.uint8)
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        y, x = GAP + row * (height + GAP), GAP + column * (width + GAP)
        page[y : y + height, x : x + width] = picture
    return page


def png(pixels: np.ndarray, texts: Mapping[str, str]) -> bytes:
    """A PNG of pixels uint8 [H, W, 3], with text entries."""
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], 1)
    notes = (_chunk(b"iTXt", f"{n}\0\0\0\0\0{text}".encode()) for n, text in texts.items())
    body = _chunk(b"IDAT", zlib.compress(rows.tobytes()))
    ends = _chunk(b"IHDR", header), _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + ends[0] + b"".join(notes) + body + ends[1]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
