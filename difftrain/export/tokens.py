"""Byte pair tokens in plain Python, for files that draw without the packages of training.

The data are a vocabulary and its merges, as CLIP's tokenizers have them (arXiv:2103.00020 section
2.4): text in lower case, cut into runs of letters, single digits and runs of other signs.
"""

from __future__ import annotations

import json
import lzma
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import pairwise

WORD_END = "</w>"
SPACES = r"[^\S\x1c-\x1f]+"  # Unicode's, of which Python counts four more
SHORT = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
SHOWN = {
    *range(0x21, 0x7F),
    *range(0xA1, 0xAD),
    *range(0xAE, 0x100),
}  # bytes with a sign in Latin-1
HIDDEN = [b for b in range(256) if b not in SHOWN]
LETTERS = [chr(b if b in SHOWN else 0x100 + HIDDEN.index(b)) for b in range(256)]


class UnknownWords(Exception):
    """Words that an encoder was not trained on; `str()` is the sentence to show."""


class BytePairs:
    """Ids of texts: `packed` holds the tokens by id and the merges in order; `about` says length,
    marks, padding, and the ids that the encoder holds ([]: all)."""

    def __init__(self, about: Mapping[str, object], packed: bytes):
        self.about = about
        data = json.loads(lzma.decompress(packed))
        self.tokens = data["tokens"]
        self.place = {token: i for i, token in enumerate(self.tokens)}
        self.rank = {tuple(merge): i for i, merge in enumerate(data["merges"])}

    def ids(self, texts: Iterable[str]) -> list[list[int]]:
        """Rows of `length` ids: start, text, end, padding. Raises UnknownWords."""
        rows = [self._row(text) for text in texts]
        if lost := self._unknown(rows):
            raise UnknownWords(
                f"{', '.join(f'`{word}`' for word in lost)} never occurred in training: this text"
                " encoder only knows the words of its captions, so use those"
            )
        return rows

    def _row(self, text: str) -> list[int]:
        length, found = self.about["length"], [i for w in words(text) for i in self._word(w)]
        row = [self.about["start"], *found[: length - 2], self.about["end"]]
        return row + [self.about["pad"]] * (length - len(row))

    @cached_property
    def _known(self) -> frozenset[int]:
        return frozenset(self.about["vocabulary"])

    def _unknown(self, rows: list[list[int]]) -> list[str]:
        if not self._known:
            return []
        spelt = (word for row in rows for word in self._spelt(row))
        return list(dict.fromkeys(text for text, ids in spelt if not self._known.issuperset(ids)))

    def _spelt(self, row: list[int]) -> Iterator[tuple[str, list[int]]]:
        """The words of a row, each with its ids; a last one may be cut."""
        held: list[int] = []
        for id_ in row:
            if id_ in (self.about["start"], self.about["end"]):
                continue
            held.append(id_)
            if self.tokens[id_].endswith(WORD_END):
                yield self._text(held), held
                held = []
        if held:
            yield self._text(held), held

    def _text(self, ids: list[int]) -> str:
        signs = "".join(self.tokens[i] for i in ids).replace(WORD_END, "")
        return bytes(map(LETTERS.index, signs)).decode(errors="replace")

    def _word(self, word: str) -> list[int]:
        """The ids of one word: the pair that was merged first is merged first."""
        parts = [LETTERS[b] for b in word.encode()]
        parts[-1] += WORD_END
        while (pair := min(pairwise(parts), key=self._order, default=None)) in self.rank:
            at = list(pairwise(parts)).index(pair)
            parts = [*parts[:at], "".join(pair), *parts[at + 2 :]]
        return [self.place[part] for part in parts]

    def _order(self, pair: tuple[str, str]) -> int:
        return self.rank.get(pair, len(self.rank))


class Carried:
    """Ids of texts by a tokenizer of another kind, which needs the package `tokenizers`."""

    def __init__(self, about: Mapping[str, object], data: bytes):
        from tokenizers import Tokenizer

        self.after, length = about["after"], about["length"]
        self.backend = Tokenizer.from_str(data.decode())
        self.backend.enable_truncation(length)
        self.backend.enable_padding(length=length, pad_id=about["pad"], pad_token=about["padding"])

    def ids(self, texts: Iterable[str]) -> list[list[int]]:
        """Rows of `length` ids."""
        return [self.backend.encode(text + self.after).ids for text in texts]


def words(text: str) -> Iterator[str]:
    """What of a text is tokenized: contractions, runs of letters, digits, runs of other signs."""
    text = re.sub(SPACES, " ", unicodedata.normalize("NFC", text))
    text = "".join(c.lower() for c in text)  # letter by letter: a last sigma is one like others
    at = 0
    while at < len(text):
        word = next((s for s in SHORT if text.startswith(s, at)), None) or _run(text, at)
        if word != " ":
            yield word
        at += len(word)


def _run(text: str, at: int) -> str:
    kind, end = _kind(text[at]), at + 1
    while kind in "LP" and end < len(text) and _kind(text[end]) == kind:
        end += 1
    return text[at:end]


def _kind(sign: str) -> str:
    """L, a letter; N, a digit; a space; P, anything else."""
    if sign == " ":
        return " "
    kind = unicodedata.category(sign)[0]
    return kind if kind in "LN" else "P"
