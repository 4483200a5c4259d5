"""The rule about weights: a weight of the library stands before the residual it belongs to.

The library says it: every strategy of the form `fit' = factor * residual(a, b)` is a weight and the
residual that it is stated for. A spec that writes the same factor before another residual means
another weight than the one it looks like.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

from difftrain.language.algebra import NotLinear, linear
from difftrain.language.finding import Finding, Fix, Label
from difftrain.language.names import Definition, Names
from difftrain.language.operations import KindError
from difftrain.language.rules.case import ALONG, Case, shown
from difftrain.language.scope import Equation
from difftrain.language.term import Term, const, leaf, make
from difftrain.language.tree import Binary, Call, Expr, Name, Negate, Number, Quantity, Redefine

PRED, X0, EPS = (leaf("variable", "field", name=n) for n in ("pred", "x0", "eps"))
COMMUTE = ("+", "*", "==", "!=")


@dataclass(frozen=True)
class Factor:
    """`base ^ exponent`, or one over that where `sign` is -1; no exponent is 1."""

    base: Expr
    exponent: Expr | None = None
    sign: int = 1


@dataclass(frozen=True, eq=False)
class Weight:
    """Factors before a residual `name(a, b)`, and who says so."""

    factors: tuple[Factor, ...]
    residual: Call
    source: Definition | Equation


def wrong_residual(case: Case, found: list[Finding]) -> None:
    """A weight of the library multiplies the residual that it is stated for."""
    meant = [w for d in case.spec.names.definitions("strategy") if d.shipped for w in stated(d)]
    for equation in _written(case):
        for weight in _weights(equation.value, case.spec.names, equation):
            same = [m for m in meant if _same_factor(m, weight)]
            if same and not any(_same_residual(m, weight) for m in same):
                _report(case, same[0], weight, found)


def stated(definition: Definition) -> list[Weight]:
    """The weights that a strategy states."""
    primes = [s for s in definition.node.body if isinstance(s, Redefine) and s.name == "fit"]
    return [w for s in primes for w in _weights(s.value, definition.home, definition)]


def _written(case: Case) -> list[Equation]:
    versions = case.objective.equations.versions
    every = [e for name in ("fit", "loss") for e in versions[name]]
    return [e for e in every if not e.scope.home.shipped]


def _weights(expr: Expr, names: Names, source) -> Iterator[Weight]:
    """The weighted residuals of which an expression is the sum."""
    if isinstance(expr, Binary) and expr.op in ("+", "-"):
        yield from _weights(expr.left, names, source)
        yield from _weights(expr.right, names, source)
        return
    factors = list(_factors(expr, 1))
    residuals = [f for f in factors if _is_residual(f, names)]
    if len(residuals) == 1 and len(factors) > 1:
        rest = tuple(f for f in factors if f is not residuals[0])
        yield Weight(rest, residuals[0].base, source)


def _is_residual(factor: Factor, names: Names) -> bool:
    call = factor.base
    if factor.exponent is not None or factor.sign < 0 or not isinstance(call, Call):
        return False
    return len(call.args) == 2 and names.find("function", call.path) is not None


def _factors(expr: Expr, sign: int) -> Iterator[Factor]:
    match expr:
        case Binary(op="*", left=left, right=right):
            yield from _factors(left, sign)
            yield from _factors(right, sign)
        case Binary(op="/", left=left, right=right):
            yield from _factors(left, sign)
            yield from _factors(right, -sign)
        case Binary(op="^", left=base, right=Negate(value=exponent)):
            yield Factor(base, exponent, -sign)
        case Binary(op="^", left=base, right=exponent):
            yield Factor(base, exponent, sign)
        case Number(value=1):
            return
        case _:
            yield Factor(expr, None, sign)


def _same_factor(meant: Weight, weight: Weight) -> bool:
    if len(meant.factors) != len(weight.factors) or len(meant.factors) > 4:
        return False
    free = {f.name for f in meant.source.node.formals}
    return any(
        all(_same_power(m, w, free) for m, w in zip(meant.factors, order, strict=True))
        for order in permutations(weight.factors)
    )


def _same_power(meant: Factor, written: Factor, free: set[str]) -> bool:
    if meant.sign != written.sign or not _matches(meant.base, written.base, free):
        return False
    if None in (meant.exponent, written.exponent):
        exponent = meant.exponent or written.exponent
        return exponent is None or (isinstance(exponent, Name) and exponent.dotted in free)
    return _matches(meant.exponent, written.exponent, free)


def _matches(meant: Expr, written: Expr, free: set[str]) -> bool:
    """Whether an expression is the library's, with any number or name for its parameters."""
    match meant, written:
        case Name(path=(name,)), _ if name in free:
            return isinstance(written, (Number, Quantity, Name, Negate))
        case Binary(op=a, left=l1, right=r1), Binary(op=b, left=l2, right=r2) if a == b:
            return _pair((l1, r1), (l2, r2), free, a in COMMUTE)
        case Call(path=a, args=(x1, y1)), Call(path=b, args=(x2, y2)) if a == b:
            return _pair((x1.value, y1.value), (x2.value, y2.value), free, a[0] in ("min", "max"))
    return meant == written


def _pair(meant, written, free: set[str], swap: bool) -> bool:
    orders = (written, written[::-1]) if swap else (written,)
    return any(all(_matches(m, w, free) for m, w in zip(meant, o, strict=True)) for o in orders)


def _same_residual(meant: Weight, weight: Weight) -> bool:
    ours, theirs = ([a.value for a in w.residual.args] for w in (meant, weight))
    return meant.residual.path == weight.residual.path and ours in (theirs, theirs[::-1])


# ---- what is wrong, in numbers


def _report(case: Case, meant: Weight, weight: Weight, found: list[Finding]) -> None:
    numbers = _numbers(case, meant, weight)
    if numbers is None:
        return
    written, right = weight.residual.span, " ".join(meant.residual.span.text.split())
    t, intended, actual = numbers
    because = (
        f"at t = {shown(t)} the weight of (pred - target)^2 is {shown(actual)}, "
        f"and `{meant.source.name}` means {shown(intended)}"
    )
    text = f"this is the weight of `{right}`, not of `{' '.join(written.text.split())}`"
    hint = f"write `{right}`, or `strategy = {meant.source.name}`"
    fix = Fix(written, right)
    found.append(Finding("DIF209", text, Label(written), because=because, help=hint, fix=fix))


def _numbers(case: Case, meant: Weight, weight: Weight) -> tuple[float, float, float] | None:
    """(t, the weight that is meant, the one that is written) of (pred - target)^2; None where the
    two agree or cannot be told."""
    scope = weight.source.scope
    slopes = [_slope(case, w.residual, scope) for w in (meant, weight)]
    if None in slopes:
        return None
    at = case.times.values[1:-1] or case.times.values
    rows = case.along(*slopes, at=at)
    differ = [t for t, (a, b) in zip(at, rows, strict=True) if not math.isclose(a * a, b * b)]
    factor = _value(case, weight, scope)
    if not differ or factor is None:
        return None
    t = differ[len(differ) // 2]
    a, b, f = case.along(*slopes, factor, at=[t])[0]
    return t, f * a * a, f * b * b


def _slope(case: Case, residual: Call, scope) -> Term | None:
    """How fast the residual's difference moves with the prediction, everything else standing."""
    world = ALONG.swap({"pred": PRED, "x0": X0, "eps": EPS})
    sides = [case.expression(a.value, scope, world) for a in residual.args]
    if None in sides:
        return None
    try:
        return linear(make("sub", *sides), frozenset((PRED, X0, EPS))).get(PRED, const(0))
    except (NotLinear, KindError):
        return None


def _value(case: Case, weight: Weight, scope) -> Term | None:
    """The product of a weight's factors."""
    product = const(1)
    for factor in weight.factors:
        base = case.expression(factor.base, scope, ALONG)
        exponent = const(1)
        if factor.exponent is not None:
            exponent = case.expression(factor.exponent, scope, ALONG)
        if base is None or exponent is None:
            return None
        power = base if factor.exponent is None else base**exponent
        product = product * power if factor.sign > 0 else product / power
    return product
