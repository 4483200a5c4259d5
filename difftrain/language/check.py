"""Checking: a source to a typed spec and every finding about it."""

from __future__ import annotations

from collections.abc import Mapping

from difftrain.language.finding import Finding
from difftrain.language.rules import FILE_RULES, RULES
from difftrain.language.rules.case import Case
from difftrain.language.rules.run import need
from difftrain.language.spec import Spec, read_source
from difftrain.language.tree import Source

SYNTAX = "DIF1"  # codes below this one are about syntax


def check(source: Source, settings: Mapping | None = None) -> tuple[Spec, list[Finding]]:
    """The spec of a source, and its findings in the order of their places.

    While the syntax is broken it is the only thing that is spoken of: what a broken line would
    have defined is missing everywhere else.
    """
    found: list[Finding] = []
    spec = read_source(source, found, settings)
    broken = [f for f in found if f.code < SYNTAX]
    if not broken:
        for rule in FILE_RULES:
            rule(spec, found)
        for objective in spec.objectives.values():
            case = Case(spec, objective)
            for rule in RULES:
                rule(case, found)
    unique = dict.fromkeys(broken or found)
    spec.findings = tuple(sorted(unique, key=lambda f: (f.place, f.code)))
    return spec, list(spec.findings)


__all__ = ["check", "need"]
