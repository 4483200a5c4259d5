"""The solver that a spec asks for: one of ours, a function of its own, or one of a package."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from inspect import signature

import torch
from torch import Tensor

from difftrain.language.nearest import nearest
from difftrain.language.part import Part
from difftrain.models.errors import PartError
from difftrain.models.foreign import imported, offered, reason
from difftrain.sampling import grids, solvers
from difftrain.sampling.solvers import Draws, Model

GROUP = "difftrain.solvers"  # entry points of packages: a name, and "package.module:function"
OURS = {
    made.__name__: made
    for made in (
        solvers.ancestral,
        solvers.ddim,
        solvers.dpm_solver_pp,
        solvers.euler,
        solvers.euler_maruyama,
        solvers.heun,
        solvers.jump,
        solvers.multistep,
    )
}
Walk = Callable[[Model, Tensor, Tensor, Draws], Tensor]


def walk(part: Part) -> Walk:
    """The solver of a `solver` block as `(model, x, grid, draws) -> x`, with its options.

    A name without a colon is one of ours, or one that an installed package offers; with one it is
    "module:function" from Python. Raises PartError.
    """
    name, options = part.module, own_options(part)
    if name in OURS:
        return partial(_taking(OURS[name], name, options), **options)
    place = name if ":" in name else offered(GROUP).get(name)
    if place is None:
        raise PartError(_unknown(name))
    return partial(_called, _taking(imported(place), place, options), place, options)


def own_options(part: Part) -> dict[str, object]:
    """The options of a solver that do not make its grid."""
    return {name: v for name, v in part.options.items() if name not in grids.OPTIONS}


def _taking(function: Callable, name: str, options: Iterable[str]) -> Callable:
    """The function, if it takes all options. Raises PartError."""
    known = signature(function).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in known.values())
    lost = [option for option in options if option not in known]
    if lost and not anything:
        raise PartError(
            f"the solver `{name}` has no option `{lost[0]}`: take it out of its block, or add it to"
            " the function"
        )
    return function


def _unknown(name: str) -> str:
    close = nearest(name, [*OURS, *offered(GROUP)])
    hint = f"did you mean `{close}`?" if close else 'say where: `module = "file:function"`'
    return f"there is no solver called `{name}`: {hint}"


def _called(
    function: Callable, place: str, options: dict, model: Model, x: Tensor, grid: Tensor, draws
) -> Tensor:
    """What a solver from Python makes of noise x [B, ...]: [B, ...]. Raises PartError."""
    try:
        made = function(model, x, grid, draws, **options)
    except (PartError, torch.OutOfMemoryError):
        raise
    except Exception as cause:  # a function from elsewhere may do anything
        raise PartError(f"`{place}` fails ({reason(cause)}): mend that function") from cause
    if not isinstance(made, Tensor) or made.shape != x.shape:
        given = list(made.shape) if isinstance(made, Tensor) else f"a {type(made).__name__}"
        raise PartError(f"`{place}` gives {given}: return samples of the shape {list(x.shape)}")
    return made
