"""Values of slots and options: numbers, texts, words, lists and parts, read while compiling."""

from __future__ import annotations

from difftrain.language.derive import Derivation
from difftrain.language.domains import check_domain, is_number
from difftrain.language.finding import Finding, Label
from difftrain.language.names import Names
from difftrain.language.nearest import nearest
from difftrain.language.part import Part, written
from difftrain.language.scope import WHOLE, Equations, Scope, Use, choices, formals, lineage
from difftrain.language.tree import (
    Call,
    Define,
    Expr,
    Formal,
    Interval,
    ListOf,
    Name,
    Negate,
    Number,
    Quantity,
    Text,
)
from difftrain.language.uses import PART_KINDS, bind, listed, not_a, unknown, use_of
from difftrain.language.worlds import HERE, Frame, Problem

# ---- parts

FOR_RULES = ("reads", "together", "between", "levels", WHOLE)  # what a block says for rules
LISTED = ("times", "inputs")  # options of a network that name quantities


def read_part(use: Use, equations: Equations, found: list[Finding], uses: list[Use]) -> Part:
    """The part that a use of a backbone, encoder or codec block declares."""
    definition = use.definition
    uses.append(use)
    options: dict[str, object] = {}
    said: list[str] = []
    domains = formals(definition)
    for name, (expr, where) in bind(use, found).items():
        formal = domains[name][0]
        options[name] = read_option(formal, expr, where, equations, found, uses)
        bare = {*choices(formal), *equations.versions, *equations.quantities}
        said.append(f"{name} = {written(options[name], bare)}")
    line = lineage(definition)
    module = next((d.name for d in reversed(line) if d.shipped), definition.name)
    for block in line:
        for node in block.node.body:
            if isinstance(node, Define) and node.name == "module":
                module = _module(node.value, found)
            elif isinstance(node, Define) and node.name not in FOR_RULES:
                local = Scope(use.label, block.home, {n: n for n in options})
                options[node.name] = read_value(node.value, local, equations, found, (), uses)
    return Part(definition.kind, module, options, use.call.dotted, ", ".join(said))


def _module(expr: Expr, found: list[Finding]) -> str:
    """What makes a part: a name of ours, or a place in Python."""
    if isinstance(expr, Text):
        return expr.value
    if not isinstance(expr, Name):
        found.append(not_a("module", expr, 'write a name, or a text such as `"file:function"`'))
        return ""
    return expr.dotted


def read_option(formal: Formal, expr: Expr, scope: Scope, equations, found, uses=None):
    """The value of an option or argument, checked against what it may be."""
    words = choices(formal)
    word = isinstance(expr, Name) and scope.home.find("param", expr.path) is None
    number = isinstance(formal.domain, Interval) and not _is_quantity(expr.span.text, equations)
    if word and (number or words) and expr.dotted not in words:
        check_domain(formal, expr, expr.dotted, found)
        return None
    before = len(found)
    wanted = "quantity" if formal.name in LISTED else "part"
    wanted = formal.name if formal.name in PART_KINDS else wanted
    value = read_value(expr, scope, equations, found, words, uses, wanted)
    if len(found) == before and wanted in PART_KINDS:
        _check_kind(wanted, expr, value, scope.home, found)
    elif len(found) == before:
        check_domain(formal, expr, value, found)
    return value if len(found) == before else None


def _check_kind(kind: str, expr: Expr, value, names: Names, found: list[Finding]) -> None:
    """A finding where an option that is called after a kind of part holds something else."""
    if isinstance(value, Part) and value.kind == kind:
        return
    hint = listed(names.known(kind))
    if kind == "solver" and isinstance(value, str) and ":" in value:  # a function from Python
        block = f'solver own from euler {{ module = "{value}" }}'
        hint = f"write `{block}` at the top of the file, and `own` here"
    found.append(not_a(kind, expr, hint))


def read_value(expr: Expr, scope: Scope, equations, found, words=(), uses=None, wanted="part"):
    """The plain value of an option: number, text, word, list, name of a quantity, or part. A name
    that is not known is spoken of as what is `wanted`."""
    uses = [] if uses is None else uses
    match expr:
        case ListOf(items=items):
            return tuple(read_value(i, scope, equations, found, words, uses, wanted) for i in items)
        case Text(value=value):
            return value
        case Number(value=value) | Quantity(value=value):
            return _plain(value)
        case Negate(value=Number(value=value)):
            return _plain(-value)
        case Interval(low=low, high=high):
            return tuple(read_value(end, scope, equations, found) for end in (low, high))
        case Name(path=("true",)):
            return True
        case Name(path=("false",)):
            return False
        case Name() if expr.dotted in words:
            return expr.dotted
        case Name() | Call():
            for kind in PART_KINDS:
                if scope.home.find(kind, expr.path) is not None:
                    return read_part(use_of(expr, kind, scope, found), equations, found, uses)
            if isinstance(expr, Name):
                parameter = scope.home.find("param", expr.path)
                if parameter is not None:
                    return read_value(parameter.node.default, scope, equations, found)
                if _is_quantity(expr.dotted, equations):
                    return expr.dotted
            found.append(_unknown(expr, wanted, scope.home, equations))
            return None
    return _number(expr, scope, equations, found)


def _plain(value):
    """A number that is whole as an int, whatever it was computed from."""
    return int(value) if is_number(value) and float(value).is_integer() else value


def _is_quantity(name: str, equations: Equations) -> bool:
    return name in equations.versions or name in equations.quantities


def _inner(path: tuple[str, ...], known: list[str]) -> str | None:
    """The quantity inside a block in use that a name was meant to be."""
    if len(path) == 1:
        return next((n for n in known if n.rpartition(".")[2] == path[0]), None)
    block = [n for n in known if n.startswith(f"{path[0]}.")]
    return nearest(".".join(path), block) or next(iter(block), None)


def _unknown(expr: Name | Call, wanted: str, names: Names, equations: Equations) -> Finding:
    inner = [n for n in equations.versions if "." in n and not equations.versions[n][0].argument]
    if meant := _inner(expr.path, inner):
        text = f"there is no `{expr.dotted}`"
        return Finding("DIF120", text, Label(expr.span), help=f"write `{meant}`")
    if wanted in PART_KINDS:
        return unknown(expr, wanted, names)
    parts = [n for kind in PART_KINDS for n in names.known(kind)] if wanted == "part" else []
    close = nearest(expr.dotted, parts) or nearest(expr.dotted, equations.quantities)
    hint = f"write `{close}`" if close else OTHERWISE[wanted]
    if wanted == "part" and len(expr.path) > 1 and expr.path[0] not in names.spaces:
        hint = f"add `import std.{expr.path[0]}` at the top of the file"
    span = expr.head if isinstance(expr, Call) else expr.span
    return Finding("DIF119", f"there is no {wanted} `{expr.dotted}`", Label(span), help=hint)


OTHERWISE = {
    "part": "write a value, or the name of a part",
    "quantity": "name a quantity of the objective, or define this one",
}


def _number(expr: Expr, scope: Scope, equations: Equations, found: list[Finding]):
    """The number of a constant expression."""
    try:
        term = Derivation(equations).number(expr, Frame(scope, {}, HERE))
    except Problem as problem:
        found.append(problem.finding)
        return None
    if term.op == "const":
        return _plain(term.value)
    text = f"`{expr.span.text}` must be known when the spec is compiled"
    found.append(Finding("DIF127", text, Label(expr.span), help="write a number"))
    return None
