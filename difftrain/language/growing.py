"""From the parser's tree to ours: every rule of the grammar has one case here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from lark import Token
from lark import Tree as Parsed

from difftrain.language import tree as t
from difftrain.language.finding import Finding, Fix, Label

EDITION = 1
# Bound on how deep an expression may nest, so that every later stage may recurse.
DEEPEST = 150

UNITS = {
    "k": 1e3, "M": 1e6, "G": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
    "px": 1, "s": 1, "min": 60, "h": 3600,
}  # fmt: skip
ESCAPES = {'"': '"', "\\": "\\", "n": "\n", "t": "\t"}
OPERATORS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "^"}


@dataclass(frozen=True)
class Grower:
    """Turns parsed nodes into ours; `report` takes what only shows here."""

    source: t.Source
    report: Callable[[Finding], None]

    def tree(self, parsed: Parsed) -> t.Tree:
        match parsed.children:
            case [Parsed("edition", [number]), *rest]:
                edition = self.edition(number)
            case rest:
                edition = None
        return t.Tree(edition, self.body(rest), self.source)

    def edition(self, token: Token) -> int:
        number = int(self.number(token).value)
        if number != EDITION:
            self.refuse(
                "DIF003",
                f"edition {number} of the language is not known here",
                self.span(token),
                because=f"this difftrain reads edition {EDITION}",
                help=f"write `diff {EDITION}`, or use a difftrain that knows edition {number}",
            )
        return number

    def body(self, statements) -> tuple[t.Statement, ...]:
        return tuple(self.statement(node) for node in statements)

    def statement(self, node: Parsed) -> t.Statement:
        if _depth(node) > DEEPEST:
            self.refuse(
                "DIF017",
                f"this is nested more than {DEEPEST} levels deep",
                self.span(node.children[0]),
                help="give a part of it a name of its own, and use the name",
            )
            return t.Hole((), self.span(node))
        span = self.span(node)
        match node.data, node.children:
            case "import_", [path, alias]:
                return t.Import(_path(path), alias and str(alias), span)
            case "param", [name, domain, default]:
                domain = domain and self.expr(domain)
                return t.Param(str(name), domain, self.expr(default), span, self.span(name))
            case "define", [name, formals, value]:
                formals = None if formals is None else self.formals(formals)
                return t.Define(str(name), formals, self.expr(value), span, self.span(name))
            case "redefine", [name, value]:
                return t.Redefine(str(name)[:-1], self.expr(value), span, self.span(name))
            case "draw", [name, law]:
                return t.Draw(str(name), self.expr(law), span, self.span(name))
            case "block", [kind, name, formals, base, *body]:
                return t.Block(
                    str(kind),
                    name and str(name),
                    self.formals(formals) if formals is not None else (),
                    base and _path(base),
                    self.body(body),
                    span,
                    self.span(name or kind),
                )
            case "hole", [_, *body]:
                return t.Hole(self.body(node for node in body if node is not None), span)
        raise AssertionError(node.data)

    def formals(self, node: Parsed) -> tuple[t.Formal, ...]:
        return tuple(self.formal(formal) for formal in node.children if formal is not None)

    def formal(self, node: Parsed) -> t.Formal:
        name, domain, default = node.children
        domain, default = domain and self.expr(domain), default and self.expr(default)
        return t.Formal(str(name), domain, default, self.span(node))

    def expr(self, node: Parsed) -> t.Expr:
        span = self.span(node)
        match node.data, node.children:
            case "number", [token]:
                return self.number(token)
            case "quantity", [token]:
                number, unit = re.fullmatch(r"([\d.]+)(\w+)", token).groups()
                return t.Quantity(float(number) * UNITS[unit], unit, span)
            case "string", [token]:
                return t.Text(self.text(token), span)
            case "ref", [Token("PRIMED") as token]:
                return self.primed(token)
            case "ref", names:
                return t.Name(tuple(map(str, names)), span)
            case "call", [path, *arguments]:
                given = tuple(self.argument(node) for node in arguments if node is not None)
                return t.Call(_path(path), given, span, self.span(path))
            case "list", items:
                return t.ListOf(tuple(self.expr(item) for item in items if item is not None), span)
            case "interval", [low, high]:
                return t.Interval(self.expr(low), self.expr(high), span)
            case "choice", [test, then, other]:
                return t.If(self.expr(test), self.expr(then), self.expr(other), span)
            case "neg", [value]:
                return t.Negate(self.expr(value), span)
            case "compare", [left, op, right]:
                return t.Binary(str(op), self.expr(left), self.expr(right), span)
            case operator, [left, right]:
                return t.Binary(OPERATORS[operator], self.expr(left), self.expr(right), span)
        raise AssertionError(node.data)

    def argument(self, node: Parsed) -> t.Argument:
        name, value = node.children
        return t.Argument(name and str(name), self.expr(value), self.span(node))

    def number(self, token: Token) -> t.Number:
        value = float(token)
        if math.isinf(value):
            self.refuse(
                "DIF016",
                "this number is too large",
                self.span(token),
                because="numbers go up to about 1.8e308",
                help="write a smaller number",
            )
            value = 0.0
        return t.Number(value, self.span(token))

    def text(self, token: Token) -> str:
        return re.sub(r"\\(.)", lambda match: self.escape(token, match), token[1:-1])

    def escape(self, token: Token, match: re.Match) -> str:
        letter = match[1]
        if letter not in ESCAPES:
            start = token.start_pos + 1 + match.start()
            self.refuse(
                "DIF018",
                f"`\\{letter}` means nothing in a string",
                t.Span(self.source, start, start + 2),
                because='a string knows \\", \\\\, \\n and \\t',
                help="write `\\\\` for a backslash, or `/` between folders",
            )
        return ESCAPES.get(letter, letter)

    def primed(self, token: Token) -> t.Name:
        name = str(token)[:-1]
        self.refuse(
            "DIF012",
            f"`{token}` cannot be read, it is only written on the left of `=`",
            self.span(token),
            because=f"`{name}` is its newest value, inside `{token} = ...` the one before",
            help=f"write `{name}`",
            fix=Fix(self.span(token), name),
        )
        return t.Name((name,), self.span(token))

    def refuse(self, code: str, message: str, at: t.Span, **more) -> None:
        self.report(Finding(code, message, Label(at), **more))

    def span(self, node: Parsed | Token) -> t.Span:
        place = node if isinstance(node, Token) else node.meta
        return t.Span(self.source, place.start_pos, place.end_pos)


def _path(node: Parsed) -> tuple[str, ...]:
    return tuple(map(str, node.children))


def _depth(node: Parsed) -> int:
    """How deep a node nests, counted without recursion and no further than needed."""
    level, depth = [node], 0
    while level and depth <= DEEPEST:
        level = [child for n in level if isinstance(n, Parsed) for child in n.children]
        depth += 1
    return depth
