"""The algebra of objectives: linear forms, and products that cancel before anything is evaluated.

A coefficient is kept as a product `c * a^p * b^q * ...` of powers. Its bases are terms that the
caller calls atoms (alpha, sigma, ...), opaque terms, or sums that have no common factor. So
`snr^-0.5 * (alpha / sigma)^2` becomes `alpha / sigma` and nothing is 0/0 at the ends of a process.
All bases stand for numbers >= 0 where a power is moved into `min` or split over a product; that
holds for alpha and sigma, and only they are moved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

from difftrain.language.term import Term, const, is_const, make


class NotLinear(Exception):
    """The term is not linear in the unknowns; `term` is the part that is not."""

    def __init__(self, term: Term):
        self.term = term
        super().__init__(str(term))


# ---- linear forms


def linear(term: Term, unknowns: frozenset[Term]) -> dict[Term, Term]:
    """The coefficient of each unknown in a term that is a sum of multiples of them.

    Raises NotLinear where an unknown is under anything but + - * / and `if`, or where a part
    free of the unknowns is added.
    """
    if term in unknowns:
        return {term: const(1)}
    if is_const(term, 0):
        return {}
    match term.op:
        case "add" | "sub":
            left, right = (linear(a, unknowns) for a in term.args)
            zero = const(0)
            keys = [*left, *(k for k in right if k not in left)]
            return {k: make(term.op, left.get(k, zero), right.get(k, zero)) for k in keys}
        case "neg":
            return {k: make("neg", v) for k, v in linear(term.args[0], unknowns).items()}
        case "mul":
            factor, rest = sorted(term.args, key=lambda a: reaches(a, unknowns))
            if not reaches(factor, unknowns):
                return {k: make("mul", factor, v) for k, v in linear(rest, unknowns).items()}
        case "div" if not reaches(term.args[1], unknowns):
            parts = linear(term.args[0], unknowns)
            return {k: make("div", v, term.args[1]) for k, v in parts.items()}
        case "where" if not reaches(term.args[0], unknowns):
            left, right = (linear(a, unknowns) for a in term.args[1:])
            zero = const(0)
            keys = [*left, *(k for k in right if k not in left)]
            return {
                k: make("where", term.args[0], left.get(k, zero), right.get(k, zero)) for k in keys
            }
    raise NotLinear(term)


def reaches(term: Term, leaves) -> bool:
    """Whether one of the leaves is under the term; `numel` of it says nothing of its value."""
    seen, stack = set(), [term]
    while stack:
        top = stack.pop()
        if top in leaves:
            return True
        if top not in seen:
            seen.add(top)
            stack.extend(() if top.op == "numel" else top.args)
    return False


# ---- products


@dataclass(frozen=True)
class Product:
    """`factor * product(base ** exponent)`; a base is a Term or a Sum."""

    factor: float
    powers: tuple[tuple[object, float], ...] = ()

    def __mul__(self, other: Product) -> Product:
        powers = dict(self.powers)
        for base, exponent in other.powers:
            powers[base] = powers.get(base, 0) + exponent
        return _product(self.factor * other.factor, powers)

    def __pow__(self, exponent: float) -> Product:
        factor = self.factor**exponent
        return _product(factor, {b: e * exponent for b, e in self.powers})

    def __add__(self, other: Product) -> Product:
        return add((self, other))


@dataclass(frozen=True)
class Sum:
    """Two or more products without a common factor."""

    parts: frozenset[Product]


def _product(factor: float, powers: dict) -> Product:
    if factor == 0:
        return Product(0.0)
    kept = {b: e for b, e in powers.items() if e != 0}
    return Product(factor, tuple(sorted(kept.items(), key=lambda item: id(item[0]))))


def _key(product: Product) -> frozenset:
    return frozenset(product.powers)


def add(products) -> Product:
    """The sum, with what all parts share taken out in front."""
    gathered: dict[frozenset, float] = {}
    for part in (p for product in products for p in _spread(product)):
        gathered[_key(part)] = gathered.get(_key(part), 0.0) + part.factor
    parts = [_product(f, dict(k)) for k, f in gathered.items() if f != 0]
    if not parts:
        return Product(0.0)
    if len(parts) == 1:
        return parts[0]
    bases = {b for p in parts for b, _ in p.powers}
    shared = {b: min(dict(p.powers).get(b, 0) for p in parts) for b in bases}
    common = _product(1.0, shared)
    inner = frozenset(p * common**-1 for p in parts)
    return common * Product(1.0, ((_intern(Sum(inner)), 1.0),))


def _spread(product: Product):
    """The parts of a plain sum, so that sums of sums are flat."""
    match product.powers:
        case ((Sum(parts), 1.0),):
            return [Product(product.factor) * p for p in parts]
    return [product]


_sums: dict[Sum, Sum] = {}


def _intern(total: Sum) -> Sum:
    return _sums.setdefault(total, total)


OPENED = ("add", "sub", "mul", "div", "neg", "sqrt", "pow", "where", "min", "max")


def product(term: Term, atoms: frozenset[Term] = frozenset()) -> Product:
    """The term as a product of powers. What has no such form is a base of its own."""
    if term in atoms:
        return Product(1.0, ((term, 1.0),))
    parts = [product(a, atoms) for a in term.args] if term.op in OPENED else []
    match term.op:
        case "const" if math.isfinite(term.value):
            return Product(float(term.value))
        case "mul":
            return reduce(Product.__mul__, parts)
        case "div":
            left, right = parts
            if right.factor != 0:
                return left * right**-1
        case "add":
            return add(parts)
        case "sub":
            left, right = parts
            return left + Product(-1.0) * right
        case "neg":
            return Product(-1.0) * parts[0]
        case "sqrt":
            return _root(term, parts[0], 0.5)
        case "pow" if term.args[1].op == "const":
            return _root(term, parts[0], float(term.args[1].value))
        case "where" | "min" | "max":
            inner = [term.args[0]] if term.op == "where" else []
            rest = [back(p) for p in parts[len(inner) :]]
            return Product(1.0, ((make(term.op, *inner, *rest), 1.0),))
    return Product(1.0, ((term, 1.0),))


def _root(term: Term, base: Product, exponent: float) -> Product:
    if base.factor > 0 or (base.factor < 0 and exponent == int(exponent)):
        return base**exponent
    return Product(1.0, ((term, 1.0),))


def back(value: Product, atoms: frozenset[Term] = frozenset()) -> Term:
    """The term of a product, with factors moved into `min`, `max` and `if`, where they cancel."""
    for base, exponent in value.powers:
        if isinstance(base, Term) and base.op in ("min", "max", "where") and exponent == 1:
            outside = value * Product(1.0, ((base, -1.0),))
            if outside.powers and (base.op == "where" or _positive(outside, atoms)):
                test, sides = base.args[:-2], base.args[-2:]
                return make(
                    base.op, *test, *(back(product(a, atoms) * outside, atoms) for a in sides)
                )
    above = [(b, e) for b, e in value.powers if e > 0]
    below = [(b, -e) for b, e in value.powers if e < 0]
    top = _times(value.factor, above)
    return make("div", top, _times(1.0, below)) if below else top


def _positive(outside: Product, atoms: frozenset[Term]) -> bool:
    return outside.factor > 0 and all(b in atoms or e % 2 == 0 for b, e in outside.powers)


def _times(factor: float, powers) -> Term:
    ordered = sorted(powers, key=lambda item: str(_base(item[0])))
    result = const(int(factor) if factor == int(factor) else factor)
    for base, exponent in ordered:
        exponent = int(exponent) if exponent == int(exponent) else exponent
        result = make("mul", result, make("pow", _base(base), const(exponent)))
    return result


def _base(base) -> Term:
    if isinstance(base, Term):
        return base
    parts = sorted((back(p) for p in base.parts), key=lambda t: (t.op == "neg", str(t)))
    return reduce(lambda a, b: make("add", a, b), parts)


def simplify(term: Term, atoms: frozenset[Term] = frozenset(), known=lambda term: None) -> Term:
    """An equal term with common powers cancelled; atoms are left whole.

    `known(term)` may give the number that a sum always equals (alpha^2 + sigma^2 on a circle).
    """
    return back(settle(product(term, atoms), known), atoms)


def settle(value: Product, known) -> Product:
    """The product with sums replaced by the number they always equal."""
    result = Product(value.factor)
    for base, exponent in value.powers:
        number = known(_base(base)) if isinstance(base, Sum) else None
        plain = Product(1.0, ((base, 1.0),)) if number is None else Product(number)
        result = result * plain**exponent
    return result


# ---- leaves of linear forms


def linear_leaves(term: Term, whole: frozenset[Term] = frozenset()) -> frozenset[Term]:
    """The fields that a field is a linear combination of; `whole` are not looked into."""
    found, stack = set(), [term]
    while stack:
        top = stack.pop()
        if top.kind in ("scalar", "sample"):
            continue
        parts = () if top in whole else _linear_parts(top)
        stack.extend(parts)
        if not parts:
            found.add(top)
    return frozenset(found)


def _linear_parts(term: Term) -> tuple[Term, ...]:
    """What a field is put together from, if it is a sum or a multiple of something."""
    numbers = [a.kind in ("scalar", "sample") for a in term.args]
    match term.op:
        case "add" | "sub" | "neg" if not any(numbers):  # what a number is added to is no multiple
            return term.args
        case "mul" if any(numbers):
            return term.args
        case "div" if numbers[1]:
            return term.args[:1]
    return ()
