"""Rules about a file: what may stand in which block, and parameters within their ranges."""

from __future__ import annotations

from collections.abc import Iterator

from difftrain.language.derive import Derivation
from difftrain.language.domains import check_domain, plain
from difftrain.language.finding import Finding, Label
from difftrain.language.forms import SPECIAL
from difftrain.language.names import LIBRARY_KINDS, Definition
from difftrain.language.nearest import nearest
from difftrain.language.operations import CONSTANTS, LAWS, OPERATIONS
from difftrain.language.scope import Equations, Scope, base_of
from difftrain.language.spec import Spec
from difftrain.language.tree import (
    Block,
    Define,
    Draw,
    Expr,
    Formal,
    Import,
    Interval,
    ListOf,
    Name,
    Number,
    Param,
    Redefine,
    Statement,
    Text,
)
from difftrain.language.worlds import HERE, Frame, Problem

EQUATIONS = (*LIBRARY_KINDS, "objective")
PARTS = ("backbone", "encoder", "codec", "solver")  # which hold options, and no equations


def statements(spec: Spec, found: list[Finding]) -> None:
    """Every statement stands where it means something, and every name has one equation a block."""
    for block in _blocks(spec):
        seen: dict[str, Define | Draw] = {}
        for node in block.body:
            if reason := _misplaced(node, block.kind in PARTS):
                found.append(_does_not_belong(node, block, reason))
            elif isinstance(node, (Define, Draw)) and node.name in seen:
                found.append(_twice(node, seen[node.name]))
            elif isinstance(node, (Define, Draw)):
                seen[node.name] = node
        if block.kind == "objective" and (block.formals or block.base):
            found.append(_plain_objective(block))


def names(spec: Spec, found: list[Finding]) -> None:
    """No function has the name of something that the language has, and no parameter one that
    equations read instead of it."""
    quantities = {n for o in spec.objectives.values() for n in o.equations.versions}
    taken = {"function": {*OPERATIONS, *LAWS, *SPECIAL, *CONSTANTS}}
    taken["param"] = {*CONSTANTS, *quantities}
    for (kind, name), definition in spec.names.own.items():
        if name not in taken.get(kind, ()) or spec.names.shipped:
            continue
        text = f"`{name}` means something else where equations read it"
        because = "it is a quantity" if name in quantities else "the language has it already"
        at, hint = Label(definition.node.head), f"choose another name, such as `my_{name}`"
        found.append(Finding("DIF101", text, at, because=because, help=hint))


def _blocks(spec: Spec) -> Iterator[Block]:
    return (n for n in spec.tree.body if isinstance(n, Block) and n.kind in EQUATIONS)


def _misplaced(node: Statement, part: bool) -> str:
    match node:
        case Import():
            return "an import"
        case Param():
            return "a parameter"
        case Block(kind=kind):
            return f"a `{kind}` block"
        case Define(formals=formals) if formals is not None:
            return "a function"
        case Draw() if part:
            return "a draw"
        case Redefine() if part:
            return "a redefinition"
    return ""


def _does_not_belong(node: Statement, block: Block, what: str) -> Finding:
    at = Label(getattr(node, "head", node.span))
    title = f"`{block.kind} {block.name or ''}".rstrip() + "`"
    because = f"{title} holds {'options' if block.kind in PARTS else 'equations'} alone"
    text = f"{what} cannot stand inside a block"
    hint = "move it to the top of the file, outside the braces"
    if isinstance(node, (Draw, Redefine)):
        text, hint = f"{what} cannot stand inside {title}", "move it into the objective"
    return Finding("DIF106", text, at, because=because, help=hint)


def _twice(node: Define | Draw, first: Define | Draw) -> Finding:
    return Finding(
        "DIF109",
        f"`{node.name}` has two equations in one block",
        Label(node.head),
        (Label(first.head, "the first one"),),
        because="only one of them can hold",
        help=f"delete one, or write `{node.name}' = …` to change the first",
    )


def _plain_objective(block: Block) -> Finding:
    text = "an objective takes no arguments and is made from nothing"
    hint = "write `param name = value` above it for what should vary"
    return Finding("DIF129", text, Label(block.head), help=hint)


def bases(spec: Spec, found: list[Finding]) -> None:
    """Every block is made from one that exists, and not from itself."""
    told: set[Definition] = set()
    for definition in spec.names.own.values():
        node = definition.node
        if not isinstance(node, Block) or node.base is None:
            continue
        line = [definition]
        while (base := base_of(line[-1])) and base not in line:
            line.append(base)
        if base is definition and definition not in told:
            told.update(line)
            names = " -> ".join(d.name for d in [*line, definition])
            text = f"`{node.name}` is made from itself: {names}"
            found.append(Finding("DIF122", text, Label(node.head), help="take out one `from`"))
        elif len(line) == 1:
            found.append(_no_base(definition, ".".join(node.base)))


def _no_base(definition: Definition, name: str) -> Finding:
    kind = definition.kind
    known = definition.home.known(kind)
    close = nearest(name, known)
    hint = f"write `from {close}`" if close else "there are " + ", ".join(f"`{n}`" for n in known)
    text = f"there is no {kind} `{name}` to make `{definition.name}` from"
    return Finding("DIF119", text, Label(definition.node.head), help=hint)


def ranges(spec: Spec, found: list[Finding]) -> None:
    """What stands behind `in` is a range of numbers or a list of words."""
    for definition in spec.names.own.values():
        node = definition.node
        formals = (node,) if isinstance(node, Param) else getattr(node, "formals", None) or ()
        found += [_no_range(f) for f in formals if f.domain is not None and not _is_range(f.domain)]


def _is_range(domain: Expr) -> bool:
    match domain:
        case Name(path=("process",)):
            return True  # the parameter is a process itself
        case Interval(low=low, high=high):
            ends = plain(low), plain(high)
            return None not in ends and ends[0] <= ends[1]
        case ListOf(items=items):
            words = [i for i in items if not isinstance(i, Interval)]
            whole = all(_is_range(i) for i in items if isinstance(i, Interval))
            return whole and all(isinstance(i, (Name, Number, Text)) for i in words)
    return False


def _no_range(formal: Formal | Param) -> Finding:
    text = f"`{formal.domain.span.text}` is not a range"
    hint = "write `low..high` with two numbers, the smaller one first, or `[word, word]`"
    return Finding("DIF132", text, Label(formal.domain.span), help=hint)


def parameters(spec: Spec, found: list[Finding]) -> None:
    """Every parameter is within the range that it states."""
    for definition in spec.names.own.values():
        node = definition.node
        if not isinstance(node, Param) or node.domain is None:
            continue
        frame = Frame(Scope("", spec.names), {}, HERE)
        try:
            term = Derivation(Equations()).number(node.default, frame)
        except Problem:
            continue  # said where the parameter is read
        if term.op == "const":
            check_domain(node, node.default, term.value, found)
