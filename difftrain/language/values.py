"""Values of slots and options: numbers, texts, words, lists and parts, read while compiling."""

from __future__ import annotations

from difftrain.language.derive import Derivation
from difftrain.language.finding import Finding, Label
from difftrain.language.names import Names
from difftrain.language.nearest import nearest
from difftrain.language.part import Part
from difftrain.language.scope import Equations, Scope, Use, choices, formals, lineage
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
from difftrain.language.uses import PART_KINDS, bind, use_of
from difftrain.language.worlds import HERE, Frame, Problem

# ---- parts

FOR_RULES = ("reads", "together")  # what a block says for rules: quantities, and options


def read_part(use: Use, equations: Equations, found: list[Finding], uses: list[Use]) -> Part:
    """The part that a use of a backbone, encoder or codec block declares."""
    definition = use.definition
    uses.append(use)
    options: dict[str, object] = {}
    domains = formals(definition)
    for name, (expr, where) in bind(use, found).items():
        options[name] = read_option(domains[name][0], expr, where, equations, found, uses)
    line = lineage(definition)
    module = next((d.name for d in reversed(line) if d.shipped), definition.name)
    for block in line:
        for node in block.node.body:
            if isinstance(node, Define) and node.name == "module":
                module = node.value.value if isinstance(node.value, Text) else node.value.dotted
            elif isinstance(node, Define) and node.name not in FOR_RULES:
                local = Scope(use.label, block.home, {n: n for n in options})
                options[node.name] = read_value(node.value, local, equations, found, (), uses)
    return Part(definition.kind, module, options)


def read_option(formal: Formal, expr: Expr, scope: Scope, equations, found, uses=None):
    """The value of an option or argument, checked against what it may be."""
    words = choices(formal)
    word = isinstance(expr, Name) and scope.home.find("param", expr.path) is None
    if words and word and expr.dotted not in words:
        check_domain(formal, expr, expr.dotted, found)
        return None
    before = len(found)
    value = read_value(expr, scope, equations, found, words, uses)
    if len(found) == before:
        check_domain(formal, expr, value, found)
    return value


def read_value(expr: Expr, scope: Scope, equations, found, words=(), uses=None):
    """The plain value of an option: number, text, word, list, name of a quantity, or part."""
    uses = [] if uses is None else uses
    match expr:
        case ListOf(items=items):
            return tuple(read_value(i, scope, equations, found, words, uses) for i in items)
        case Text(value=value):
            return value
        case Number(value=value) | Quantity(value=value):
            return int(value) if value == int(value) else value
        case Negate(value=Number(value=value)):
            return -int(value) if value == int(value) else -value
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
            found.append(_unknown_part(expr, scope.home, equations))
            return None
    return _number(expr, scope, equations, found)


def _is_quantity(name: str, equations: Equations) -> bool:
    return name in equations.versions or name in equations.quantities


def _inner(path: tuple[str, ...], known: list[str]) -> str | None:
    """The quantity inside a block in use that a name was meant to be."""
    if len(path) == 1:
        return next((n for n in known if n.rpartition(".")[2] == path[0]), None)
    block = [n for n in known if n.startswith(f"{path[0]}.")]
    return nearest(".".join(path), block) or next(iter(block), None)


def _unknown_part(expr, names: Names, equations: Equations) -> Finding:
    inner = [n for n in equations.versions if "." in n and not equations.versions[n][0].argument]
    if meant := _inner(expr.path, inner):
        text = f"there is no `{expr.dotted}`"
        return Finding("DIF120", text, Label(expr.span), help=f"write `{meant}`")
    known = [n for kind in PART_KINDS for n in names.known(kind)]
    close = nearest(expr.dotted, known) or nearest(expr.dotted, equations.quantities)
    hint = f"write `{close}`" if close else "write a value, or the name of a part"
    if len(expr.path) > 1 and expr.path[0] not in names.spaces:
        hint = f"add `import std.{expr.path[0]}` at the top of the file"
    span = expr.head if isinstance(expr, Call) else expr.span
    return Finding("DIF119", f"there is no part `{expr.dotted}`", Label(span), help=hint)


def _number(expr: Expr, scope: Scope, equations: Equations, found: list[Finding]):
    """The number of a constant expression."""
    try:
        term = Derivation(equations).number(expr, Frame(scope, {}, HERE))
    except Problem as problem:
        found.append(problem.finding)
        return None
    if term.op == "const":
        return term.value
    text = f"`{expr.span.text}` must be known when the spec is compiled"
    found.append(Finding("DIF127", text, Label(expr.span), help="write a number"))
    return None


def check_domain(formal: Formal, expr: Expr, value, found: list[Finding]) -> None:
    """A finding where the value is outside what the parameter may be; of a range, either end."""
    if isinstance(expr, Interval) and isinstance(formal.domain, Interval):
        _check_ends(formal, expr, value, found)
        return
    domain = _fitting(formal.domain, value)
    if domain is None or value is None:
        return
    if isinstance(domain, ListOf):
        allowed = [
            i.dotted if isinstance(i, Name) else getattr(i, "value", None) for i in domain.items
        ]
        if value not in allowed:
            listed = ", ".join(f"`{i.span.text}`" for i in domain.items)
            close = nearest(str(value), [str(a) for a in allowed])
            hint = f"write `{close}`" if close else f"it may be {listed}"
            text = f"`{formal.name}` cannot be `{expr.span.text}`"
            found.append(Finding("DIF131", text, Label(expr.span), help=hint))
    elif isinstance(domain, Interval) and isinstance(value, (int, float)):
        low, high = (plain(e) for e in (domain.low, domain.high))
        if None not in (low, high) and low <= high and not low <= value <= high:
            found.append(_outside(formal.name, expr, value, domain))


def _check_ends(formal: Formal, expr: Interval, ends: tuple, found: list[Finding]) -> None:
    low, high = ends
    if None not in ends and low > high:
        text = f"`{formal.name}` cannot run from {low:g} up to {high:g}"
        found.append(Finding("DIF132", text, Label(expr.span), help="write the smaller one first"))
    for end, value in ((expr.low, low), (expr.high, high)):
        check_domain(formal, end, value, found)


def _fitting(domain: Expr | None, value) -> Expr | None:
    """What a value is held against: a list of words may hold a range for numbers as well."""
    items = domain.items if isinstance(domain, ListOf) else ()
    ranges = [item for item in items if isinstance(item, Interval)]
    return ranges[0] if ranges and isinstance(value, (int, float)) else domain


def plain(expr: Expr) -> float | None:
    """The number that an expression is, where it is one that is written out."""
    if isinstance(expr, Negate):
        inner = plain(expr.value)
        return None if inner is None else -inner
    return expr.value if isinstance(expr, (Number, Quantity)) else None


def _outside(name: str, expr: Expr, value, domain: Interval) -> Finding:
    written = expr.span.text
    shown = f"`{written}`" if written == str(value) else f"`{written}`, which is {value},"
    return Finding(
        "DIF130",
        f"`{name}` cannot be {shown.rstrip(',')}",
        Label(expr.span),
        (Label(domain.span, "its range"),),
        because=f"`{name}` is between {domain.low.span.text} and {domain.high.span.text}",
        help=f"choose a value in {domain.span.text}",
    )
