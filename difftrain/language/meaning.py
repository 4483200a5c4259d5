"""What an objective has no meaning for: estimates that a strategy gives up, and the score of noise
that is not standard normal."""

from __future__ import annotations

from difftrain.language.finding import Finding, Label
from difftrain.language.forms import is_gaussian
from difftrain.language.spec import Objective
from difftrain.language.worlds import Problem

READS = {"score_hat": ("score_hat", "eps_hat"), "flow_hat": ("flow_hat",)}


def lacking(objective: Objective, name: str) -> Finding | None:
    """Why an estimate has no meaning here, or None where it has one."""
    at = Label(objective.block.head)
    for quantity in READS.get(name, (name,)):
        if lack := objective.equations.lacks.get(quantity):
            text = f"`{name}` has no meaning under `{lack.block}`"
            return Finding("DIF216", text, at, because=lack.because)
    if name == "score_hat" and not gaussian(objective):
        text = "the noise is not standard normal, so -eps_hat / sigma is not its score"
        hint = "leave `eps ~ noise(x0)` as it is, or use a solver that reads no score"
        return Finding("DIF216", text, at, help=hint)
    return None


def gaussian(objective: Objective) -> bool:
    """Whether the noise is standard normal, after all redefinitions of it that are not stopped."""
    try:
        return is_gaussian(objective.derivation().read("eps"))
    except Problem:
        return True  # said elsewhere
