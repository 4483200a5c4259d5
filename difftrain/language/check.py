"""Checking: a source to a typed spec and every finding about it."""

from __future__ import annotations

from collections.abc import Mapping

from difftrain.language.finding import Finding
from difftrain.language.rules import RULES
from difftrain.language.spec import Spec, read_source
from difftrain.language.tree import Source


def check(source: Source, settings: Mapping | None = None) -> tuple[Spec, list[Finding]]:
    """The spec of a source, and its findings in the order of their places."""
    found: list[Finding] = []
    spec = read_source(source, found, settings)
    for objective in spec.objectives.values():
        for rule in RULES:
            rule(spec, objective, found)
    unique = list(dict.fromkeys(found))
    spec.findings = tuple(sorted(unique, key=lambda f: (f.place, f.code)))
    return spec, list(spec.findings)
