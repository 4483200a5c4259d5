"""Layers: the equations that blocks in use and statements add to an objective.

A base layer restates (`=`, `~`) what an earlier one says; a strategy only redefines (`'`).
"""

from __future__ import annotations

from difftrain.language.finding import Finding, Label
from difftrain.language.names import Definition
from difftrain.language.nearest import nearest
from difftrain.language.scope import (
    REMARKS,
    Equation,
    Equations,
    Lack,
    Need,
    Scope,
    Use,
    choices,
    formals,
    is_function,
    lineage,
)
from difftrain.language.tree import (
    Block,
    Define,
    Draw,
    Expr,
    ListOf,
    Name,
    Redefine,
    Text,
)
from difftrain.language.uses import bind, use_of


def add_use(
    equations: Equations, use: Use, found: list[Finding], layer: str, apart: bool = False
) -> None:
    """Adds the equations of a block in use; `layer` is "base", or "strategy", which redefines.

    `apart` keeps all its names to itself: a process inside another one.
    """
    label = use.label
    chain = lineage(use.definition)
    statements = [s for d in chain for s in _once(equations, use, d).body if not is_function(s)]
    made = {
        s.name
        for s in statements
        if isinstance(s, (Define, Draw)) and (apart or s.name not in equations.quantities)
    } - set(REMARKS)
    bound = bind(use, found)
    local = {name: f"{label}.{name}" for name in (*bound, *made)}
    words = frozenset(w for f, _ in formals(use.definition).values() for w in choices(f))
    for name in _processes(use) & bound.keys():
        local |= _nested(equations, use, name, *bound.pop(name), found)
    scope = Scope(label, use.definition.home, local, words)
    equations.scopes[label] = scope
    equations.uses.append(use)
    for name, (value, where) in bound.items():
        inner = Scope(where.label, where.home, where.locals, where.words | words)
        given = Equation(local[name], value, inner, "=", value.span, argument=True)
        equations.base(given)
    add_statements(equations, statements, scope, found, layer, use)


def _processes(use: Use) -> set[str]:
    """The parameters that are processes themselves."""
    wanted = {n: f.domain for n, (f, _) in formals(use.definition).items()}
    return {n for n, d in wanted.items() if isinstance(d, Name) and d.path == ("process",)}


def _nested(equations, use: Use, name: str, value: Expr, where: Scope, found) -> dict[str, str]:
    """Adds a process that is an argument, and says what its names are called outside it."""
    inner = use_of(value, "process", where, found)
    if inner is None:
        return {}
    label = f"{use.label}.{name}"
    add_use(equations, Use(inner.definition, label, value, where), found, "base", apart=True)
    own = equations.scopes[label].locals
    return {f"{name}.{n}": full for n, full in own.items()}


def _once(equations: Equations, use: Use, definition: Definition) -> Block:
    """A base that is also in the list is applied once."""
    node = definition.node
    again = any(definition in lineage(u.definition) for u in equations.uses)
    return Block(node.kind, node.name, (), None, (), node.span, node.head) if again else node


def add_statements(equations, statements, scope, found, layer, use=None) -> None:
    """Adds statements of one block, in order."""
    primed = {s.name for s in statements if isinstance(s, Redefine)}
    before = {n: equations.newest(n) for n in primed if n in equations.versions}
    for definition in lineage(use.definition) if use is not None else ():
        _remarks(equations, definition, use, scope)
    for node in statements:
        if use is not None and isinstance(node, Define) and node.name in REMARKS:
            continue
        if isinstance(node, (Define, Draw)):
            _base(equations, node, scope, found, layer, before)
        elif isinstance(node, Redefine):
            _prime(equations, node, scope, found)


def _remarks(equations: Equations, definition: Definition, use: Use, scope: Scope) -> None:
    """What a block, or one that it is made from, says about its use."""
    body = [s for s in definition.node.body if isinstance(s, Define) and s.name in REMARKS]
    said = {s.name: s.value for s in body}
    texts = {n: said[n].value if isinstance(said.get(n), Text) else "" for n in ("help", "because")}
    for item in _items(said["needs"]) if "needs" in said else ():
        equations.needs.append(Need(use, item, scope, texts["help"]))
    for item in _items(said["lacks"]) if "lacks" in said else ():
        if isinstance(item, Name):
            equations.lacks[item.dotted] = Lack(use.definition.name, texts["because"])
    if "has_guidance" in said:
        equations.guided[use.label] = (said["has_guidance"], scope)


def _items(value: Expr) -> tuple[Expr, ...]:
    """What a remark lists; one thing needs no brackets."""
    return value.items if isinstance(value, ListOf) else (value,)


def _base(equations, node, scope, found, layer, before) -> None:
    name = scope.locals.get(node.name, node.name)
    value = node.value if isinstance(node, Define) else node.law
    if layer == "strategy" and name in equations.versions and name in equations.quantities:
        found.append(
            Finding(
                "DIF114",
                f"a strategy cannot restate `{name}`",
                Label(node.head),
                (Label(equations.versions[name][0].span, "it has an equation already"),),
                because="what a strategy changes must stay visible as a redefinition",
                help=f"write `{name}' = …`",
            )
        )
        return
    form = "=" if isinstance(node, Define) else "~"
    equations.base(Equation(name, value, scope, form, node.span, before))


def _prime(equations, node: Redefine, scope, found) -> None:
    name = scope.locals.get(node.name, node.name)
    if name not in equations.versions:
        close = nearest(node.name, equations.versions)
        hint = f"write `{close}'`" if close else f"define it first: `{node.name} = …`"
        text = f"there is no `{node.name}` to redefine"
        found.append(Finding("DIF115", text, Label(node.head), help=hint))
        return
    equations.versions[name].append(Equation(name, node.value, scope, "'", node.span))
