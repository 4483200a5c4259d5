"""References: which definitions the text of a definition names."""

from __future__ import annotations

from collections.abc import Iterator

from difftrain.language.finding import Finding, Label
from difftrain.language.names import LIBRARY_KINDS, OPTION_KINDS, Definition, Names
from difftrain.language.scope import parts
from difftrain.language.tree import (
    Block,
    Call,
    Define,
    Draw,
    Expr,
    Name,
    Param,
    Redefine,
    Statement,
)

FOLLOWED = {k: ("function", "param") for k in ("function", "param")}
FOLLOWED |= {k: ("param", *LIBRARY_KINDS, *OPTION_KINDS) for k in ("backbone", "encoder", "codec")}
EVERY = ("function", "param", *LIBRARY_KINDS, *OPTION_KINDS)


def expressions(node: Statement) -> Iterator[Expr]:
    """The expressions that a statement and everything in it is written with."""
    match node:
        case Block(formals=formals, body=body):
            yield from (f.default for f in formals if f.default is not None)
            for inner in body:
                yield from expressions(inner)
        case Define(formals=formals, value=value):
            yield from (f.default for f in formals or () if f.default is not None)
            yield value
        case Redefine(value=value) | Draw(law=value) | Param(default=value):
            yield value


def own_names(node: Statement) -> set[str]:
    """The names that a block or function defines for itself."""
    formals = {f.name for f in getattr(node, "formals", None) or ()}
    body = node.body if isinstance(node, Block) else ()
    return formals | {s.name for s in body if isinstance(s, (Define, Draw))}


def paths(node: Statement) -> set[tuple[str, ...]]:
    """The dotted names that a statement reads and does not define itself."""
    own = own_names(node)
    read = {e.path for top in expressions(node) for e in parts(top) if isinstance(e, (Name, Call))}
    base = {node.base} if isinstance(node, Block) and node.base else set()
    return {p for p in read if len(p) > 1 or p[0] not in own} | base


def references(node: Statement, home: Names, kinds=EVERY) -> list[Definition]:
    """The definitions that a statement may mean by the names in it."""
    found = (home.find(kind, path) for path in sorted(paths(node)) for kind in kinds)
    return [d for d in found if d is not None]


def circle(definition: Definition) -> list[Definition]:
    """The definitions through which one reads itself, itself first; empty where it does not."""
    if definition.shipped:
        return []
    kinds = FOLLOWED[definition.kind]
    stack, seen = [[definition]], set()
    while stack:
        chain = stack.pop()
        for follower in references(chain[-1].node, chain[-1].home, kinds):
            if follower is definition:
                return chain
            if follower not in seen and not follower.shipped:
                seen.add(follower)
                stack.append([*chain, follower])
    return []


def circular(chain: list[Definition]) -> Finding:
    """What to say about definitions that need each other."""
    names = " -> ".join(d.name for d in [*chain, chain[0]])
    text = f"`{chain[0].name}` is defined by itself: {names}"
    hint = "take one of them out of the circle: the language has no recursion"
    return Finding("DIF122", text, Label(chain[0].node.head), help=hint)
