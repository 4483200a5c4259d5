"""difftrain: a compiler for diffusion training objectives.

`read` needs no tensor library; `objective` does, and imports it when it is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from difftrain.language.check import check
from difftrain.language.finding import Finding, SpecError
from difftrain.language.spec import Spec

__version__ = "0.1.0"


def read(path: str | Path, set: Mapping[str, object] | None = None) -> Spec:
    """The checked spec of a `.diff` file, with settings such as `{"gamma": 3}` applied.

    Raises SpecError, whose `findings` hold everything that is wrong, and OSError for a file that
    cannot be read. Warnings do not raise; they are in the spec's `findings`.
    """
    from difftrain.language.spec import read_text

    spec, found = check(read_text(path), set)
    if any(f.severity == "error" for f in found):
        raise SpecError(found)
    return spec


def objective(spec: Spec | str | Path, network, *, name: str | None = None, modules=None):
    """A `torch.nn.Module` of what the spec declares, around `network(x, t, cond, **extra)`.

    `name` chooses among several objectives; `modules` holds frozen ones ("teacher", ...).
    Raises SpecError.
    """
    from difftrain.compiler.objective import Objective

    spec = spec if isinstance(spec, Spec) else read(spec)
    return Objective(spec.objective(name), network, modules)


def batch_loss(objective, batch, **options):
    """The loss per sample [B] of a batch of one's own: see `difftrain.training.contract.loss`."""
    from difftrain.training.contract import loss

    return loss(objective, batch, **options)


__all__ = ["Finding", "Spec", "SpecError", "batch_loss", "objective", "read"]
