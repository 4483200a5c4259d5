"""Findings as people, GitHub and programs read them; always in order of place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

from difftrain.language.finding import Finding, Label
from difftrain.language.tree import Span

STYLES = {"error": "1;31", "warning": "1;33", "note": "1;36", "frame": "1;34", "message": "1"}
COMMANDS = {"error": "error", "warning": "warning", "note": "notice"}

Paint = Callable[[str, str], str]


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """The findings by file, line and column."""
    return sorted(findings, key=lambda f: (*f.place, f.code, f.message))


# ---- for people


def render(findings: Iterable[Finding], color: bool = False) -> str:
    """The findings with the lines they point at, one paragraph each."""
    paint = _colored if color else _plain
    shown = ["\n".join(_paragraph(finding, paint)) + "\n" for finding in in_order(findings)]
    return "\n".join(shown)


def _plain(text: str, style: str) -> str:
    return text


def _colored(text: str, style: str) -> str:
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m"


def _paragraph(finding: Finding, paint: Paint) -> Iterator[str]:
    labels = [finding.at, *finding.also]
    width = max(len(str(_place(label.span)[0])) for label in labels)
    margin = " " * width
    head = paint(f"{finding.severity}[{finding.code}]", finding.severity)
    yield head + paint(f": {_shown(finding.message)}", "message")
    for path in dict.fromkeys(label.span.source.path for label in labels):
        here = [label for label in labels if label.span.source.path == path]
        line, column = _place(here[0].span)
        yield margin + paint("--> ", "frame") + f"{path}:{line}:{column}"
        yield paint(f"{margin} |", "frame")
        yield from _excerpt(here, finding, width, paint)
    for title, text in _remarks(finding):
        yield paint(f"{margin} = ", "frame") + paint(f"{title}: ", "message") + _shown(text)


def _excerpt(labels: list[Label], finding: Finding, width: int, paint: Paint) -> Iterator[str]:
    """The lines of one file that carry labels, each with its marks below it."""
    last = None
    ordered = sorted(labels, key=lambda label: _place(label.span))
    for line, group in groupby(ordered, key=lambda label: _place(label.span)[0]):
        if last is not None and line > last + 1:
            yield paint("...", "frame")
        last = line
        text = _shown(labels[0].span.source.line(line))
        yield f"{paint(f'{line:{width}} |', 'frame')} {text}".rstrip()
        for label in group:
            style = finding.severity if label is finding.at else "frame"
            mark = "^" if label is finding.at else "-"
            underline = paint(f"{mark * _length(label.span)} {_shown(label.text)}".rstrip(), style)
            gap = " " * _place(label.span)[1]
            yield paint(f"{' ' * width} |", "frame") + gap + underline


def _remarks(finding: Finding) -> Iterator[tuple[str, str]]:
    if finding.because:
        yield "because", finding.because
    explain = f"difftrain explain {finding.code}"
    yield "help", f"{finding.help}{' ' * 10}({explain})" if finding.help else explain


def _place(span: Span) -> tuple[int, int]:
    return span.source.position(span.start)


def _length(span: Span) -> int:
    """How many columns to underline: to the end of the span or of its first line."""
    line, column = _place(span)
    left = len(span.source.line(line)) - column + 1
    return max(1, min(span.end - span.start, left))


def _shown(text: str) -> str:
    """Text as a terminal may print it: a tab is one column, as in the positions we give."""
    return "".join(c if c.isprintable() else " " for c in text)


# ---- for GitHub


def render_github(findings: Iterable[Finding]) -> str:
    """The findings as workflow commands, which GitHub shows beside the lines of a change."""
    return "".join(f"{_command(finding)}\n" for finding in in_order(findings))


def _command(finding: Finding) -> str:
    path, line, column = finding.place
    end_line, _ = finding.at.span.source.position(finding.at.span.end)
    where = {"file": path, "line": line, "col": column, "endLine": end_line, "title": finding.code}
    given = ",".join(f"{key}={_escaped(str(value), ':,')}" for key, value in where.items())
    remarks = (f"because: {finding.because}", f"help: {finding.help}")
    text = "\n".join([finding.message, *(line for line in remarks if not line.endswith(": "))])
    return f"::{COMMANDS[finding.severity]} {given}::{_escaped(text)}"


def _escaped(text: str, more: str = "") -> str:
    for c in f"%\r\n{more}":
        text = text.replace(c, f"%{ord(c):02X}")
    return text


# ---- for programs


def render_json(findings: Iterable[Finding]) -> str:
    """The findings as a JSON list; lines and columns count from 1, ends are exclusive."""
    return json.dumps([_record(finding) for finding in in_order(findings)], indent=2) + "\n"


def _record(finding: Finding) -> dict:
    fix = finding.fix
    return {
        "code": finding.code,
        "severity": finding.severity,
        "message": finding.message,
        **_stretch(finding.at),
        "also": [_stretch(label) for label in finding.also],
        "because": finding.because,
        "help": finding.help,
        "fix": fix and {**_stretch(Label(fix.span)), "text": fix.text},
    }


def _stretch(label: Label) -> dict:
    source = label.span.source
    line, column = source.position(label.span.start)
    end_line, end_column = source.position(label.span.end)
    return {
        "path": source.path,
        "line": line,
        "column": column,
        "end_line": end_line,
        "end_column": end_column,
        "label": label.text,
    }
