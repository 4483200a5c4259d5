"""What a parameter may be: a range of numbers, or a list of words."""

from __future__ import annotations

from collections.abc import Iterator

from difftrain.language.finding import Finding, Label
from difftrain.language.nearest import nearest
from difftrain.language.tree import (
    Expr,
    Formal,
    Interval,
    ListOf,
    Name,
    Negate,
    Number,
    Param,
    Quantity,
)


def check_domain(formal: Formal | Param, expr: Expr, value, found: list[Finding]) -> None:
    """Findings where the value is outside what the parameter may be; of a range or a list, each of
    its numbers."""
    domain = _fitting(formal.domain, value)
    broken = [*_broken(expr, value)] if isinstance(formal, Formal) and formal.whole else []
    if value is None:
        return
    if broken:
        found.append(_fraction(formal.name, expr, broken[0], domain))
    elif isinstance(domain, ListOf) and value not in _allowed(domain):
        found.append(_no_choice(formal.name, expr, value, domain))
    elif isinstance(domain, Interval) and isinstance(value, tuple):
        found += _several(formal, expr, value, domain)
    elif isinstance(domain, Interval):
        found += _one(formal, expr, value, domain)


def _allowed(words: ListOf) -> list:
    items = words.items
    return [_word(i) if isinstance(i, Name) else getattr(i, "value", None) for i in items]


def _word(name: Name) -> str | bool:
    return {"true": True, "false": False}.get(name.dotted, name.dotted)


def _no_choice(name: str, expr: Expr, value, words: ListOf) -> Finding:
    listed = ", ".join(f"`{i.span.text}`" for i in words.items)
    close = nearest(str(value), [str(a) for a in _allowed(words)])
    hint = f"write `{close}`" if close else f"it may be {listed}"
    text = f"`{name}` cannot be `{expr.span.text}`"
    return Finding("DIF131", text, Label(expr.span), help=hint)


def _several(formal: Formal, expr: Expr, values: tuple, domain: Interval) -> Iterator[Finding]:
    """A range is for what is a range by default, a list for what is a list or a range."""
    usual = formal.default
    if not isinstance(usual, (Interval, ListOf)):
        yield _none(formal.name, "a number", expr, domain)
    elif isinstance(usual, Interval) and len(values) != 2:
        yield _none(formal.name, "a range", expr, domain)
    elif isinstance(usual, ListOf) and isinstance(expr, Interval):
        yield _none(formal.name, "a list of numbers", expr, domain)
    else:
        for part, value in zip(_parts(expr, values), values, strict=True):
            yield from _one(formal, part, value, domain)
        if isinstance(usual, Interval) and all(map(is_number, values)) and values[0] > values[1]:
            yield _descending(formal.name, expr, values)


def _parts(expr: Expr, values: tuple) -> tuple[Expr, ...]:
    """Where each of several numbers stands; that of a parameter is where the parameter is read."""
    match expr:
        case Interval(low=low, high=high):
            return low, high
        case ListOf(items=items):
            return items
    return (expr,) * len(values)


def _descending(name: str, expr: Expr, ends: tuple) -> Finding:
    text = f"`{name}` cannot run from {ends[0]:g} up to {ends[1]:g}"
    return Finding("DIF132", text, Label(expr.span), help="write the smaller one first")


def _one(formal: Formal, expr: Expr, value, domain: Interval) -> Iterator[Finding]:
    low, high = plain(domain.low), plain(domain.high)
    if not is_number(value):
        yield _none(formal.name, "a number", expr, domain)
    elif None not in (low, high) and low <= high and not low <= value <= high:
        yield _outside(formal.name, expr, value, domain)


def _broken(expr: Expr, value) -> Iterator[Expr]:
    """Where a number stands that is not whole."""
    several = isinstance(value, tuple)
    each = zip(_parts(expr, value), value, strict=True) if several else [(expr, value)]
    return (part for part, v in each if is_number(v) and not float(v).is_integer())


def _fraction(name: str, expr: Expr, part: Expr, domain: Expr | None) -> Finding:
    what = "holds whole numbers" if isinstance(expr, ListOf) else "is a whole number"
    text = f"`{name}` {what}, and `{part.span.text}` is none"
    hint = "write a whole number" + (f" in {domain.span.text}" if domain else "")
    return Finding("DIF124", text, Label(part.span), help=hint)


def _none(name: str, what: str, expr: Expr, domain: Interval) -> Finding:
    text = f"`{name}` is {what}, and `{expr.span.text}` is none"
    hint = f"write {what} in {domain.span.text}"
    return Finding("DIF124", text, Label(expr.span), help=hint)


def is_number(value: object) -> bool:
    """Whether a value is a number; a truth value is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _fitting(domain: Expr | None, value) -> Expr | None:
    """What a value is held against: a list of words may hold a range for numbers as well."""
    items = domain.items if isinstance(domain, ListOf) else ()
    ranges = [item for item in items if isinstance(item, Interval)]
    return ranges[0] if ranges and is_number(value) else domain


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
