"""Did you mean: the known word that a misspelt one is closest to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def nearest(
    word: str, words: Iterable[str], synonyms: Mapping[str, str] | None = None
) -> str | None:
    """The one of `words` that `word` most likely means, or None.

    A known synonym wins; else the smallest number of edits, at most 2 (1 for a word shorter than
    4 letters) and never as many as the word has letters. Case does not count as an edit.
    """
    known = sorted(set(words) - {word})
    meant = (synonyms or {}).get(word)
    if meant in known:
        return meant
    most = min(2 if len(word) >= 4 else 1, len(word) - 1)
    ranked = ((edits(word.lower(), other.lower()), other) for other in known)
    return min((pair for pair in ranked if pair[0] <= most), default=(0, None))[1]


def edits(a: str, b: str) -> int:
    """How many letters to insert, delete, replace or swap with a neighbour make `b` of `a`."""
    before: list[int] = []
    above = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                row[j] = min(row[j], before[j - 2] + 1)
        before, above = above, row
    return above[-1]
