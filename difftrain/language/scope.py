"""Equations: the base ones and the redefinitions, layer by layer, each with the scope it has.

Layers: prelude < process < prediction < body. A later layer restates (`=`, `~`) what an earlier
one says; strategies only redefine (`'`). Names made inside a block stay local to it and are read
from outside as `block.name`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from difftrain.language.finding import Finding, Label
from difftrain.language.names import Definition, Names
from difftrain.language.nearest import nearest
from difftrain.language.tree import (
    Argument,
    Block,
    Call,
    Define,
    Draw,
    Expr,
    Formal,
    ListOf,
    Name,
    Redefine,
    Span,
    Text,
)

# Quantities without an equation of their own in the prelude.
GIVEN = ("x0", "cond", "null", "step", "image", "tap", "metadata")
OPEN = ("t", "alpha", "sigma", "target", "r")
NETS = ("student", "teacher")
DERIVED = ("row_a", "row_b")
REMARKS = ("needs", "help")  # what a block says about its use


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


@dataclass(eq=False)
class Equations:
    """All versions of all quantities of one objective, and every use that made them."""

    versions: dict[str, list[Equation]] = field(default_factory=dict)
    scopes: dict[str, Scope] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    quantities: set[str] = field(default_factory=set)
    needs: list[Need] = field(default_factory=list)
    replaced: list[Equation] = field(default_factory=list)  # restated by a later layer

    def base(self, equation: Equation) -> None:
        earlier = self.versions.get(equation.name)
        if earlier:
            self.replaced.append(earlier[0])
            earlier[0] = equation
        else:
            self.versions[equation.name] = [equation]

    def newest(self, name: str) -> int:
        return len(self.versions[name]) - 1


def own_name(value: Expr, name: str) -> bool:
    """Whether an expression reads a name directly."""
    return any(isinstance(e, Name) and e.path == (name,) for e in parts(value)) or any(
        isinstance(e, Call) and e.path == (name,) for e in parts(value)
    )


def parts(value):
    """An expression and all expressions inside it."""
    yield value
    for child in vars(value).values():
        for item in child if isinstance(child, tuple) else (child,):
            if isinstance(item, Argument):
                yield from parts(item.value)
            elif isinstance(item, Expr):
                yield from parts(item)


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
    """The parameters of a block with those of its bases; the newest default counts."""
    return {f.name: (f, d) for d in lineage(definition) for f in d.node.formals}


def bind(use: Use, found: list[Finding]) -> dict[str, tuple[Expr, Scope]]:
    """The expression of each parameter: given, or its default. Problems are findings."""
    wanted = formals(use.definition)
    args = use.call.args if isinstance(use.call, Call) else ()
    bound: dict[str, tuple[Expr, Scope]] = {}
    free = iter(wanted)
    for argument in args:
        name = argument.name or next(free, None)
        if name in bound:
            found.append(_twice(argument, name))
        elif name in wanted:
            bound[name] = (argument.value, use.scope)
        else:
            found.append(_no_parameter(use, argument, list(wanted)))
    for name, (formal, definition) in wanted.items():
        if name not in bound and formal.default is not None:
            bound[name] = (formal.default, Scope(use.label, definition.home))
        elif name not in bound:
            found.append(_missing(use, name))
    return bound


def _twice(argument: Argument, name: str) -> Finding:
    return Finding("DIF112", f"`{name}` is given twice", Label(argument.span), help="give it once")


def _no_parameter(use: Use, argument: Argument, names: list[str]) -> Finding:
    title, written = use.definition.name, argument.name
    if written is None:
        text = f"`{title}` takes {len(names) or 'no'} argument{'s' * (len(names) != 1)}"
        return Finding("DIF111", text, Label(argument.span, "one too many"), help="leave it out")
    close = nearest(written, names)
    listed = "it takes " + ", ".join(f"`{n}`" for n in names) if names else "it takes none"
    hint = f"write `{close}`" if close else listed
    span = Span(argument.span.source, argument.span.start, argument.span.start + len(written))
    return Finding("DIF111", f"`{title}` has no argument `{written}`", Label(span), help=hint)


def _missing(use: Use, name: str) -> Finding:
    title = use.definition.name
    text = f"`{title}` needs a value for `{name}`"
    return Finding("DIF113", text, Label(use.call.span), help=f"write `{title}({name} = …)`")


def add_use(equations: Equations, use: Use, found: list[Finding], layer: str) -> None:
    """Adds the equations of a block in use; `layer` is "base", or "strategy", which redefines."""
    label = use.label
    chain = lineage(use.definition)
    statements = [s for d in chain for s in _once(equations, use, d).body if not is_function(s)]
    made = {
        s.name
        for s in statements
        if isinstance(s, (Define, Draw)) and s.name not in {*equations.quantities, *REMARKS}
    }
    bound = bind(use, found)
    local = {name: f"{label}.{name}" for name in (*bound, *made)}
    words = frozenset(w for f, _ in formals(use.definition).values() for w in choices(f))
    scope = Scope(label, use.definition.home, local, words)
    equations.scopes[label] = scope
    equations.uses.append(use)
    for name, (value, where) in bound.items():
        inner = Scope(where.label, where.home, where.locals, where.words | words)
        given = Equation(local[name], value, inner, "=", value.span, argument=True)
        equations.base(given)
    add_statements(equations, statements, scope, found, layer, use)


def _once(equations: Equations, use: Use, definition: Definition) -> Block:
    """A base that is also in the list is applied once."""
    node = definition.node
    again = any(u.definition is definition for u in equations.uses)
    return Block(node.kind, node.name, (), None, (), node.span, node.head) if again else node


def choices(formal: Formal) -> tuple[str, ...]:
    """The words that a parameter may be, where its domain is a list of words."""
    if not isinstance(formal.domain, ListOf):
        return ()
    return tuple(item.dotted for item in formal.domain.items if isinstance(item, Name))


def is_function(node) -> bool:
    """Whether a statement defines a function, which no block may hold."""
    return isinstance(node, Define) and node.formals is not None


def add_statements(equations, statements, scope, found, layer, use=None) -> None:
    """Adds statements of one block, in order."""
    primed = {s.name for s in statements if isinstance(s, Redefine)}
    before = {n: equations.newest(n) for n in primed if n in equations.versions}
    remarks = {s.name: s.value for s in statements if isinstance(s, Define) and s.name in REMARKS}
    if use is not None and "needs" in remarks:
        advice = remarks["help"].value if isinstance(remarks.get("help"), Text) else ""
        needs = remarks["needs"]
        items = needs.items if isinstance(needs, ListOf) else (needs,)
        equations.needs += [Need(use, item, scope, advice) for item in items]
    for node in statements:
        if use is not None and isinstance(node, Define) and node.name in REMARKS:
            continue
        if isinstance(node, (Define, Draw)):
            _base(equations, node, scope, found, layer, before)
        elif isinstance(node, Redefine):
            _prime(equations, node, scope, found)


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
