"""The one layout of a spec. It keeps what is said: comments, number spellings, single blank lines.

Rows are read from the tokens, laid out as lines, and then the `=`, the `{` and the comments of
adjacent lines are aligned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import groupby

from lark import Token

from difftrain.language.finding import Finding
from difftrain.language.lexing import lex
from difftrain.language.syntax import parse
from difftrain.language.tree import Source
from difftrain.language.wrapping import CLOSERS, INDENT, OPENERS, WIDTH, behind, flat, written


def format_text(source: Source) -> str:
    """The text of a source in the one layout; text with syntax findings is left as it is."""
    found: list[Finding] = []
    parse(source, found)
    if found:
        return source.text
    lines = _lines(_Reader(lex(source.text)).rows(), 0)
    lines = _aligned(lines, lambda line: line.pivot and line.kind, _to_pivot)
    lines = _aligned(lines, _has_comment, _to_comment)
    return "".join(f"{line.text}{line.comment}".rstrip() + "\n" for line in lines)


# ---- rows, as they were written


@dataclass
class Statement:
    """The tokens of a statement or of a block's head, with the rows of its body."""

    tokens: list[Token]
    body: list[Row] | None = None
    opening: str = ""  # the comment right behind the `{`
    spread: bool = False  # written on several lines


@dataclass
class Row:
    """Statements that stand on one line, and its comment; without either, a blank line."""

    statements: list[Statement] = field(default_factory=list)
    comment: str = ""

    @property
    def blank(self) -> bool:
        return not self.statements and not self.comment


class _Reader:
    """Reads rows from tokens that have no syntax findings."""

    def __init__(self, tokens: list[Token]):
        self.tokens, self.next = tokens, 0

    def take(self) -> Token | None:
        self.next += 1
        return self.tokens[self.next - 1] if self.next <= len(self.tokens) else None

    def rows(self) -> list[Row]:
        """The rows up to the `}` that ends the block, or to the end."""
        rows, row, tokens = [], Row(), []
        while (token := self.take()) is not None and token.type != "RBRACE":
            match token.type:
                case "COMMENT":
                    row.comment = token.rstrip()
                case "LBRACE":
                    row.statements.append(self.block(tokens))
                    tokens = []
                case "_NL" | "COMMA":
                    row.statements += [Statement(tokens)] if tokens else []
                    tokens = []
                    if token.type == "_NL":
                        rows.append(row)
                        row = Row()
                case _:
                    tokens += [token, *(self.bracket() if token.type in OPENERS else [])]
        row.statements += [Statement(tokens)] if tokens else []
        return _single_blanks([*rows, row])

    def bracket(self) -> list[Token]:
        """The rest of a bracket, with its comments and without its newlines."""
        tokens, depth = [], 1
        while depth:
            token = self.take()
            depth += (token.type in OPENERS) - (token.type in CLOSERS)
            tokens += [token] if token.type != "_NL" else []
        return tokens

    def block(self, head: list[Token]) -> Statement:
        start, opening = self.next, ""
        if self.tokens[start].type == "COMMENT":
            opening = self.take().rstrip()
        body = self.rows()
        spread = any(token.type == "_NL" for token in self.tokens[start : self.next])
        return Statement(head, body, opening, spread and bool(body or opening))


def _single_blanks(rows: list[Row]) -> list[Row]:
    """The rows without blank ones at either end or behind another."""
    kept: list[Row] = []
    for row in rows:
        if not row.blank or (kept and not kept[-1].blank):
            kept.append(row)
    return kept[:-1] if kept and kept[-1].blank else kept


# ---- lines, as they will be written


@dataclass(frozen=True)
class Line:
    """A line; neighbours of one kind share the column of their `pivot`, an `=` or a `{`."""

    text: str
    comment: str = ""
    kind: str = ""
    pivot: int = 0


def _lines(rows: list[Row], indent: int) -> list[Line]:
    return [line for row in rows for line in _row(row, indent)]


def _row(row: Row, indent: int) -> list[Line]:
    if not row.statements:
        return [Line("", " " * indent + row.comment)]
    texts = [_on_one_line(statement) for statement in row.statements]
    joined = ", ".join(text or "" for text in texts)
    if all(texts) and indent + len(joined) <= WIDTH:
        kind, pivot = _pivot(row.statements[0], indent)
        return [Line(" " * indent + joined, behind(row.comment), kind, indent + pivot)]
    if len(row.statements) > 1:
        *most, last = (Row([statement]) for statement in row.statements)
        return _lines([*most, replace(last, comment=row.comment)], indent)
    return _spread(row.statements[0], row.comment, indent)


def _on_one_line(statement: Statement) -> str | None:
    """The statement on one line, or None where it has to take several."""
    if statement.spread or any(token.type == "COMMENT" for token in statement.tokens):
        return None
    head = flat(statement.tokens)
    if statement.body is None:
        return head
    inside = [_on_one_line(inner) for row in statement.body for inner in row.statements]
    if None in inside:
        return None
    return f"{head} {{ {', '.join(inside)} }}" if inside else f"{head} {{ }}"


def _spread(statement: Statement, comment: str, indent: int) -> list[Line]:
    """The lines of a statement that takes several."""
    more = 0 if statement.body is None else 4
    *most, (last, _) = written(statement.tokens, indent, more)
    lines = [Line(text, said) for text, said in most]
    if statement.body is None:
        return [*lines, Line(last, behind(comment))]
    if not (statement.body or statement.opening):
        return [*lines, Line(f"{last} {{ }}", behind(comment))]
    head = Line(f"{last} {{", behind(statement.opening), "head")
    body = _lines(_one_a_row(statement), indent + INDENT)
    return [*lines, head, *body, Line(" " * indent + "}", behind(comment))]


def _one_a_row(block: Statement) -> list[Row]:
    """The rows of a block; those of one that stood on one line get a line each."""
    if block.spread:
        return block.body
    return [Row([statement]) for row in block.body for statement in row.statements]


def _pivot(statement: Statement, indent: int) -> tuple[str, int]:
    """What a line is aligned by, and at which column of its statement that stands."""
    if statement.body == []:
        return "", 0
    if statement.body is not None:
        head = statement.tokens
        named = len(head) > 1 and head[1].type == "NAME"
        return str(head[0]) if named else "block", len(flat(head)) + 1
    depth = 0
    for i, token in enumerate(statement.tokens):
        depth += (token.type in OPENERS) - (token.type in CLOSERS)
        if token.type == "EQUAL" and not depth and indent:
            return "=", len(flat(statement.tokens[:i])) + 1
    return "", 0


# ---- alignment


def _aligned(
    lines: list[Line], kind: Callable[[Line], object], align: Callable[[list[Line]], list[Line]]
) -> list[Line]:
    """The lines with every run of neighbours of one kind aligned, where all still fit."""
    result: list[Line] = []
    for wanted, group in groupby(lines, key=kind):
        run = list(group)
        moved = align(run) if wanted else run
        result += moved if all(map(_fits, run, moved)) else run
    return result


def _has_comment(line: Line) -> bool:
    return bool(line.text and line.comment) and line.kind != "head"


def _fits(old: Line, new: Line) -> bool:
    """Whether a line is within the width, or was too long already."""
    return len(new.text + new.comment) <= WIDTH or len(old.text + old.comment) > WIDTH


def _to_pivot(run: list[Line]) -> list[Line]:
    column = max(line.pivot for line in run)
    return [
        replace(line, text=f"{line.text[: line.pivot]:{column}}{line.text[line.pivot :]}")
        for line in run
    ]


def _to_comment(run: list[Line]) -> list[Line]:
    column = max(len(line.text) for line in run)
    return [replace(line, text=f"{line.text:{column}}") for line in run]
