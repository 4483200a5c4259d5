"""Checking: a source to a typed spec and every finding about it."""

from __future__ import annotations

from collections.abc import Mapping

from difftrain.language.finding import Finding
from difftrain.language.rules import FILE_RULES, LAST, RULES
from difftrain.language.rules.case import Case
from difftrain.language.rules.run import need
from difftrain.language.scope import REMARKS
from difftrain.language.spec import Spec, read_source
from difftrain.language.tree import Source

SYNTAX = "DIF1"  # codes below this one are about syntax
IMPORTS = ("DIF104", "DIF107")
UNKNOWN = ("DIF119", "DIF120")
REMARK = "DIF118"


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
        for rule in LAST:
            rule(spec, found)
    unique = dict.fromkeys(broken or _causes(found))
    spec.findings = tuple(sorted(unique, key=lambda f: (f.place, f.code)))
    return spec, list(spec.findings)


def _causes(found: list[Finding]) -> list[Finding]:
    """The findings without those about names that a failed import would have brought, or that are
    told where they are given."""
    failed = {f.at.span.text.split()[-1].split(".")[-1] for f in found if f.code in IMPORTS}
    told = {f.at.span.text for f in found if f.code == REMARK} & set(REMARKS)
    unknown = [f for f in found if f.code in UNKNOWN]
    lost = [f for f in unknown if _space(f) in failed or f.at.span.text.split(".")[-1] in told]
    return [f for f in found if f not in lost]


def _space(finding: Finding) -> str | None:
    first, dot, _ = finding.at.span.text.partition(".")
    return first if dot else None


__all__ = ["check", "need"]
