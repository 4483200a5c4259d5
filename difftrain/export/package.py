"""One executable file that draws: engines, manifest, the data of its tokenizer, a short loader.

    #!/usr/bin/env python3
    __main__.py   manifest.json   engines/*.engine   text/*   difftrain/ (the loader's few files)

The loader's files are those of the package, put in as they are: the noise it draws is the same.
"""

from __future__ import annotations

import json
import lzma
import os
import zipfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from torch import nn

from difftrain.compiler.executable import FIXED_TIME, SHEBANG, replaced, started_by
from difftrain.export.errors import ExportError
from difftrain.export.tokens import WORD_END, BytePairs, Carried
from difftrain.models.joined import Joined
from difftrain.models.labels import Labels
from difftrain.models.pieces import Pieces
from difftrain.models.text import TextEncoder

MANIFEST, LOADER = "manifest.json", "difftrain/export/loader.py"
CARRIED = (
    "compiler/random.py",
    "compiler/random_kernel.py",
    "export/loader.py",
    "export/png.py",
    "export/running.py",
    "export/tokens.py",
    "language/nearest.py",
    "models/errors.py",
    "models/labels.py",
)
TRIED = (  # texts that a carried tokenizer must read as the run's own does
    "",
    "a red apple",
    "It's 2024: they'll pay 35.50 EUR, we've said!",
    "GRÜẞE \u03a3\u039f\u03a3 caf\u00e9 \u0441\u043e\u0431\u0430\u043a\u0430 \u732b \U0001f600",
    "one  two\tthree\nfour_five-six",
    "word " * 200,
)
LONG = 512  # tokens, more than any of these has


def pack(path: Path, manifest: Mapping[str, object], data: Mapping[str, bytes]) -> Path:
    """Writes the file; it appears whole or not at all. Engines are stored as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    package = files("difftrain")
    source = {f"difftrain/{n}": package.joinpath(n).read_bytes() for n in CARRIED}
    inits = {f"{os.path.dirname(n)}/__init__.py": b"" for n in source}
    texts = {
        "__main__.py": started_by("difftrain.export.loader"),
        MANIFEST: json.dumps(manifest, indent=1).encode(),
        "difftrain/__init__.py": b"",
    }
    return replaced(path, lambda partial: _write(partial, texts | inits | source, data))


def holds_engines(path: Path) -> bool:
    """Whether a file is one that was packed here, by what it holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {MANIFEST, LOADER} <= set(archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _write(path: Path, texts: Mapping[str, bytes], data: Mapping[str, bytes]) -> None:
    with path.open("wb") as out:
        out.write(SHEBANG)
        with zipfile.ZipFile(out, "w") as archive:
            for name, value in texts.items():
                _add(archive, name, value, zipfile.ZIP_DEFLATED)
            for name, value in data.items():
                _add(archive, name, value, zipfile.ZIP_STORED)


def _add(archive: zipfile.ZipFile, name: str, data: bytes, how: int) -> None:
    archive.writestr(zipfile.ZipInfo(name, FIXED_TIME), data, how)


# ---- encoders of conditions


def encoders(
    text: nn.Module | None, called: str, prompts: Sequence[str] = ()
) -> tuple[list[dict], dict[str, bytes]]:
    """What makes ids of texts, for the manifest, and the files that it reads. Raises ExportError,
    which names the encoder as it is `called`, where it cannot be carried."""
    parts = text.encoders if isinstance(text, Joined) else [] if text is None else [text]
    abouts, data = [], {}
    for i, part in enumerate(parts):
        about, held = _described(part, called)
        if held is not None:
            about["file"] = f"text/{i}"
            data[about["file"]] = held
            _agrees(part, about, held, prompts)
        abouts.append(about)
    return abouts, data


def _described(part: nn.Module, called: str) -> tuple[dict, bytes | None]:
    match part:
        case Labels():
            names = list(part.vocabulary)
            return {
                "kind": "labels",
                "classes": part.classes,
                "names": names,
                "field": part.field,
            }, None
        case TextEncoder(tokens=Pieces()):
            return _tokenizer(part)
        case TextEncoder() if (model := _model(part)).get("end_of_word_suffix") == WORD_END:
            return _byte_pairs(part, model)
    raise ExportError(
        f"{called} encodes the prompts of this run, and the file carries the tokens of `sd.clip`,"
        " `t5.encoder` and `label.classes` alone: train with one of these, or export to `onnx`,"
        " which leaves tokens to the caller"
    )


def _model(part: TextEncoder) -> dict:
    """The model of a tokenizer, as its library writes it."""
    backend = getattr(part.tokens, "backend", None)
    return json.loads(backend.to_str())["model"] if backend is not None else {}


def _byte_pairs(part: TextEncoder, model: dict) -> tuple[dict, bytes]:
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda it: it[1])]
    merges = [m.split() if isinstance(m, str) else m for m in model["merges"]]
    packed = lzma.compress(json.dumps({"tokens": tokens, "merges": merges}).encode())
    marks = {n: getattr(part.tokens, n) for n in ("start", "end", "pad")}
    about = {"kind": "byte pairs", "length": part.length, **marks, "vocabulary": part.vocabulary}
    return about, packed


def _tokenizer(part: TextEncoder) -> tuple[dict, bytes]:
    backend = part.tokens.backend
    about = {
        "kind": "tokenizer",
        "length": part.length,
        "after": part.tokens.after,
        "pad": backend.pad_token_id,
        "padding": backend.pad_token,
    }
    return about, backend.backend_tokenizer.to_str().encode()


def _agrees(part: TextEncoder, about: dict, held: bytes, prompts: Sequence[str]) -> None:
    """Raises ExportError where the carried tokenizer reads a text otherwise than the run's."""
    kind = Carried if about["kind"] == "tokenizer" else BytePairs
    ours = kind({**about, "vocabulary": [], "length": LONG}, held)
    for text in (*TRIED, *prompts):
        if ours.ids([text]) != part.tokens([text], LONG).tolist():
            raise ExportError(
                f"the tokenizer that the file would carry reads `{text[:40]}` otherwise than the"
                " run's own: export to ONNX, which leaves tokens to the caller"
            )
