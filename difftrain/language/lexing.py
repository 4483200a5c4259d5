"""Text to tokens, and what newlines, commas and unclosed braces mean before the rules see them."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources.abc import Traversable
from typing import NamedTuple

import lark
from lark import Lark, Token
from lark.grammar import Rule
from lark.lexer import LexerThread, TerminalDef

from difftrain import shipped

SEPARATORS = frozenset({"_NL", "LBRACE", "RBRACE"})
OPERATORS = frozenset({"PLUS", "MINUS", "STAR", "SLASH", "CIRCUMFLEX", "COMPARE", "DOTS"})


# ---- the grammar, from the tables that the wheel carries or from its text


def tables(text: str) -> str:
    """The parser's tables for a grammar, as JSON."""
    data, memo = _compiled(text).memo_serialize([TerminalDef, Rule])
    stored = {"lark": lark.__version__, "data": data, "memo": memo}
    return json.dumps(stored, sort_keys=True, separators=(",", ":"))


@cache
def grammar() -> Lark:
    """The parser of `.diff`; 5 ms from the tables, about 100 ms where they were not built."""
    grammars = shipped.folder("grammars")
    return _stored(grammars / "diff.json") or _compiled((grammars / "diff.lark").read_text("utf-8"))


def _stored(path: Traversable) -> Lark | None:
    """The parser from its tables, if they are there and this lark wrote them."""
    if not path.is_file():
        return None
    stored = json.loads(path.read_text("utf-8"), object_pairs_hook=_numbered)
    if stored["lark"] != lark.__version__:
        return None
    return Lark._load_from_dict(stored["data"], stored["memo"])


def _compiled(text: str) -> Lark:
    return Lark(text, parser="lalr", lexer="basic", propagate_positions=True)


def _numbered(pairs) -> dict:
    """A JSON object whose keys are numbers again: states and symbols are counted."""
    return {int(key) if key.isdigit() else key: value for key, value in pairs}


def lex(text: str) -> list[Token]:
    """Every token of a text, comments and newlines too; no text is refused."""
    return list(LexerThread.from_text(grammar().parser.lexer, text).lex(None))


# ---- layout


class Placed(NamedTuple):
    """A token and the innermost ( or [ that is open before it."""

    token: Token
    opener: Token | None


def lay_out(tokens: list[Token]) -> list[Placed]:
    """The tokens that the rules see: no comments, no newlines in brackets, commas as newlines."""
    code = [part for token in tokens if token.type != "COMMENT" for part in _saved_brace(token)]
    opened: list[Token] = []
    placed: list[Placed] = []
    for i, token in enumerate(code):
        if token.type == "_NL" and opened and not _ends_brackets(code, i):
            continue
        if token.type == "COMMA" and not opened:
            token = retyped(token, "_NL")
        placed.append(Placed(token, opened[-1] if opened else None))
        _track(opened, token)
    return placed


def _saved_brace(token: Token) -> list[Token]:
    """The token; a string that swallowed the `{` at the end of its line gives it back."""
    text = token.rstrip()
    if token.type != "UNCLOSED" or not text.endswith("{"):
        return [token]
    at = token.start_pos + len(text) - 1
    brace = Token("LBRACE", "{", start_pos=at, end_pos=at + 1)
    return [Token("UNCLOSED", text[:-1], start_pos=token.start_pos, end_pos=at), brace]


def _track(opened: list[Token], token: Token) -> None:
    match token.type:
        case "LPAR" | "LSQB":
            opened.append(token)
        case "RPAR" | "RSQB":
            del opened[-1:]
        case "_NL" | "LBRACE" | "RBRACE":
            opened.clear()


def _ends_brackets(code: list[Token], i: int) -> bool:
    """Whether what follows a newline inside brackets is a new statement: a bracket is missing."""
    rest = (token.type for token in code[i + 1 : i + 40] if token.type != "_NL")
    match next(rest, "$END"), next(rest, "$END"):
        case ("IMPORT" | "PARAM" | "RBRACE" | "$END", _) | ("PRIMED", "EQUAL"):
            return True
        case "NAME", "TILDE" | "NAME" | "LBRACE":
            return True
        case "NAME", "EQUAL":
            return code[i - 1].type not in ("LPAR", "LSQB", "COMMA", "_NL")
    return False


def retyped(token: Token, kind: str) -> Token:
    """The same stretch of text as another kind of token."""
    return Token(kind, str(token), start_pos=token.start_pos, end_pos=token.end_pos)


def virtual(kind: str, text: str, at: int) -> Token:
    """A token that nobody wrote, at an offset."""
    return Token(kind, text, start_pos=at, end_pos=at)


# ---- braces: as many `}` as `{`, with the odd ones out marked as strays


class Unclosed(NamedTuple):
    """A `{` that nothing closes, and the token before which its `}` is missing."""

    opener: Token
    before: Token


def close_blocks(placed: list[Placed], end: Token) -> tuple[list[Placed], list[Unclosed]]:
    """The tokens with every block closed; a line at the left margin ends what is still open."""
    kinds = [token.type for token, _ in placed]
    excess = kinds.count("LBRACE") - kinds.count("RBRACE")
    if excess < 0:
        return _without_closers(placed, -excess), []
    if excess > 0:
        placed = _without_openers(placed, excess)
    return _closed_at_margin(placed, end) if _left_open(placed) else (placed, [])


def _without_closers(placed: list[Placed], excess: int) -> list[Placed]:
    """The tokens with up to `excess` of the `}` that stand within a statement marked as strays."""
    result = list(placed)
    for i, (token, opener) in enumerate(placed):
        if token.type == "RBRACE" and excess and _within_statement(placed, i):
            result[i] = Placed(retyped(token, "STRAY"), opener)
            excess -= 1
    return result


def _within_statement(placed: list[Placed], i: int) -> bool:
    after = placed[i + 1].token.type if i + 1 < len(placed) else "_NL"
    before = placed[i - 1].token.type if i else "_NL"
    return (
        placed[i].opener is not None
        or after not in ("_NL", "RBRACE")
        or before in ("EQUAL", "TILDE", *OPERATORS)
    )


def _without_openers(placed: list[Placed], excess: int) -> list[Placed]:
    """The tokens with up to `excess` of the `{` that head no block marked as strays."""
    result, statement = [], []
    for token, opener in placed:
        if token.type == "LBRACE" and excess and not _heads_block(statement):
            token, excess = retyped(token, "STRAY"), excess - 1
        statement = [] if token.type in SEPARATORS else [*statement, Placed(token, opener)]
        result.append(Placed(token, opener))
    return result


def _heads_block(statement: list[Placed]) -> bool:
    outside = [token.type for token, opener in statement if opener is None]
    return bool(outside) and not {"EQUAL", "TILDE"} & set(outside)


def _left_open(placed: list[Placed]) -> list[Token]:
    """Every `{` that no `}` closes."""
    opened: list[Token] = []
    for token, _ in placed:
        _match_brace(opened, token)
    return opened


def _match_brace(opened: list[Token], token: Token) -> None:
    if token.type == "LBRACE":
        opened.append(token)
    elif token.type == "RBRACE":
        del opened[-1:]


def _closed_at_margin(placed: list[Placed], end: Token) -> tuple[list[Placed], list[Unclosed]]:
    opened: list[Token] = []
    result: list[Placed] = []
    unclosed: list[Unclosed] = []
    for token, opener in [*placed, Placed(end, None)]:
        margin = token.column == 1 and token.type not in ("_NL", "RBRACE")
        while opened and (margin or token is end):
            unclosed.append(Unclosed(opened.pop(), token))
            result.append(Placed(virtual("RBRACE", "}", token.start_pos), None))
            result.append(Placed(virtual("_NL", "\n", token.start_pos), None))
        _match_brace(opened, token)
        result.append(Placed(token, opener))
    return result[:-1], unclosed
