"""Pictures with captions: the set that comes with the package, or any folder or zip.

A folder or zip holds a `metadata.jsonl` (one JSON object a line: a `file_name` beside it and a
text), or pictures with caption files of the same stem (`cat.png`, `cat.txt`).
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CAPTIONS = (".txt", ".caption")
SPLIT_FOLDERS = {"train", "validation", "test"}
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA"}  # at most 8 bits a channel, grey or RGB
UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)
LINE = '{"file_name": "cat.png", "caption": "a cat"}'
TRANSFORM = "upright, on white, shorter side by lanczos, centre crop"


class DataError(Exception):
    """Data that cannot be used: one sentence that names the file and says what to do."""


@dataclass(frozen=True)
class Record:
    """One sample: its path inside the source, the first text that it is conditioned on, every
    phrasing of that, all fields."""

    file: str
    caption: str
    captions: tuple[str, ...]
    fields: Mapping[str, object]


@dataclass(frozen=True)
class Folder:
    """The files below a folder, by their paths relative to it, with forward slashes."""

    path: Path

    @cached_property
    def names(self) -> frozenset[str]:
        walked = os.walk(self.path, followlinks=True)
        found = (Path(at, name) for at, _, names in walked for name in names)
        return frozenset(path.relative_to(self.path).as_posix() for path in found)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


@dataclass(frozen=True)
class Archive:
    """The files inside an open zip; reading it from several threads is safe."""

    zip: zipfile.ZipFile

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(name for name in self.zip.namelist() if not name.startswith("__MACOSX/"))

    def read(self, name: str) -> bytes:
        return self.zip.read(name)


@dataclass(frozen=True)
class Pictures:
    """One split of a source: its records in the order of the source, pictures read on demand."""

    name: str
    records: tuple[Record, ...]
    store: Folder | Archive

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        return f"{len(self)} pictures of `{self.name}`"

    @property
    def texts(self) -> Iterator[str]:
        """Every phrasing of every record, in order."""
        return (text for record in self.records for text in record.captions)

    def data(self, row: int) -> bytes:
        """The bytes of a picture's file."""
        file = self.records[row].file
        try:
            return self.store.read(file)
        except UNREADABLE as cause:
            raise DataError(
                f"`{file}` in `{self.name}` cannot be read ({_reason(cause)}): "
                "copy the file again, or take the picture out of the set"
            ) from cause

    def image(self, row: int, size: int) -> torch.Tensor:
        """A picture as RGB, uint8 [3, size, size]: shorter side resized, centre cropped."""
        return picture(self.data(row), size, self.records[row].file)


def open_source(
    kind: str,
    path: str | Path = "",
    *,
    caption: str = "caption",
    split: str = "train",
    held_out: float = 0.0,
) -> Pictures:
    """One split of the source `emoji64` or `folder`, every record checked, no picture decoded yet.

    `caption` names the field of `metadata.jsonl` that pictures are conditioned on, whose value is a
    text, a number or a list of phrasings of which every sample draws one; "" asks for none.
    `split` is a value of the field `split`, or `held_out` (all that is not `train`), or `all`.
    Without that field (or folders called train, validation, test) everything is `train`, less the
    fraction `held_out`: a hash of the file name decides, so adding or removing pictures moves no
    other one.
    """
    match kind:
        case "emoji64":
            name, store = kind, _embedded()
        case "folder":
            name, store = str(path), _open(path)
        case _:
            near = get_close_matches(kind, ("emoji64", "folder"), n=1)
            hint = f"did you mean `{near[0]}`?" if near else "use `emoji64` or `folder`"
            raise DataError(f"there is no data source called `{kind}`: {hint}")
    records = list(_records(store, name, caption))
    if not records:
        raise DataError(_nothing(store, name))
    return Pictures(name, tuple(of_split(records, name, split, held_out)), store)


def _nothing(store: Folder | Archive, name: str) -> str:
    """The sentence for a source without records."""
    for table in _tables(store):
        return f"`{name}/{table}` is empty: write one object a line, as in {LINE}"
    return (
        f"`{name}` holds no pictures: it needs a metadata.jsonl, "
        "or pictures with a caption file of the same name beside each"
    )


def _embedded() -> Archive:
    # read as a resource, since the package may itself stand inside a zip
    data = files("difftrain").joinpath("data", "emoji64.zip").read_bytes()
    return Archive(zipfile.ZipFile(io.BytesIO(data)))


def _open(path: str | Path) -> Folder | Archive:
    if not str(path):
        raise DataError('`folder` needs a path: folder("photos")')
    at = Path(path).expanduser()
    if at.is_dir() and not os.access(at, os.R_OK | os.X_OK):
        raise DataError(f"`{path}` cannot be read (permission denied): give a folder that can be")
    if at.is_dir():
        return Folder(at)
    if not at.exists():
        raise DataError(
            f"there is no folder or zip `{path}`: check the path (seen from `{os.getcwd()}`)"
        )
    try:
        return Archive(zipfile.ZipFile(at))
    except UNREADABLE as cause:
        raise DataError(
            f"`{path}` is neither a folder nor a whole zip: unpack it, or copy it again"
        ) from cause


def _records(store: Folder | Archive, name: str, caption: str) -> Iterator[Record]:
    tables = _tables(store)
    if not tables:
        yield from _beside(store, name, caption)
    for table in tables:
        for number, line in enumerate(_text(store, name, table).split("\n"), 1):
            if line.strip():
                yield _from_line(line, f"`{name}/{table}` line {number}", table, store, caption)


def _tables(store: Folder | Archive) -> list[str]:
    return sorted(n for n in store.names if posixpath.basename(n) == "metadata.jsonl")


def _from_line(line: str, where: str, table: str, store: Folder | Archive, caption: str) -> Record:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as cause:
        raise DataError(
            f"{where} is not JSON ({cause.msg.lower()} at column {cause.colno}): "
            f"write one object a line, as in {LINE}"
        ) from cause
    if not isinstance(fields, dict) or not isinstance(fields.get("file_name"), str):
        raise DataError(f'{where} names no picture: give it a "file_name"')
    file = posixpath.normpath(posixpath.join(posixpath.dirname(table), fields["file_name"]))
    if file not in store.names:
        raise DataError(
            f"{where} names `{fields['file_name']}`, which is not there: "
            "add the picture, or take the line out"
        )
    return record(file, _with_split(fields, file), caption, where)


def record(file: str, fields: Mapping, caption: str, where: str) -> Record:
    """The record of a file with these fields; `caption` names the one that it is conditioned on."""
    texts = phrasings(fields, caption, where)
    return Record(file, texts[0], texts, fields)


def phrasings(fields: Mapping, caption: str, where: str) -> tuple[str, ...]:
    """Every text under the field `caption`, at least one and none blank; a number is its digits."""
    if not caption:
        return ("",)
    value = fields.get(caption)
    texts = tuple(map(_digits, value if isinstance(value, list) else (value,)))
    if texts and all(isinstance(text, str) and text.strip() for text in texts):
        return texts
    if value not in (None, [], "") and not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: `{caption}` is not text: write a string or a list of strings")
    raise DataError(f"{where} has no `{caption}`: write one{_elsewhere(fields, caption)}")


def _digits(value: object) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if number else value


def _elsewhere(fields: Mapping, caption: str) -> str:
    """Advice to take another text field of the line, where it has one."""
    strings = [key for key, text in fields.items() if isinstance(text, str) and text.strip()]
    others = [key for key in strings if key not in ("file_name", caption)]
    if not others:
        return ""
    likely = next((key for key in ("caption", "text") if key in others), others[0])
    return f', or name the field that holds the text, as in caption = "{likely}"'


def _beside(store: Folder | Archive, name: str, caption: str) -> Iterator[Record]:
    """Records of pictures whose captions stand in files of the same stem; the field `label` is the
    name of the folder that a picture lies in."""
    for file in sorted(store.names):
        stem, ending = posixpath.splitext(file)
        if ending.lower() not in PICTURES:
            continue
        fields, where = _with_split(_folder_label(file), file), f"`{file}` in `{name}`"
        if caption == "label" and "label" not in fields:
            raise DataError(f"{where} has no `label`: put it into a folder of that name")
        if caption and caption not in fields:
            fields = {caption: _caption_file(store, name, file, stem), **fields}
        yield record(file, fields, caption, where)


def _folder_label(file: str) -> dict[str, str]:
    folder = posixpath.basename(posixpath.dirname(file))
    return {"label": folder} if folder and folder not in SPLIT_FOLDERS else {}


def _caption_file(store: Folder | Archive, name: str, file: str, stem: str) -> str:
    beside = next((stem + ending for ending in CAPTIONS if stem + ending in store.names), "")
    text = " ".join(_text(store, name, beside).split()) if beside else ""
    if not text:
        wrong = f"has an empty caption file `{beside}`" if beside else "has no caption"
        raise DataError(
            f"`{file}` in `{name}` {wrong}: write the text into `{stem}.txt`, "
            "or list all captions in a metadata.jsonl"
        )
    return text


def _text(store: Folder | Archive, name: str, file: str) -> str:
    try:
        return store.read(file).decode("utf-8-sig")
    except UNREADABLE as cause:
        raise DataError(
            f"`{file}` in `{name}` cannot be read as UTF-8 text ({_reason(cause)}): save it again"
        ) from cause


def _with_split(fields: Mapping, file: str) -> Mapping:
    """The fields, with `split` from the outermost folder where that is one by name."""
    top = file.split("/")[0]
    return {"split": top, **fields} if top in SPLIT_FOLDERS else fields


def of_split(records: list[Record], name: str, split: str, held_out: float = 0.0) -> list[Record]:
    """The records of a split, never none."""
    parts = [record.fields.get("split") for record in records]
    if not any(parts):
        parts = ["held_out" if _hashed(record.file) < held_out else "train" for record in records]
    elif not all(parts):
        file = records[[bool(part) for part in parts].index(False)].file
        raise DataError(f"`{file}` in `{name}` has no `split` while others have one: add it")
    elif split == "held_out" and split not in parts:
        parts = ["train" if part == "train" else split for part in parts]
    chosen = [r for r, part in zip(records, parts, strict=True) if split in ("all", part)]
    if not chosen:
        there = ", ".join(f"`{part}`" for part in sorted(set(map(str, parts))))
        raise DataError(
            f"`{name}` has nothing in the split `{split}`, only in {there}: "
            "name one of these, or mark samples with a field `split`"
        )
    return chosen


def _hashed(file: str) -> float:
    return int.from_bytes(blake2b(file.encode(), digest_size=8).digest(), "big") / 2**64


def picture(data: bytes, size: int, name: str) -> torch.Tensor:
    """An encoded picture as RGB, uint8 [3, size, size]: shorter side resized, centre cropped.

    Turned as its EXIF tag says, transparency laid on white, grey spread over three channels.
    """
    Image.init()  # two threads that meet in Pillow's own lazy loading can miss a format
    try:
        image = Image.open(io.BytesIO(data))
        deep = any(";16" in str(tile) for tile in image.tile)  # Pillow would cut these to 8 bits
        if image.mode in MODES and not deep:
            upright = ImageOps.exif_transpose(image).convert("RGBA")
            on_white = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            fitted = ImageOps.fit(on_white.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
            return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()
    except Exception as cause:  # a damaged file may raise anything inside a decoder
        raise DataError(
            f"`{name}` cannot be read as a picture ({_reason(cause)}): "
            "save it again, or take it out of the set"
        ) from cause
    deep = deep or image.mode[0] in "IF"
    bands = len(image.getbands())
    found = "has more than 8 bits a channel" if deep else f"is {image.mode} ({bands} channels)"
    raise DataError(f"`{name}` {found}: save it as 8-bit RGB")


def _reason(cause: Exception) -> str:
    """The first line of an error, in the form that stands inside a sentence."""
    words = getattr(cause, "strerror", None) or str(cause) or "it is damaged"
    return words.splitlines()[0].split(" <")[0].rstrip(".").lower()
