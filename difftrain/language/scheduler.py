"""A sampler's scheduler as a process: its configuration, in the language's words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from difftrain.language.finding import Finding, SpecError
from difftrain.language.rules import RULES
from difftrain.language.rules.case import Case
from difftrain.language.scope import formals
from difftrain.language.spec import Objective, Spec, build_objective
from difftrain.language.syntax import parse
from difftrain.language.tree import Define, Source, Tree

NEEDED = ("beta", "steps", "terminal_snr")  # what a process must take to be stood in for
FILES = ("scheduler_config.json", "scheduler/scheduler_config.json")
# What a schedule is called there, and here.
BETAS = {
    "linear": "linear({low!r}, {high!r})",
    "scaled_linear": "scaled_linear({low!r}, {high!r})",
    "squaredcos_cap_v2": "cosine",
}


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
    text = process_text(configuration(scheduler), name)
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


def configuration(scheduler) -> Mapping:
    """The settings of a scheduler: an object with `config`, a mapping, or the path of its
    configuration file or of a folder that holds one. Raises ValueError."""
    if isinstance(scheduler, Mapping):
        return scheduler
    if isinstance(scheduler, (str, Path)):
        return _read(Path(scheduler))
    config = getattr(scheduler, "config", None)
    if isinstance(config, Mapping):
        return config
    raise ValueError("the scheduler has no `config`: give a scheduler, or the path of its file")


def _read(path: Path) -> Mapping:
    found = next((path / f for f in FILES if (path / f).is_file()), path)
    try:
        config = json.loads(found.read_text(encoding="utf-8"))
    except OSError as problem:
        text = f"the scheduler's configuration `{path}` cannot be read: {problem.strerror}"
        raise ValueError(text) from None
    except ValueError:
        raise ValueError(f"the scheduler's configuration `{found}` is not JSON") from None
    if isinstance(config, Mapping):
        return config
    raise ValueError(f"the scheduler's configuration `{found}` is not a mapping")


def process_text(config: Mapping, process: str) -> str:
    """The use of a process with `beta`, `steps` and `terminal_snr` that has the scheduler's levels.

    What is absent has the value that diffusers gives it. Raises ValueError.
    """
    if config.get("trained_betas") is not None:
        raise ValueError(
            "the scheduler lists its betas one by one: write them as a function of `i` and `n`"
        )
    name = config.get("beta_schedule", "linear")
    if name not in BETAS:
        listed = ", ".join(f"`{b}`" for b in BETAS)
        raise ValueError(f"the scheduler's betas `{name}` are not known here: there are {listed}")
    low, high = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    beta = BETAS[name].format(low=low, high=high)
    steps = config.get("num_train_timesteps", 1000)
    end = "zero" if config.get("rescale_betas_zero_snr") else "free"
    return f"{process}(beta = {beta}, steps = {steps}, terminal_snr = {end})"


__all__ = ["configuration", "process_text", "with_scheduler"]
