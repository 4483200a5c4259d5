"""What the syntax says when something else was expected: the first cause that fits."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from lark import Token

from difftrain.language.finding import Finding, Fix, Label
from difftrain.language.lexing import OPERATORS
from difftrain.language.tree import Source, Span

RESERVED = ("diff", "import", "as", "param", "in", "from", "if", "then", "else")

# What people type or paste for a sign or a name that the language spells in ASCII.
ASCII = {
    "×": "*", "·": "*", "∗": "*", "−": "-", "–": "-", "—": "-", "÷": "/", "≤": "<=", "≥": ">=",
    "≠": "!=", "∼": "~", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"', "…": "..", "²": "^2",
    "³": "^3", "√": "sqrt", "π": "pi", "α": "alpha", "σ": "sigma", "ε": "eps", "ϵ": "eps",
    "λ": "logsnr", "γ": "gamma", "β": "beta", "\N{NO-BREAK SPACE}": " ", "\ufeff": "",
}  # fmt: skip

BOTH = "write `if a then b else false` for both of two conditions"
EITHER = "write `if a then true else b` for either of two conditions"

# What other languages write, and what is written here.
INSTEAD = {
    "'": 'write `"` around a string, and a prime right behind the name on the left of `=`',
    ":": "write `=` to define, or `in` to give a range",
    ";": "put the next statement on its own line, or write `,` between the two",
    "%": "there is no remainder here; delete `%`",
    "&": BOTH,
    "|": EITHER,
    "!": "write `!=` for different",
    "\\": "delete `\\`; inside ( ) and [ ] a line simply goes on",
    "$": "write the name of a `param` without `$`",
}

KINDS = {
    "EQUAL": "`=`", "TILDE": "`~`", "LPAR": "`(`", "RPAR": "`)`", "LSQB": "`[`", "RSQB": "`]`",
    "LBRACE": "`{`", "RBRACE": "`}`", "COMMA": "`,`", "DOT": "`.`", "FROM": "`from`", "AS": "`as`",
    "IN": "`in`", "THEN": "`then`", "ELSE": "`else`", "IMPORT": "`import`", "INT": "a whole number",
}  # fmt: skip
VALUE = {"NUMBER", "INT", "QUANTITY", "STRING", "LSQB", "LPAR", "MINUS", "IF", "NAME", "PRIMED"}
ENDS = {"_NL", "RBRACE", "$END"}
CLOSERS = {"LPAR": "RPAR", "LSQB": "RSQB"}
OPENING = {")": "(", "]": "[", "}": "{"}


@dataclass(frozen=True)
class Scene:
    """A token that cannot stand where it stands, and what the rules know about the place."""

    source: Source
    token: Token
    before: Token | None  # the token in front of it
    opener: Token | None  # the ( or [ that is open there
    block: Token | None  # the { that is open there
    accepts: frozenset[str]

    @property
    def kind(self) -> str:
        return self.token.type

    @property
    def starts(self) -> bool:
        """Whether a statement would start here."""
        return "PARAM" in self.accepts

    @property
    def at(self) -> Span:
        """The token, or the end of what stands before it where a line or the file ends."""
        if self.kind in ("_NL", "$END") and self.before is not None:
            return Span(self.source, self.before.end_pos, self.before.end_pos)
        return span(self.source, self.token)

    def finding(self, code, message, text="", also=(), **more) -> Finding:
        return Finding(code, message, Label(self.at, text), tuple(also), **more)


def span(source: Source, token: Token) -> Span:
    return Span(source, token.start_pos, token.end_pos)


def complaint(scene: Scene) -> Finding:
    """The finding for a token that no rule takes."""
    return next(found for cause in CAUSES if (found := cause(scene)))


def _quoted(token: Token | None) -> str:
    """A token as a message shows it."""
    match token.type if token is not None else "$END":
        case "_NL":
            return "`,`" if token == "," else "the end of the line"
        case "$END":
            return "the end of the file"
    text = str(token)
    return f"`{text if len(text) <= 24 else text[:21] + '...'}`"


# ---- characters


def _foreign(scene: Scene) -> Finding | None:
    if scene.kind != "FOREIGN":
        return None
    text = str(scene.token)
    name = unicodedata.name(text[0], "character that has no name").lower()
    shown = f"`{text[:12]}`" if text[0].isprintable() else f"a hidden {name}"
    plain = "".join(ASCII.get(c, "?") for c in text)
    known = "?" not in plain
    return scene.finding(
        "DIF005",
        f"{shown} is not ASCII",
        because=f"source is ASCII, and this {'is' if len(text) == 1 else 'starts with'} the {name}",
        help=_spelled(plain) if known else "spell it with the letters a to z",
        fix=Fix(scene.at, plain) if known else None,
    )


def _spelled(plain: str) -> str:
    if plain.strip():
        return f"write `{plain}`"
    return "write a plain space" if plain else "delete it"


def _junk(scene: Scene) -> Finding | None:
    if scene.kind != "JUNK":
        return None
    text = str(scene.token)
    if text == "'":
        message = "this `'` is neither a prime nor a quote"
    elif text.isprintable():
        message = f"`{text}` means nothing in this language"
    else:
        message = f"the control character {ord(text)} means nothing in this language"
    return scene.finding("DIF004", message, help=INSTEAD.get(text, "delete it"))


def _unclosed_string(scene: Scene) -> Finding | None:
    if scene.kind != "UNCLOSED":
        return None
    return scene.finding(
        "DIF006",
        "this string does not end on its line",
        because="a string starts and ends on one line",
        help='close it with `"`',
    )


# ---- brackets


def _closes_nothing(scene: Scene) -> Finding | None:
    match scene.kind:
        case "RPAR" | "RSQB" if scene.opener is None:
            pass
        case "RBRACE" if scene.block is None:
            pass
        case "STRAY" if scene.token == "}":
            pass
        case _:
            return None
    text = str(scene.token)
    advice = f"delete `{text}`, or write the `{OPENING[text]}` that it closes"
    return scene.finding("DIF009", f"`{text}` closes nothing", help=advice)


def _opens_nothing(scene: Scene) -> Finding | None:
    if scene.kind not in ("STRAY", "LBRACE") or not ({"_NL", "NUMBER"} & scene.accepts):
        return None
    message = "`{` stands behind no block's name"
    return scene.finding("DIF009", message, help="delete `{`, or write `kind name {`")


def _unclosed_bracket(scene: Scene) -> Finding | None:
    opener = scene.opener
    if opener is None or CLOSERS[opener.type] not in scene.accepts:
        return None
    if scene.kind not in (*ENDS, "LBRACE", "RPAR", "RSQB"):
        return None
    closer = ")" if opener == "(" else "]"
    return scene.finding(
        "DIF007",
        f"expected `{closer}` to close the `{opener}` opened here",
        f"`{closer}` is missing",
        [Label(span(scene.source, opener), "opened here")],
        help=f"write `{closer}` {_where(scene)}",
    )


def _where(scene: Scene) -> str:
    place = "at" if scene.at.start == scene.at.end else "before"
    return f"{place} {_quoted(scene.token)}"


# ---- names and values


def _expects_value(scene: Scene) -> bool:
    return "NUMBER" in scene.accepts


def _edition_late(scene: Scene) -> Finding | None:
    if scene.kind != "DIFF" or not scene.starts:
        return None
    message = "`diff` and the edition come before everything else"
    return scene.finding("DIF013", message, help="move this line to the top of the file")


def _half_condition(scene: Scene) -> Finding | None:
    if scene.kind not in ("THEN", "ELSE") or {"THEN", "ELSE"} & scene.accepts:
        return None
    text = str(scene.token)
    if scene.before is not None and scene.before.type in ("IF", "THEN"):
        message = f"a value is missing between `{scene.before}` and `{text}`"
        return scene.finding("DIF015", message, help=f"write what stands before `{text}`")
    return scene.finding(
        "DIF010", f"`{text}` belongs to an `if` before it", help="write `if a then b else c`"
    )


def _reserved(scene: Scene) -> Finding | None:
    text = str(scene.token)
    named = "NAME" in scene.accepts
    if text not in RESERVED or not named or (scene.starts and scene.kind in ("IMPORT", "PARAM")):
        return None
    return scene.finding(
        "DIF011",
        f"`{text}` is a word of the language and cannot be a name",
        because="reserved words: " + ", ".join(RESERVED),
        help=f"choose another name, such as `{text}_`",
    )


def _value_missing(scene: Scene) -> Finding | None:
    if scene.kind not in (*ENDS, "RPAR", "RSQB", "COMMA") or not _expects_value(scene):
        return None
    return scene.finding(
        "DIF015",
        f"a value is missing after {_quoted(scene.before)}",
        help=f"write an expression after {_quoted(scene.before)}, or delete it",
    )


def _lone_operator(scene: Scene) -> Finding | None:
    if scene.kind not in OPERATORS | {"DOT", "EQUAL"} or not _expects_value(scene):
        return None
    found, before = _quoted(scene.token), _quoted(scene.before)
    if scene.kind == "STAR" and before == "`*`":
        both = Span(scene.source, scene.before.start_pos, scene.token.end_pos)
        return scene.finding(
            "DIF010", "`**` is no operator", help="write `^` for a power", fix=Fix(both, "^")
        )
    if scene.kind == "DOT":
        return scene.finding(
            "DIF016", "a number starts with a digit", help="write a `0` before the point"
        )
    message = f"a value is missing between {before} and {found}"
    return scene.finding("DIF015", message, help=f"write a value before {found}, or delete {found}")


def _unit(scene: Scene) -> Finding | None:
    before = scene.before
    number = before is not None and before.type in ("INT", "NUMBER", "QUANTITY")
    if not number or scene.kind not in ("NAME", "INT", "NUMBER", "QUANTITY", "DOT"):
        return None
    if before.end_pos != scene.token.start_pos:
        return None
    if scene.kind == "DOT" and before.type != "INT":
        return scene.finding("DIF016", "a number has one point", help="delete this one")
    if scene.kind == "DOT":
        return scene.finding(
            "DIF016", f"`{before}.` has no digit after its point", help=f"write `{before}.0`"
        )
    return scene.finding(
        "DIF016",
        f"`{scene.token}` is no unit",
        because="units are k, M, G, KiB, MiB, GiB, px, s, min and h",
        help=f"write a unit, or `{before} * {scene.token}`",
    )


# ---- statements


def _cannot_start(scene: Scene) -> Finding | None:
    if not scene.starts:
        return None
    return scene.finding(
        "DIF019",
        f"a statement cannot start with {_quoted(scene.token)}",
        help="write `name = value`, `name ~ law`, `name' = value` or `kind name { ... }`",
    )


def _not_a_statement(scene: Scene) -> Finding | None:
    """A name that is followed by nothing that makes a statement of it."""
    if not {"EQUAL", "LBRACE"} & scene.accepts or scene.before is None:
        return None
    if scene.token == "==" and "EQUAL" in scene.accepts:
        return scene.finding(
            "DIF010", "`==` compares, it does not define", help="write `=`", fix=Fix(scene.at, "=")
        )
    if scene.kind == "DOT":
        message = "a name that is defined has no `.` in it"
        return scene.finding("DIF019", message, help="write one word on the left of `=`")
    wanted, advice = _continuation(scene)
    found = f", found {_quoted(scene.token)}" if scene.kind not in ENDS else ""
    message = f"expected {wanted} after {_quoted(scene.before)}{found}"
    return scene.finding("DIF019", message, help=advice)


def _continuation(scene: Scene) -> tuple[str, str]:
    """What makes a statement of the words so far, and how to write it."""
    word = scene.before
    if "TILDE" in scene.accepts:
        return "`=`, `~` or `{`", f"write `{word} = value`, `{word} ~ law` or `{word} name {{`"
    if "LBRACE" in scene.accepts and "EQUAL" in scene.accepts:
        return "`=` or `{`", "write `=` and the function's value, or `{` and the block's statements"
    if "LBRACE" in scene.accepts:
        return "`{`", "write `{` and the block's statements, up to its `}`"
    return "`=`", "write `=` and a value"


def _second_statement(scene: Scene) -> Finding | None:
    if "_NL" not in scene.accepts or scene.kind not in ("NAME", "PRIMED", "IMPORT", "PARAM"):
        return None
    if scene.token in ("and", "or"):
        advice = BOTH if scene.token == "and" else EITHER
        return scene.finding("DIF010", f"`{scene.token}` is no operator", help=advice)
    return scene.finding(
        "DIF014",
        f"expected an operator or a new line before {_quoted(scene.token)}",
        help=f"put `{scene.token}` on its own line, or write an operator or `,` before it",
    )


def _goes_on(scene: Scene) -> Finding | None:
    """A finished statement that is followed by something else."""
    if "_NL" not in scene.accepts:
        return None
    found = _quoted(scene.token)
    match scene.kind:
        case "EQUAL":
            message, advice = "a statement has one `=`", "compare with `==`, or use two statements"
        case "COMPARE":
            message = f"comparisons do not chain, found a second one, {found}"
            advice = "write `if a < b then b < c else false`"
        case "LSQB":
            message, advice = "`[` opens a list, not an index", "write `pick(table, i)`"
        case _:
            message = f"expected an operator or the end of the line, found {found}"
            advice = f"delete {found}, or write an operator before it"
    return scene.finding("DIF010", message, help=advice)


def _in_brackets(scene: Scene) -> Finding | None:
    opener = scene.opener
    if opener is None or CLOSERS[opener.type] not in scene.accepts:
        return None
    closer = KINDS[CLOSERS[opener.type]]
    separator = "`,`" if "COMMA" in scene.accepts else "an operator"
    if _expects_value(scene) or "COMMA" not in scene.accepts and "NAME" in scene.accepts:
        separator = _wanted(scene.accepts & {"NAME", *VALUE})
    found = _quoted(scene.token)
    return scene.finding(
        "DIF010",
        f"expected {separator} or {closer} after {_quoted(scene.before)}, found {found}",
        also=[Label(span(scene.source, opener), "opened here")],
        help=f"write {separator} before {found}, or delete {found}",
    )


def _otherwise(scene: Scene) -> Finding:
    found, wanted = _quoted(scene.token), _wanted(scene.accepts)
    after = f" after {_quoted(scene.before)}" if scene.before is not None else ""
    return scene.finding(
        "DIF010", f"expected {wanted}{after}, found {found}", help=f"write {wanted}{after}"
    )


def _wanted(accepts: frozenset[str]) -> str:
    """What may stand here, in words."""
    left = set(accepts)
    words = []
    for whole, word in ((VALUE, "a value"), (OPERATORS - {"DOTS", "COMPARE"}, "an operator")):
        if whole <= left:
            words.append(word)
            left -= {*whole, "LPAR"}
    words += ["a name"] if "NAME" in left else []
    words += [text for kind, text in KINDS.items() if kind in left and kind != "DOT"]
    words += ["the end of the line"] if "_NL" in left else []
    *most, last = words or ["something else"]
    return f"{', '.join(most)} or {last}" if most else last


CAUSES = (
    _foreign,
    _junk,
    _unclosed_string,
    _closes_nothing,
    _opens_nothing,
    _unclosed_bracket,
    _edition_late,
    _half_condition,
    _reserved,
    _unit,
    _value_missing,
    _lone_operator,
    _cannot_start,
    _in_brackets,
    _not_a_statement,
    _second_statement,
    _goes_on,
    _otherwise,
)
