"""`import`: another trainer's configuration as a spec."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from difftrain.commands.console import complain
from difftrain.commands.failure import CLEAN, FINDINGS
from difftrain.language.check import check
from difftrain.language.tree import Source


def convert(args: Namespace) -> int:
    """Prints or writes the spec; 1 if it has findings of its own."""
    from difftrain.importers import convert as read

    text = read(args.config)
    if args.output is None:
        print(text, end="")
    else:
        Path(args.output).write_text(text, encoding="utf-8", newline="\n")
    shown = args.output or str(Path(args.config).with_suffix(".diff"))
    findings = check(Source(shown, text))[1]
    complain(findings)
    return FINDINGS if any(f.severity != "note" for f in findings) else CLEAN
