"""A sampler's scheduler in the place of an objective's process."""

from __future__ import annotations

from dataclasses import replace

from difftrain.language.adopt import configuration, described
from difftrain.language.finding import Finding, SpecError
from difftrain.language.rules import RULES
from difftrain.language.rules.case import Case
from difftrain.language.scope import formals
from difftrain.language.spec import Objective, Spec, build_objective
from difftrain.language.syntax import parse
from difftrain.language.tree import Define, Source, Tree

NEEDED = ("beta", "steps", "terminal_snr")  # what a process must take to be stood in for


def with_scheduler(declared: Objective, scheduler) -> Objective:
    """The objective with the levels of a scheduler instead of its process's own.

    The scheduler stands in for a process that takes `beta`, `steps` and `terminal_snr`; its
    prediction type is not read, the spec's counts. Raises ValueError for a scheduler that has no
    such levels, SpecError where the objective has no meaning with them.
    """
    (use,) = declared.slots["process"]
    name = use.definition.name
    if missing := [f"`{n}`" for n in NEEDED if n not in formals(use.definition)]:
        raise ValueError(
            f"a scheduler cannot stand in for `{name}`, which has no {', '.join(missing)}"
        )
    process = described(configuration(scheduler))
    if missing := [f"`{n}`" for n in NEEDED if n not in process.arguments]:
        raise ValueError(f"the scheduler has no {', '.join(missing)}: write `process` out")
    text = process.written(name)
    found: list[Finding] = []
    (slot,) = parse(Source("scheduler", f"process = {text}\n"), found).body
    body = tuple(slot if _is_process(s) else s for s in declared.block.body)
    objective = build_objective(replace(declared.block, body=body), declared.names, found)
    _check(objective, found)
    if errors := [f for f in found if f.severity == "error"]:
        raise SpecError(errors)
    return objective


def _is_process(statement) -> bool:
    return isinstance(statement, Define) and statement.name == "process"


def _check(objective: Objective, found: list[Finding]) -> None:
    tree = Tree(None, (objective.block,), objective.block.span.source)
    spec = Spec(tree.source.path, tree, objective.names, {objective.name: objective}, {})
    for rule in RULES:
        rule(Case(spec, objective), found)
