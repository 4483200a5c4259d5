"""How one statement is written: the spaces between tokens, and where a long one is broken."""

from __future__ import annotations

from dataclasses import dataclass

from lark import Token

from difftrain.language.lexing import OPERATORS

WIDTH = 100
INDENT = 2

OPENERS = frozenset({"LPAR", "LSQB"})
CLOSERS = frozenset({"RPAR", "RSQB"})
TIGHT = frozenset({"CIRCUMFLEX", "DOTS", "DOT"})
# After one of these a minus is a sign, not a difference.
BEFORE_SIGN = OPENERS | OPERATORS | {"COMMA", "EQUAL", "TILDE", "IF", "THEN", "ELSE", "IN"}


@dataclass
class Item:
    """An item of a broken bracket; without tokens it is a comment on its own line."""

    tokens: list[Token]
    comment: str = ""


def flat(tokens: list[Token]) -> str:
    """The tokens on one line; a comma that ends a list is left out."""
    text, before, sign = "", None, False
    for i, token in enumerate(tokens):
        if token.type == "COMMA" and i + 1 < len(tokens) and tokens[i + 1].type in CLOSERS:
            continue
        text += _space(before, token, sign) + token
        sign = token.type == "MINUS" and (before is None or before.type in BEFORE_SIGN)
        before = token
    return text


def _space(before: Token | None, token: Token, sign: bool) -> str:
    """What stands between two neighbours; `sign` says that the first is a minus sign."""
    if before is None or sign or before.type in OPENERS | TIGHT:
        return ""
    if token.type in CLOSERS | TIGHT | {"COMMA"}:
        return ""
    return "" if token.type == "LPAR" and before.type == "NAME" else " "


def written(tokens: list[Token], indent: int, more: int = 0) -> list[tuple[str, str]]:
    """The lines of a statement, each with its comment; `more` columns follow the last one."""
    commented = _has_comment(tokens)
    if not commented and indent + len(flat(tokens)) + more <= WIDTH:
        return [(" " * indent + flat(tokens), "")]
    first, last = _bracket_to_break(tokens, commented)
    if first == last:
        return [(" " * indent + flat(tokens), "")]
    head = " " * indent + flat(tokens[: first + 1])
    inside = _written_items(_items(tokens[first + 1 : last]), indent + INDENT)
    return [(head, ""), *inside, *written(tokens[last:], indent, more)]


def _bracket_to_break(tokens: list[Token], commented: bool) -> tuple[int, int]:
    """Where the outermost bracket that must be broken opens and closes; (0, 0) for none."""
    brackets = [(a, b) for a, b in _brackets(tokens) if b > a + 1]
    if commented:
        return next((a, b) for a, b in brackets if _has_comment(tokens[a:b]))
    equal = next((i for i, token in enumerate(tokens) if token.type == "EQUAL"), 0)
    return max(brackets, key=lambda ends: _weight(tokens, *ends, equal), default=(0, 0))


def _weight(tokens: list[Token], first: int, last: int, equal: int) -> tuple[bool, bool, int]:
    """A value is broken rather than formals, a list rather than a sum, and the longest of them."""
    inside = tokens[first:last]
    return first > equal, any(token.type == "COMMA" for token in inside), len(flat(inside))


def _has_comment(tokens: list[Token]) -> bool:
    return any(token.type == "COMMENT" for token in tokens)


def _brackets(tokens: list[Token]) -> list[tuple[int, int]]:
    """The outermost brackets; a closer that comes first belongs to one that is written already."""
    found, opened = [], []
    for i, token in enumerate(tokens):
        if token.type in OPENERS:
            opened.append(i)
        elif token.type in CLOSERS and opened:
            start = opened.pop()
            found += [] if opened else [(start, i)]
    return found


def _items(tokens: list[Token]) -> list[Item]:
    """What stands between the commas of a bracket, each with the comment behind it."""
    items, current, depth = [], [], 0
    for i, token in enumerate(tokens):
        depth += (token.type in OPENERS) - (token.type in CLOSERS)
        if depth or token.type not in ("COMMA", "COMMENT"):
            current.append(token)
        elif token.type == "COMMA":
            items += [Item(current)] if current else []
            current = []
        else:
            if current and _ends_item(tokens, i):
                items.append(Item(current))
                current = []
            if not current and items and _behind(tokens, i, items[-1]):
                items[-1].comment = token.rstrip()
            else:
                items.append(Item([], token.rstrip()))
    return [*items, Item(current)] if current else items


def _ends_item(tokens: list[Token], i: int) -> bool:
    """Whether nothing but comments stands between `i` and a comma or the end."""
    rest = (token.type for token in tokens[i:] if token.type != "COMMENT")
    return next(rest, "COMMA") == "COMMA"


def _behind(tokens: list[Token], i: int, item: Item) -> bool:
    """Whether the comment at `i` stands on the line on which `item` ends."""
    return bool(item.tokens) and not item.comment and tokens[i].line == tokens[i - 1].line


def _written_items(items: list[Item], indent: int) -> list[tuple[str, str]]:
    """The lines between the brackets: one where all items fit on it, else one for each item."""
    if not any(item.comment or _has_comment(item.tokens) for item in items):
        together = " " * indent + ", ".join(flat(item.tokens) for item in items)
        if len(together) <= WIDTH:
            return [(together, "")]
    lines = []
    final = max((i for i, item in enumerate(items) if item.tokens), default=-1)
    for i, item in enumerate(items):
        if not item.tokens:
            lines.append(("", " " * indent + item.comment))
            continue
        *most, (last, _) = written(item.tokens, indent, more=1)
        lines += [*most, (last + ("," if i < final else ""), behind(item.comment))]
    return lines


def behind(comment: str) -> str:
    """A comment as it stands behind code."""
    return f"  {comment}" if comment else ""
