"""Text to token ids, with CLIP's byte pair vocabulary (arXiv:2103.00020 section 2.4)."""

from __future__ import annotations

import logging
import lzma
from collections.abc import Callable, Iterable
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from difftrain.models.errors import PartError
from difftrain.models.pretrained import folder, hub_failed, is_hub_name

START, END = 49406, 49407
MERGES = 48_894
WORD_END = "</w>"
# contractions, runs of letters, single digits, runs of anything else that is no space
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"

Say = Callable[[str], object]
warn: Say = logging.getLogger("difftrain").warning


class Tokens:
    """A function of texts and a length that gives ids [B, length]: start, text, end, padding."""

    def __init__(self, backend, *, start=START, end=END, pad=END, say: Say = warn):
        self.backend, self.say = backend, say
        self.start, self.end, self.pad = start, end, pad
        self._told = False

    def __call__(self, texts: Iterable[str], length: int = 77) -> Tensor:
        """Ids, int64 [B, length]; what is longer is cut before the end mark, and that said once."""
        if length < 2:
            raise PartError(f"{length} tokens hold no text: the start and the end mark take two")
        rows = [self._row(text, length) for text in texts]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length)

    def used(self, texts: Iterable[str]) -> list[int]:
        """The ids that these texts use, sorted, marks and padding counted in."""
        ids = {self.start, self.end, self.pad}
        return sorted(ids.union(*(self._ids(text) for text in texts)))

    def words(self, ids: Iterable[int]) -> list[tuple[str, list[int]]]:
        """The words that these ids spell, each with its ids; marks and padding are left out."""
        found, held = [], []
        for id_ in ids:
            if id_ in (self.start, self.end):
                continue
            held.append(id_)
            if self.backend.id_to_token(id_).endswith(WORD_END):
                found.append((self._spelt(held), held))
                held = []
        return found + ([(self._spelt(held), held)] if held else [])

    def _ids(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def _row(self, text: str, length: int) -> list[int]:
        ids = self._ids(text)
        if len(ids) > length - 2:
            self._tell(text, len(ids) + 2, length)
        row = [self.start, *ids[: length - 2], self.end]
        return row + [self.pad] * (length - len(row))

    def _tell(self, text: str, count: int, length: int) -> None:
        if not self._told:
            self.say(f"`{text[:40]}...` has {count} tokens and {length} fit: such texts are cut")
        self._told = True

    def _spelt(self, ids: list[int]) -> str:
        return self.backend.decode(ids).replace(WORD_END, " ").strip()


def clip_tokenizer(weights: str = "", say: Say = warn) -> Tokens:
    """The tokenizer of a pretrained folder or hub name, or the one that comes with the package."""
    if not weights:
        return Tokens(_packaged(), say=say)
    if not is_hub_name(weights) and not (folder(weights) / "tokenizer").is_dir():
        return Tokens(_packaged(), say=say)
    saved = _saved(weights)
    marks = {"start": saved.bos_token_id, "end": saved.eos_token_id, "pad": saved.pad_token_id}
    return Tokens(saved.backend_tokenizer, **marks, say=say)


def _saved(weights: str):
    from transformers import AutoTokenizer

    local = not is_hub_name(weights)
    try:
        if local:
            return AutoTokenizer.from_pretrained(folder(weights) / "tokenizer")
        return AutoTokenizer.from_pretrained(weights, subfolder="tokenizer")
    except (OSError, ValueError) as cause:
        said = f"cannot read the tokenizer in `{weights}`: save the folder again"
        raise PartError(said if local else hub_failed(weights, "the tokenizer")) from cause


@cache
def _packaged():
    """The byte pair tokenizer over the 48,894 merges in clip_bpe.txt.xz."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    packed = files("difftrain.models").joinpath("clip_bpe.txt.xz").read_bytes()
    merges = [tuple(line.split()) for line in lzma.decompress(packed).decode().splitlines()]
    tokens = [*_letters(), *(c + WORD_END for c in _letters()), *map("".join, merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<start>", "<end>"])}
    made = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix=WORD_END))
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    pieces = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([pieces, as_bytes])
    made.decoder = decoders.ByteLevel()
    return made


def _letters() -> list[str]:
    """One printable character for each byte, in the order of the vocabulary's first 256 ids.

    Printable Latin-1 bytes stand for themselves and come first; the rest follow from U+0100 on.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in shown] + [chr(0x100 + i) for i in range(256 - len(shown))]
