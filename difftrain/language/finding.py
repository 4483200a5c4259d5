"""A finding: one thing that is wrong, where, why, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

from difftrain.language.tree import Span


@dataclass(frozen=True)
class Fix:
    """An exact edit: put `text` where `span` is."""

    span: Span
    text: str


@dataclass(frozen=True)
class Label:
    """A place that a finding points at, and the few words that stand beside it."""

    span: Span
    text: str = ""


@dataclass(frozen=True)
class Finding:
    """One cause, one finding. The message is a sentence in lower case without a full stop."""

    code: str
    message: str
    at: Label
    also: tuple[Label, ...] = ()
    because: str = ""
    help: str = ""
    fix: Fix | None = None
    severity: str = "error"  # error | warning | note

    @property
    def place(self) -> tuple[str, int, int]:
        """Path, line, column: the order in which findings are shown."""
        return (self.at.span.source.path, *self.at.span.source.position(self.at.span.start))


class SpecError(Exception):
    """A spec that cannot be used; `findings` holds every reason."""

    def __init__(self, findings):
        self.findings = tuple(findings)
        super().__init__("; ".join(f"{f.code}: {f.message}" for f in self.findings))
