"""Picture grids as PNG files that carry the settings they were made with."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

GAP = 4  # white pixels between pictures and around them
FONT_SIZE = 10
LINE = 12  # pixels a caption line takes
DIGITS = 4  # of a picture's number, at least
NUMBER = re.compile(rf"\d{{{DIGITS}}}|[1-9]\d{{{DIGITS},}}")


def grid_png(
    path: str | Path,
    images: Tensor,
    columns: int,
    captions: Sequence[str] | None = None,
    settings: Mapping[str, object] | None = None,
) -> None:
    """Writes images [N, 3, H, W] in [-1, 1] as one PNG, row by row, captions under the pictures.

    `settings` become text entries of the PNG (strings as they are, the rest as JSON). The file
    appears whole or not at all.
    """
    sheet_png(path, to_bytes(images), columns, captions, settings)


def sheet_png(
    path: str | Path,
    pixels: Tensor,
    columns: int,
    captions: Sequence[str] | None = None,
    settings: Mapping[str, object] | None = None,
) -> None:
    """`grid_png` of pictures that are bytes already: uint8 [N, H, W, 3]."""
    _write(Path(path), _sheet(pixels, columns, captions), _text(settings or {}))


def write_pngs(
    folder: str | Path, batches: Iterable[Tensor], settings: Iterable[Mapping[str, object]]
) -> None:
    """Writes batches of uint8 [B, H, W, 3] as they come, as 0000.png, 0001.png, …, each with its
    settings; pictures of higher numbers that lay there before are gone at the end."""
    pictures, count = (pixels for batch in batches for pixels in batch), 0
    for pixels, each in zip(pictures, settings, strict=True):
        picture = Image.fromarray(pixels.numpy())
        _write(Path(folder) / f"{count:0{DIGITS}}.png", picture, _text(each))
        count += 1
    for old in numbered(Path(folder)):
        if int(old.stem) >= count:
            old.unlink()


def numbered(folder: Path) -> list[Path]:
    """The pictures of a folder whose names are numbers."""
    return [path for path in sorted(folder.glob("*.png")) if NUMBER.fullmatch(path.stem)]


def _text(settings: Mapping[str, object]) -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    for name, value in settings.items():
        words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text.add_text(name, words)
    return text


def to_bytes(images: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [-1, 1] as uint8 [N, H, W, 3], clamped and rounded."""
    scaled = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round()
    return scaled.to("cpu", torch.uint8).permute(0, 2, 3, 1).contiguous()


def _sheet(pixels: Tensor, columns: int, captions: Sequence[str] | None) -> Image.Image:
    count, height, width, _ = pixels.shape
    font = ImageFont.load_default(FONT_SIZE)
    lines = [_wrapped(caption, font, width) for caption in captions or [""] * count]
    cell = height + GAP + LINE * max((len(caption) for caption in lines), default=0)
    rows = -(-count // columns)
    sheet = Image.new("RGB", (GAP + columns * (width + GAP), GAP + rows * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pixels, lines, strict=True)):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * cell
        sheet.paste(Image.fromarray(picture.numpy()), (x, y))
        for k, line in enumerate(caption):
            pen.text((x, y + height + k * LINE), line, fill="black", font=font)
    return sheet


def _wrapped(caption: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The caption in lines no wider than `width` pixels, broken between words where possible."""
    lines: list[str] = []
    for word in caption.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return [_clipped(line, font, width) for line in lines]


def _clipped(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The longest beginning of the line that fits."""
    return next(line[:n] for n in range(len(line), -1, -1) if font.getlength(line[:n]) <= width)


def _write(path: Path, sheet: Image.Image, text: PngImagePlugin.PngInfo) -> None:
    with whole(path) as beside:
        sheet.save(beside, format="PNG", pnginfo=text)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside a file, which takes its place at the end: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
