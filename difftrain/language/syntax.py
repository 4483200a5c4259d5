"""Text to tree. Every text gives one; what is wrong with it is appended to `found`.

Recovery keeps what it can: a broken statement leaves a hole, its neighbours and the block that
follows it survive, and a line has at most one syntax finding.
"""

from __future__ import annotations

from lark import Token
from lark import Tree as Parsed
from lark.exceptions import UnexpectedToken

from difftrain.language.complaints import Scene, complaint, span
from difftrain.language.finding import Finding, Label
from difftrain.language.growing import Grower
from difftrain.language.lexing import (
    SEPARATORS,
    Placed,
    Unclosed,
    close_blocks,
    grammar,
    lay_out,
    lex,
    retyped,
    virtual,
)
from difftrain.language.tree import Source, Span, Tree

CODES = {
    "DIF001": "a file with nothing in it",
    "DIF002": "a file that is not text",
    "DIF003": "an edition of the language that is not known",
    "DIF004": "a character that means nothing in the language",
    "DIF005": "a character that is not ASCII",
    "DIF006": "a string that does not end",
    "DIF007": "a bracket that is not closed",
    "DIF008": "a block that is not closed",
    "DIF009": "a bracket that closes or opens nothing",
    "DIF010": "something that does not belong here",
    "DIF011": "a reserved word where a name belongs",
    "DIF012": "a primed name that is read",
    "DIF013": "an edition that does not come first",
    "DIF014": "two statements on one line",
    "DIF015": "a missing value",
    "DIF016": "a number that is not spelled as one",
    "DIF017": "an expression that is nested too deeply",
    "DIF018": "an escape that strings do not have",
    "DIF019": "a line that is no statement",
}


def parse(source: Source, found: list[Finding]) -> Tree:
    """The tree of a source, whatever its text."""
    tokens = lex(source.text)
    if nothing := _unreadable(source, tokens):
        found.append(nothing)
        return Tree(None, (), source)
    report = _Report(found)
    end = virtual("$END", "", len(source.text.rstrip()))
    tokens.append(virtual("_NL", "\n", end.start_pos))
    placed, unclosed = close_blocks(lay_out(tokens), end)
    for block in unclosed:
        report(_unclosed_block(source, block))
    return Grower(source, report).tree(_Drive(source, placed, report).run(end))


class _Report:
    """Appends syntax findings, one per line of a source."""

    def __init__(self, found: list[Finding]):
        self.found, self.lines = found, set()

    def __call__(self, finding: Finding) -> None:
        path, line, _ = finding.place
        if (path, line) not in self.lines:
            self.lines.add((path, line))
            self.found.append(finding)


def _unreadable(source: Source, tokens: list[Token]) -> Finding | None:
    text = source.text
    if "\0" in text or "\N{REPLACEMENT CHARACTER}" in text:
        return Finding(
            "DIF002",
            "this file is not text",
            Label(Span(source, 0, 0)),
            because="it holds bytes that no text has",
            help="give the path of a `.diff` file",
        )
    if all(token.type in ("_NL", "COMMA", "COMMENT") for token in tokens):
        return Finding(
            "DIF001",
            "this file has nothing in it",
            Label(Span(source, 0, 0)),
            help="write `diff 1`, `import std.sd` and an `objective`",
        )
    return None


def _unclosed_block(source: Source, block: Unclosed) -> Finding:
    opener, before = block
    if before.type == "$END":
        where, text = "the end of the file", "the file ends here"
    else:
        line, _ = source.position(before.start_pos)
        where, text = f"line {line}", "this line starts at the left margin again"
    return Finding(
        "DIF008",
        "expected `}` to close the `{` opened here",
        Label(span(source, opener), "never closed"),
        (Label(span(source, before), text),),
        help=f"write `}}` before {where}",
    )


class _Drive:
    """The parser's loop over one source, and how it gets going again after a bad token."""

    def __init__(self, source: Source, placed: list[Placed], report):
        self.source, self.placed, self.report = source, placed, report
        self.parser = grammar().parse_interactive()
        self.blocks: list[Token] = []
        self.first = 0  # index of the first token of the present statement
        kinds = [token.type for token, _ in placed]
        self.headless = kinds.count("RBRACE") - kinds.count("LBRACE")

    def run(self, end: Token) -> Parsed:
        """The parsed tree: tokens one by one, then the end."""
        i = next(i for i, (token, _) in enumerate(self.placed) if token.type != "_NL")
        while i < len(self.placed):
            token = self.placed[i].token
            try:
                self.feed(token)
                i += 1
            except UnexpectedToken:
                i = self.recover(i)
                continue
            if token.type in SEPARATORS:
                self.first = i
        while self.blocks:
            self.feed(virtual("RBRACE", "}", end.start_pos))
        return self.parser.feed_token(end)

    def feed(self, token: Token) -> None:
        self.parser.feed_token(token)
        match token.type:
            case "LBRACE":
                self.blocks.append(token)
            case "RBRACE":
                self.blocks.pop()

    def recover(self, i: int) -> int:
        """The index to go on from after the bad token at `i`; what it broke is now a hole."""
        token, opener = self.placed[i]
        accepts = frozenset(self.parser.accepts() - {"ERROR"})
        before = self.placed[i - 1].token if i else None
        block = self.blocks[-1] if self.blocks else None
        self.report(complaint(Scene(self.source, token, before, opener, block, accepts)))
        match token.type:
            case "UNCLOSED" if "STRING" in accepts:
                self.feed(retyped(token, "STRING"))
                return i + 1
            case "JUNK" | "FOREIGN" | "UNCLOSED" | "STRAY":
                return i + 1
        if "LBRACE" in accepts and self.headless > 0:
            self.headless -= 1
            self.feed(virtual("LBRACE", "{", token.start_pos))
            return i
        if "_NL" in accepts and "PARAM" not in accepts:
            self.feed(virtual("_NL", "\n", token.start_pos))
            self.first = i
            if self.starts_statement(i):
                return i
        return self.leave_hole(i)

    def starts_statement(self, i: int) -> bool:
        kinds = [token.type for token, _ in self.placed[i : i + 2]]
        return kinds[0] in ("IMPORT", "PARAM") or kinds in (
            ["NAME", "EQUAL"],
            ["NAME", "TILDE"],
            ["PRIMED", "EQUAL"],
        )

    def leave_hole(self, i: int) -> int:
        """Gives up the present statement, and the rest of it up to its end or its block."""
        stop = i
        while not self.ends_hole(self.placed[stop].token):
            stop += 1
        start = self.placed[min(self.first, i)].token.start_pos
        last = self.placed[max(stop - 1, self.first)].token
        state = self.parser.parser_state
        while "ERROR" not in self.parser.accepts():
            state.state_stack.pop()
            state.value_stack.pop()
        text = self.source.text[start : last.end_pos]
        self.feed(Token("ERROR", text, start_pos=start, end_pos=last.end_pos))
        return stop

    def ends_hole(self, token: Token) -> bool:
        return token.type in ("_NL", "LBRACE") or (token.type == "RBRACE" and bool(self.blocks))
