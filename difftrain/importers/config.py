"""A foreign configuration as flat keys, each taken once; what nobody takes is told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from difftrain.language.nearest import nearest


class ConfigError(Exception):
    """A configuration that cannot be read; `str()` is the sentence to show."""


def flat(tree: Mapping, prefix: str = "") -> dict[str, object]:
    """`{"train": {"seed": 1}}` as `{"train.seed": 1}`."""
    found: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


@dataclass
class Config:
    """Values by dotted key, the keys taken so far, and remarks for the head of the spec."""

    values: Mapping[str, object]
    taken: set[str] = field(default_factory=set)
    remarks: list[str] = field(default_factory=list)

    def take(self, *keys: str) -> tuple[str, object]:
        """The first of the keys that has a value, and that value; (first key, None) without one.

        Others that say something else are told.
        """
        present = [k for k in keys if self.values.get(k) is not None]
        self.taken.update(keys)
        if not present:
            return keys[0], None
        first = present[0]
        for other in present[1:]:
            if self.values[other] != self.values[first]:
                self.unused(other, f"`{first}` says {told(self.values[first])}")
        return first, self.values[first]

    def number(self, *keys: str) -> float | int | None:
        """A number; text that spells one counts (YAML reads `1e-4` as text)."""
        key, value = self.take(*keys)
        if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            return self._finite(key, value)
        try:
            return self._finite(key, float(str(value)))
        except ValueError:
            raise ConfigError(f"`{key}` is {told(value)}, and a number is needed") from None

    def _finite(self, key: str, value):
        if value is None or math.isfinite(value):
            return int(value) if value is not None and value == int(value) else value
        raise ConfigError(f"`{key}` is {value}, and a finite number is needed")

    def flag(self, *keys: str) -> bool | None:
        """Yes or no."""
        key, value = self.take(*keys)
        if value is None or isinstance(value, bool):
            return value
        raise ConfigError(f"`{key}` is {told(value)}, and `true` or `false` is needed")

    def word(self, words: Mapping[str, str], *keys: str) -> str | None:
        """Our word for one of theirs."""
        key, value = self.take(*keys)
        if value is None:
            return None
        text = (
            {True: "yes", False: "no"}.get(value, str(value))
            if isinstance(value, bool)
            else str(value)
        )
        if text in words:
            return words[text]
        close = nearest(text, words)
        listed = ", ".join(f"`{w}`" for w in words)
        hint = f"did you mean `{close}`?" if close else f"known are {listed}"
        raise ConfigError(f"`{key}` is `{text}`: {hint}")

    def text(self, *keys: str) -> str | None:
        """A path or a name."""
        key, value = self.take(*keys)
        if value is None or isinstance(value, str):
            return value
        raise ConfigError(f"`{key}` is {told(value)}, and a text is needed")

    def unused(self, key: str, why: str) -> None:
        """A remark on a key that has a value and reached nothing."""
        self.taken.add(key)
        if self.values.get(key) is not None:
            self.remarks.append(f"`{key}` was not used: {why}")

    def rest(self, known: Iterable[str]) -> None:
        """Remarks on every key that nothing took."""
        for key in sorted(set(self.values) - self.taken):
            close = nearest(key, known) or _same_leaf(key, known)
            hint = f", did you mean `{close}`?" if close else ""
            self.remarks.append(f"`{key}` was not used: this key is not known{hint}")


def _same_leaf(key: str, known: Iterable[str]) -> str | None:
    """A known key that ends like this one and stands elsewhere."""
    leaf = key.rpartition(".")[2]
    ends = {k.rpartition(".")[2]: k for k in known}
    close = leaf if leaf in ends else nearest(leaf, ends)
    return ends.get(close) if close else None


def told(value: object) -> str:
    """A foreign value inside a sentence."""
    return f"`{str(value).splitlines()[0] if str(value) else ''}`"
