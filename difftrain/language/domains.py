"""What a parameter may be: a range of numbers, or a list of words."""

from __future__ import annotations

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
    Quantity,
)

COUNTED = ("batch", "count", "keep", "seed", "size", "steps", "warmup")  # options, beside:
COUNTED += ("log_every", "sample_every", "save_every", "snapshots_every")


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
    elif formal.name in COUNTED and isinstance(value, float):
        text = f"`{formal.name}` is a whole number, and `{expr.span.text}` is none"
        hint = f"write a whole number in {domain.span.text}"
        found.append(Finding("DIF124", text, Label(expr.span), help=hint))
    elif isinstance(domain, Interval) and isinstance(value, (int, float)):
        low, high = (plain(e) for e in (domain.low, domain.high))
        if None not in (low, high) and low <= high and not low <= value <= high:
            found.append(_outside(formal.name, expr, value, domain))
    elif isinstance(domain, Interval) and not isinstance(value, tuple):
        text = f"`{formal.name}` is a number, and `{expr.span.text}` is none"
        hint = f"write a number in {domain.span.text}"
        found.append(Finding("DIF124", text, Label(expr.span), help=hint))


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
