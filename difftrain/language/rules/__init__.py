"""The rules: what a declared objective must satisfy, one function each.

A rule appends what it finds, stays silent where it cannot tell, and leaves to an earlier rule what
that one has said: so the order of the lists counts.
"""

from difftrain.language.rules import (
    derived,
    inert,
    loss,
    modules,
    path,
    run,
    shape,
    singular,
    undefined,
    walks,
    weights,
)

FILE_RULES = (
    shape.statements,
    shape.bases,
    shape.ranges,
    shape.parameters,
    shape.names,
    run.averaging,
    walks.blocks,
)
RULES = (
    derived.domains,
    derived.given_times,
    derived.meaning,
    derived.noise,
    path.needs,
    path.laws,
    path.identity,
    path.time_law,
    path.grid,
    singular.singular,
    undefined.entries,
    path.moments,
    loss.per_sample,
    loss.gradient,
    loss.weights_are_read,
    loss.thrown_away,
    weights.wrong_residual,
    modules.features,
    modules.forward_mode,
    modules.absent,
    run.copies,
    run.products,
    run.guidance,
    walks.solver,
    walks.options,
    run.time_scale,
    undefined.numbers,
    inert.strategies,
    inert.arguments,
    inert.equations,
)
LAST = (inert.definitions,)
