"""How emitted statements are laid out: within 100 columns, broken where a formatter breaks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

WIDTH = 100
INDENT = "    "


def assignment(name: str, text: str, indent: str) -> list[str]:
    """`name = text`; a call that is too long has its arguments on lines of their own."""
    return _fitted(f"{indent}{name} = {text}", indent)


def returned(entries: Mapping[str, str], indent: str = INDENT) -> list[str]:
    """`return {...}`: one line if it fits, else one line an entry."""
    items = [f'"{name}": {text}' for name, text in entries.items()]
    line = f"{indent}return {{{', '.join(items)}}}"
    if len(line) <= WIDTH:
        return [line]
    return [f"{indent}return {{", *(f"{indent}{INDENT}{i}," for i in items), f"{indent}}}"]


def imports(wanted: Mapping[str, Sequence[str]]) -> list[str]:
    """`from module import names` for each module, sorted; modules without names are left out."""
    lines: list[str] = []
    for module, names in sorted(wanted.items()):
        listed = sorted(set(names), key=lambda n: (n[:1].islower(), n))
        line = f"from {module} import {', '.join(listed)}"
        if len(line) <= WIDTH:
            lines += [line] * bool(listed)
        else:
            lines += [f"from {module} import (", *(f"{INDENT}{n}," for n in listed), ")"]
    return lines


def _fitted(line: str, indent: str) -> list[str]:
    if len(line) <= WIDTH or not line.endswith(")"):
        return [line]
    start = _opener(line)
    head, items = line[: start + 1], arguments(line[start + 1 : -1])
    inner = f"{indent}{INDENT}{', '.join(items)}"
    if len(inner) <= WIDTH:
        return [head, inner, f"{indent})"]
    return [head, *(f"{indent}{INDENT}{i}," for i in items), f"{indent})"]


def _opener(line: str) -> int:
    """Where the bracket opens that the line's last character closes."""
    depth = 0
    for at in range(len(line) - 1, -1, -1):
        depth += (line[at] in ")]}") - (line[at] in "([{")
        if depth == 0:
            return at
    raise ValueError(f"brackets do not match in {line!r}")


def arguments(text: str) -> list[str]:
    """The arguments between the brackets of a call."""
    depth, start, found = 0, 0, []
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            found.append(text[start:at])
            start = at + 2
    return [*found, text[start:]]


def without_doubles(lines: list[str]) -> list[str]:
    """The lines with one blank line where several follow each other, and none at the end."""
    kept: list[str] = []
    for line in lines:
        if line or (kept and kept[-1]):
            kept.append(line)
    while kept and not kept[-1]:
        kept.pop()
    return kept
