"""`lint` and `fmt`: commands that need nothing but the language."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from difftrain.commands.console import colored, complain
from difftrain.commands.failure import CLEAN, FINDINGS
from difftrain.commands.paths import settings, specs
from difftrain.language.check import check
from difftrain.language.finding import Finding
from difftrain.language.format import format_text
from difftrain.language.render import render, render_github, render_json
from difftrain.language.spec import read_text
from difftrain.language.syntax import parse

FORMATS: dict[str, Callable[[Iterable[Finding]], str]] = {
    "text": lambda found: render(found, colored(sys.stdout)),
    "github": render_github,
    "json": render_json,
}


def lint(args: Namespace) -> int:
    """Findings of specs; 1 if there are errors or warnings."""
    files, changes = specs(args.paths), settings(args.settings)
    found = [f for file in files for f in check(read_text(file), changes)[1]]
    print(FORMATS[args.format](found), end="")
    print(summary(found, len(files)), file=sys.stderr)
    return FINDINGS if any(f.severity != "note" for f in found) else CLEAN


def summary(found: list[Finding], files: int) -> str:
    """`3 errors, 1 warning in 2 files`."""
    counts = Counter(f.severity for f in found)
    parts = [_count(counts[s], s) for s in ("error", "warning", "note") if counts[s]]
    return f"{', '.join(parts) or 'no findings'} in {_count(files, 'file')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def fmt(args: Namespace) -> int:
    """Rewrites specs in the one layout; with `--check`, 1 if one would change."""
    files = specs(args.paths)
    broken: list[Finding] = []
    changed = [file for file in files if _format(file, args.check, broken)]
    for file in changed:
        print(f"{file} {'would change' if args.check else 'formatted'}")
    complain(broken)
    return FINDINGS if broken or (changed and args.check) else CLEAN


def _format(file: str, only_check: bool, broken: list[Finding]) -> bool:
    """Whether the file is not in the one layout; text that cannot be read is left as it is."""
    source = read_text(file)
    found: list[Finding] = []
    parse(source, found)
    broken += found
    text = format_text(source)
    if found or text.encode() == Path(file).read_bytes():
        return False
    if not only_check:
        Path(file).write_bytes(text.encode())
    return True
