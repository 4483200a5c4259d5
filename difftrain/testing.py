"""Conformance tests for objectives: `check("my.diff")` in a test of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path

from difftrain.compiler.report import Point, Report
from difftrain.language.finding import SpecError
from difftrain.language.spec import Spec


class ConformanceError(AssertionError):
    """An objective does not conform; `report` holds every point."""

    def __init__(self, report: Report):
        self.report = report
        broken = "".join(f"\n  {p.name}: {p.said}" for p in report.broken)
        super().__init__(f"objective `{report.objective}` does not conform{broken}")


def check(
    path: str | Path | Spec,
    name: str | None = None,
    *,
    network=None,
    modules: Mapping[str, object] | None = None,
    shapes: Iterable[tuple[int, ...]] | None = None,
    cond=None,
    null=None,
) -> Report:
    """The report of the objective `name` of a `.diff` file: every point, and what was left out.

    Without a `network` a small one is made, and so is each module that the objective reads and
    `modules` lacks. Copies in float64 are checked, in evaluation mode. `shapes` are those of one
    sample, such as `[(4, 8, 8)]` where the network takes no others; `cond` and `null` are a
    condition and the empty one, a row each. Raises ConformanceError if a point does not hold.
    """
    from difftrain.compiler.conformance import SHAPES, conform

    try:
        subject = _subject(path, name, network, modules, cond, null)
    except SpecError as wrong:
        points = tuple(Point("lint", "broken", f.message) for f in wrong.findings)
        raise ConformanceError(Report(name or str(path), points)) from None
    report = conform(subject, SHAPES if shapes is None else shapes)
    if report.broken:
        raise ConformanceError(report)
    return report


def _subject(path, name, network, modules, cond, null):
    """The objective around copies of what is given, and stand-ins for what is not."""
    from difftrain import read
    from difftrain.compiler import standin
    from difftrain.compiler.objective import Objective
    from difftrain.compiler.subject import Subject, module_names, quantities, reads_tap

    spec = path if isinstance(path, Spec) else read(path)
    declared = spec.objective(name)
    terms = quantities(declared)
    if network is None:
        network = standin.Network(tap=reads_tap(terms["loss"]))
        cond, null = standin.condition() if cond is None else (cond, null)
    network, modules = standin.in_float64(*deepcopy((network, dict(modules or {}))))
    modules |= standin.missing(module_names(terms.values()), modules)
    return Subject(Objective(declared, network, modules), cond, null)


__all__ = ["ConformanceError", "Point", "Report", "check"]
