"""Where results and problems are printed."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from difftrain.language.finding import Finding
from difftrain.language.render import render


def colored(stream: TextIO) -> bool:
    """Whether to colour what goes to a stream: a terminal, and nobody said NO_COLOR."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def complain(findings: tuple[Finding, ...] | list[Finding]) -> None:
    """Tells findings that are not the result of the command."""
    print(render(findings, colored(sys.stderr)), end="", file=sys.stderr)
