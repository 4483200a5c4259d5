"""Worlds and what is read in them: versions and replacements of names, arguments, functions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from difftrain.language.finding import Finding
from difftrain.language.names import Definition
from difftrain.language.scope import Equation, Scope
from difftrain.language.tree import Expr

ALL = "*"


class Problem(Exception):
    """A finding on its way to the end of the stage; `trail` holds the equations that were being
    read, the innermost first."""

    def __init__(self, finding: Finding):
        self.finding = finding
        self.trail: list[Equation] = []
        super().__init__(finding.message)


@dataclass(frozen=True)
class World:
    """`caps`: versions that names stand at; `swaps`: names that are replaced; `plain`: names whose
    given values are not used (`*` for all)."""

    caps: frozenset = frozenset()
    swaps: frozenset = frozenset()
    plain: frozenset = frozenset()

    def cap(self, **versions: int) -> World:
        return replace(self, caps=frozenset({**dict(self.caps), **versions}.items()))

    def swap(self, values: dict[str, object]) -> World:
        """The world with names replaced; another t has the time that follows from it."""
        kept = {n: v for n, v in self.swaps if n != "time" or "t" not in values}
        caps = frozenset((n, v) for n, v in self.caps if n not in values)
        return replace(self, caps=caps, swaps=frozenset({**kept, **values}.items()))


HERE = World()


@dataclass(frozen=True, eq=False)
class Thunk:
    """An argument that has not been read: its expression and where to read it. In one world it is
    one value, however often the function reads it."""

    value: Expr
    scope: Scope
    env: tuple
    memo: dict = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Function:
    """A function of the library, with the arguments it has already."""

    definition: Definition
    bound: dict[str, Thunk]
    open: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Frame:
    """Where an expression is read: scope, arguments of the functions around it, world."""

    scope: Scope
    env: dict[str, object]
    world: World
