"""The command of a file that holds a sampler: pictures of prompts, by the engines inside it.

    ./emoji64 --prompt "a red apple" -n 4 --seed 0 -o out.png

It needs Python, numpy, torch and the library of its engines.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from difftrain.export.png import png, sheet
from difftrain.export.running import Refused, Runner, Walk, gpu, kernels_of, runtime
from difftrain.export.tokens import BytePairs, Carried, UnknownWords
from difftrain.models.errors import PartError
from difftrain.models.labels import Labels

MANIFEST = "manifest.json"
SAVED = (".png", ".npz")
MOST = 100_000  # samples drawn by one command
SEEDS = 2**32
MADE_BY = ("spec", "graph", "step", "solver", "guidance")  # what samples say of their file


def main(argv: Sequence[str]) -> int:
    """The exit code of the file, called as `argv`: its own path, and arguments."""
    file = Path(argv[0])
    try:
        with zipfile.ZipFile(file) as archive:
            _run(archive, file.name, argv[1:])
    except (UnknownWords, PartError, Refused) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return getattr(problem, "code", 2)
    return 0


def _run(archive: zipfile.ZipFile, name: str, argv: Sequence[str]) -> None:
    manifest = json.loads(archive.read(MANIFEST))
    args = _options(name, manifest).parse_args(argv)
    if args.inspect:
        print(json.dumps(manifest, indent=1))
        return
    if manifest["arrays"] and args.size:
        raise Refused("`--size` is the side of pictures, and this file draws arrays: leave it out")
    out = _named(args.output or f"{manifest['name']}{SAVED[manifest['arrays']]}", manifest)
    texts = _texts(manifest, args.prompts, args.count)
    sampler = Sampler(archive, manifest, args.size or manifest["sizes"][0], args.batch)
    made = sampler(texts, args.seed)
    _write(out, manifest, texts, args, made)
    print(out)


class Arguments(argparse.ArgumentParser):
    """Arguments that are refused in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message}: `{self.prog} --help` lists what it takes")


def _options(name: str, manifest: Mapping) -> argparse.ArgumentParser:
    parser = Arguments(name, description=f"samples of `{manifest['name']}`")
    add = parser.add_argument
    several = {"action": "append", "default": [], "dest": "prompts"}
    add("--prompt", type=_text, help="what to draw; repeatable", **several)
    add("-n", type=_whole(1, MOST), dest="count", help="how many samples")
    seeds = _whole(0, SEEDS - 1)
    add("--seed", type=seeds, default=manifest["seed"], help="of the noise: %(default)s")
    add("-o", dest="output", help="a file: .png for pictures, .npz for arrays")
    add("--size", type=_whole(1, MOST), help=f"pixels a side: {_listed(manifest['sizes'])}")
    add("--batch", type=_whole(1, MOST), help="samples drawn at a time, at most")
    add("--inspect", action="store_true", help="print the manifest and draw nothing")
    return parser


def _text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as cause:  # bytes of a command line may be no text
        raise argparse.ArgumentTypeError("it has bytes that are no UTF-8") from cause
    return text


def _whole(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (re.fullmatch(r"[0-9]{1,10}", text) and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"`{text}` is no whole number from {low} to {high}")
        return int(text)

    return read


def _listed(values: Sequence) -> str:
    return " or ".join(map(str, values))


def _named(out: str, manifest: Mapping) -> Path:
    """The file to write, which can be: arrays have no picture."""
    path = Path(out)
    if path.suffix not in SAVED[manifest["arrays"] :]:
        raise Refused(f"`{out}` must end in {_listed(SAVED[manifest['arrays'] :])}")
    home = next(above for above in path.absolute().parents if above.exists())
    if path.is_dir() or not (home.is_dir() and os.access(home, os.W_OK | os.X_OK)):
        raise Refused(f"`{out}` cannot be written: give another file with `-o`")
    return path


def _texts(manifest: Mapping, prompts: Sequence[str], count: int | None) -> list[str]:
    if prompts and not manifest["encoders"]:
        raise Refused("this network reads no condition: leave out `--prompt`")
    texts = list(prompts) or (manifest["prompts"] if manifest["encoders"] else [""])
    if not texts:
        raise Refused('say with `--prompt "..."` what to draw')
    return list(islice(cycle(texts), count or max(len(texts), 1)))


def _write(out: Path, manifest: Mapping, texts: list[str], args, made: np.ndarray) -> None:
    """Writes samples [N, ...] with what they were made from."""
    notes = {name: str(manifest[name]) for name in MADE_BY} | {"seed": str(args.seed)}
    notes["prompts"] = json.dumps(texts, ensure_ascii=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        np.savez(out, x=made, captions=np.array(texts), settings=json.dumps(notes))
    else:
        out.write_bytes(png(sheet(made), notes))


class Sampler:
    """Samples [N, ...] of texts and a seed: uint8 [N, H, W, 3], or arrays as they are."""

    def __init__(self, archive: zipfile.ZipFile, manifest: Mapping, size: int, batch: int | None):
        self.manifest, self.low, self.high = manifest, *manifest["batch"]
        engines = engines_of(manifest, size)
        if batch is not None and not self.low <= batch <= self.high:
            raise Refused(
                f"this file draws batches of {self.low} to {self.high}, not {batch}: export"
                f" again with `batch = {min(self.low, batch)}..{max(self.high, batch)}`"
            )
        self.high = batch or self.high
        for about in engines:
            runtime(about)
            gpu(about)
        self.parts = {e["piece"]: _runner(archive, e) for e in engines}
        self.encoders = [_encoder(archive, about) for about in manifest["encoders"]]
        name = "step" if "step" in self.parts else "sampler"
        inputs = list(manifest["pieces"]["step"]["inputs"]) if name == "step" else None
        table, shape = (manifest[of][str(size)] for of in ("tables", "shapes"))
        self.walk = Walk(self.parts[name], table, inputs, shape)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], seed: int) -> np.ndarray:
        told = self._told(texts)
        index = torch.arange(len(texts), device="cuda")
        drawn = [self._drawn(rows, seed, told) for rows in index.split(self.high)]
        self._keep_kernels()
        return torch.cat(drawn).cpu().numpy()

    def _keep_kernels(self) -> None:
        try:
            for part in self.parts.values():
                part.keep_kernels()
        except OSError as problem:  # they are compiled again then
            why = (problem.strerror or str(problem)).lower()
            say = f"compiled kernels are not kept: `{problem.filename}`: {why}"
            print(say, file=sys.stderr)

    def _drawn(self, rows: Tensor, seed: int, told: Sequence[Tensor]) -> Tensor:
        """The samples of some rows; too few for the engines are drawn with copies of the last."""
        filled = torch.cat([rows, rows[-1:].expand(max(0, self.low - len(rows)))])
        own = [value[filled] for value in told[:1]]
        latents = self.walk(seed, filled, [*own, *told[1:]])[: len(filled)]
        made = self.parts["decode"](latents)[0][: len(rows)]
        if self.manifest["arrays"]:
            return made
        return (made * 255).round().to(torch.uint8).permute(0, 2, 3, 1)

    def _told(self, texts: Sequence[str]) -> list[Tensor]:
        """The condition of each text, and the empty one where guidance reads it."""
        if not self.encoders:
            return []
        starts = range(0, len(texts), self.high)
        cond = torch.cat([self._encoded(texts[i : i + self.high]) for i in starts])
        return [cond, *([self._encoded([""])] if self.manifest["guided"] else [])]

    def _encoded(self, texts: Sequence[str]) -> Tensor:
        rows = [torch.as_tensor(encoder.ids(texts)) for encoder in self.encoders]
        ids = torch.cat(rows, 1).to("cuda", torch.int64)
        return self.parts["text"](ids)[0] if "text" in self.parts else ids


def engines_of(manifest: Mapping, size: int) -> list[Mapping]:
    """What is said of the engines that draw at a size; that of texts serves all. Raises Refused."""
    if size not in manifest["sizes"]:
        raise Refused(
            f"this file holds engines for a size of {_listed(manifest['sizes'])}, not {size}:"
            " export again with that size"
        )
    return [engine for engine in manifest["engines"] if engine["size"] in (size, None)]


def _runner(archive: zipfile.ZipFile, about: Mapping) -> Runner:
    data = archive.read(about["file"])
    return Runner(about["piece"], data, about, kernels_of(data))


def _encoder(archive: zipfile.ZipFile, about: Mapping):
    """What makes ids of texts."""
    match about["kind"]:
        case "labels":
            return Labels(about["classes"], about["names"], about["field"])
        case "byte pairs":
            return BytePairs(about, archive.read(about["file"]))
        case "tokenizer":
            return Carried(about, archive.read(about["file"]))
    raise Refused(f"this file has an encoder of the kind `{about['kind']}`, which it cannot read")
