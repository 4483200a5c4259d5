"""Equations: the base ones and the redefinitions, layer by layer, each with the scope it has.

Layers: prelude < process < prediction < body. A later layer restates (`=`, `~`) what an earlier
one says; strategies only redefine (`'`). Names made inside a block stay local to it and are read
from outside as `block.name`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from difftrain.language.names import Definition, Names
from difftrain.language.tree import (
    Argument,
    Call,
    Define,
    Expr,
    Formal,
    ListOf,
    Name,
    Span,
)

# Quantities without an equation of their own in the prelude.
GIVEN = ("x0", "cond", "null", "step", "image", "tap", "metadata")
OPEN = ("t", "alpha", "sigma", "target", "r")
NETS = ("student", "teacher")
DERIVED = ("row_a", "row_b")
WHOLE = "whole"  # where a block lists those of its parameters that count something
REMARKS = ("needs", "help", "lacks", "because", "has_guidance", WHOLE)  # beside a block's equations


@dataclass(frozen=True, eq=False)
class Scope:
    """Where the names of one block are looked up."""

    label: str
    home: Names
    locals: dict[str, str] = field(default_factory=dict)
    words: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Equation:
    """One version of a quantity. `before` says at which version the names that the same block
    redefines stand for its draws. An argument may be a function; all else is a number."""

    name: str
    value: Expr
    scope: Scope
    form: str  # "=", "~" or "'"
    span: Span
    before: dict[str, int] = field(default_factory=dict)
    argument: bool = False


@dataclass(frozen=True, eq=False)
class Use:
    """A block put to use: `name(p = 1)` in a slot."""

    definition: Definition
    label: str
    call: Expr  # what was written
    scope: Scope  # where its arguments are read


@dataclass(frozen=True, eq=False)
class Need:
    """What a block in use takes for granted, and what to write where it does not hold."""

    use: Use
    condition: Expr
    scope: Scope
    help: str = ""


@dataclass(frozen=True)
class Lack:
    """An estimate that has no meaning under a block in use, and why."""

    block: str
    because: str


@dataclass(eq=False)
class Equations:
    """All versions of all quantities of one objective, and every use that made them."""

    versions: dict[str, list[Equation]] = field(default_factory=dict)
    scopes: dict[str, Scope] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    quantities: set[str] = field(default_factory=set)
    needs: list[Need] = field(default_factory=list)
    replaced: list[Equation] = field(default_factory=list)  # restated by a later layer
    lacks: dict[str, Lack] = field(default_factory=dict)  # estimate -> who takes its meaning
    guided: dict[str, tuple[Expr, Scope]] = field(default_factory=dict)  # block -> its own guidance

    def base(self, equation: Equation) -> None:
        earlier = self.versions.get(equation.name)
        if earlier:
            self.replaced.append(earlier[0])
            earlier[0] = equation
        else:
            self.versions[equation.name] = [equation]

    def newest(self, name: str) -> int:
        return len(self.versions[name]) - 1

    def process_time(self) -> Equation | None:
        """The process's own equation of t, restated or not."""
        every = [*self.replaced, *self.versions.get("t", ())]
        return next((e for e in every if e.name == "t" and e.scope.label == "process"), None)


def own_name(value: Expr, name: str) -> bool:
    """Whether an expression reads a name directly."""
    return any(isinstance(e, Name) and e.path == (name,) for e in parts(value)) or any(
        isinstance(e, Call) and e.path == (name,) for e in parts(value)
    )


def parts(value, closed=()):
    """An expression and all expressions inside it, but for those in calls of what is `closed`."""
    yield value
    if isinstance(value, Call) and value.dotted in closed:
        return
    for child in vars(value).values():
        for item in child if isinstance(child, tuple) else (child,):
            if isinstance(item, Argument):
                yield from parts(item.value, closed)
            elif isinstance(item, Expr):
                yield from parts(item, closed)


def lineage(definition: Definition) -> list[Definition]:
    """The blocks that a block is made `from`, the first one first, then itself."""
    line = [definition]
    while base := base_of(line[0]):
        if base in line:  # a circle, which is a finding of its own
            break
        line.insert(0, base)
    return line


def base_of(definition: Definition) -> Definition | None:
    """The block that a block is made `from`."""
    path = definition.node.base
    return definition.home.find(definition.kind, path) if path else None


def formals(definition: Definition) -> dict[str, tuple[Formal, Definition]]:
    """The parameters of a block with those of its bases; the newest default counts, the newest
    range that is said, and every list of whole numbers."""
    line = lineage(definition)
    said = [s for d in line for s in d.node.body if isinstance(s, Define) and s.name == WHOLE]
    counted = {name for statement in said for name in named(statement.value)}
    found: dict[str, tuple[Formal, Definition]] = {}
    for block in line:
        for formal in block.node.formals:
            older = found[formal.name][0].domain if formal.name in found else None
            whole, domain = formal.name in counted, formal.domain or older
            found[formal.name] = replace(formal, domain=domain, whole=whole), block
    return found


def named(listed: Expr | None) -> list[str]:
    """The names that stand in a list."""
    items = listed.items if isinstance(listed, ListOf) else ()
    return [item.dotted for item in items if isinstance(item, Name)]


def choices(formal: Formal) -> tuple[str, ...]:
    """The words that a parameter may be, where its domain is a list of words."""
    if not isinstance(formal.domain, ListOf):
        return ()
    return tuple(item.dotted for item in formal.domain.items if isinstance(item, Name))


def is_function(node) -> bool:
    """Whether a statement defines a function, which no block may hold."""
    return isinstance(node, Define) and node.formals is not None
