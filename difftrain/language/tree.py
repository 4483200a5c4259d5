"""The syntax tree: what a person wrote, and where.

Nodes compare by meaning: spans and the spelling of numbers are left out of equality, so
`parse(format(text)) == parse(text)` is the law that a formatter keeps.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True, eq=False)
class Source:
    """One file of text; `path` is what messages show."""

    path: str
    text: str

    @cached_property
    def starts(self) -> list[int]:
        """Offsets at which lines begin."""
        return [0, *(i + 1 for i, c in enumerate(self.text) if c == "\n")]

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column of an offset, both from 1."""
        line = bisect_right(self.starts, offset)
        return line, offset - self.starts[line - 1] + 1

    def line(self, number: int) -> str:
        """The text of a line (from 1), without its end."""
        start = self.starts[number - 1]
        end = self.starts[number] if number < len(self.starts) else len(self.text)
        return self.text[start:end].rstrip("\r\n")


@dataclass(frozen=True)
class Span:
    """A stretch of one source, as half-open offsets."""

    source: Source
    start: int
    end: int

    @property
    def text(self) -> str:
        return self.source.text[self.start : self.end]

    def __repr__(self) -> str:
        line, column = self.source.position(self.start)
        return f"{self.source.path}:{line}:{column}"


def _span():
    return field(compare=False, repr=False)


# ---- expressions


@dataclass(frozen=True)
class Number:
    value: float
    span: Span = _span()


@dataclass(frozen=True)
class Quantity:
    """A number with a unit or multiplier: `100k` is 100000 and `k`, `512px` is 512 and `px`."""

    value: float
    unit: str
    span: Span = _span()


@dataclass(frozen=True)
class Text:
    value: str
    span: Span = _span()


@dataclass(frozen=True)
class Name:
    """A dotted name; `path` holds its parts."""

    path: tuple[str, ...]
    span: Span = _span()

    @property
    def dotted(self) -> str:
        return ".".join(self.path)


@dataclass(frozen=True)
class Argument:
    """An argument of a call; `name` is None where it is given by position."""

    name: str | None
    value: Expr
    span: Span = _span()


@dataclass(frozen=True)
class Call:
    """`path(args)`; `head` is the span of the path alone."""

    path: tuple[str, ...]
    args: tuple[Argument, ...]
    span: Span = _span()
    head: Span = _span()

    @property
    def dotted(self) -> str:
        return ".".join(self.path)


@dataclass(frozen=True)
class ListOf:
    items: tuple[Expr, ...]
    span: Span = _span()


@dataclass(frozen=True)
class Interval:
    low: Expr
    high: Expr
    span: Span = _span()


@dataclass(frozen=True)
class If:
    test: Expr
    then: Expr
    other: Expr
    span: Span = _span()


@dataclass(frozen=True)
class Binary:
    """`left op right`, op one of + - * / ^ < <= > >= == !="""

    op: str
    left: Expr
    right: Expr
    span: Span = _span()


@dataclass(frozen=True)
class Negate:
    value: Expr
    span: Span = _span()


Expr = Number | Quantity | Text | Name | Call | ListOf | Interval | If | Binary | Negate


# ---- statements; `head` is the span of the defined name


@dataclass(frozen=True)
class Import:
    path: tuple[str, ...]
    alias: str | None
    span: Span = _span()


@dataclass(frozen=True)
class Formal:
    name: str
    domain: Expr | None
    default: Expr | None
    span: Span = _span()
    whole: bool = False  # its block lists it among what counts


@dataclass(frozen=True)
class Param:
    name: str
    domain: Expr | None
    default: Expr
    span: Span = _span()
    head: Span = _span()


@dataclass(frozen=True)
class Define:
    """`name = value`, or `name(formals) = value`, a function (formals is None for a quantity)."""

    name: str
    formals: tuple[Formal, ...] | None
    value: Expr
    span: Span = _span()
    head: Span = _span()


@dataclass(frozen=True)
class Redefine:
    """`name' = value`; `name` is without the prime."""

    name: str
    value: Expr
    span: Span = _span()
    head: Span = _span()


@dataclass(frozen=True)
class Draw:
    name: str
    law: Expr
    span: Span = _span()
    head: Span = _span()


@dataclass(frozen=True)
class Block:
    """`kind name(formals) from base { body }`; name and base may be missing."""

    kind: str
    name: str | None
    formals: tuple[Formal, ...]
    base: tuple[str, ...] | None
    body: tuple[Statement, ...]
    span: Span = _span()
    head: Span = _span()


@dataclass(frozen=True)
class Hole:
    """Where a broken statement stood; the block that followed it survives in `body`."""

    body: tuple[Statement, ...]
    span: Span = _span()


Statement = Import | Param | Define | Redefine | Draw | Block | Hole


@dataclass(frozen=True)
class Tree:
    """A whole file; `edition` is None where the first line does not say `diff N`."""

    edition: int | None
    body: tuple[Statement, ...]
    source: Source = field(compare=False, repr=False)
