"""Derivatives of terms in one variable, symbolically."""

from __future__ import annotations

import math

from difftrain.language.term import Term, const, is_const, make, rebuild, walk


class NoDerivative(Exception):
    """The term has no derivative; the message says which part."""


def _pow(a: Term, b: Term, da: Term, db: Term) -> Term:
    if is_const(db, 0):
        return b * make("pow", a, b - 1) * da
    log_a = make("log", a)
    return make("pow", a, b) * (db * log_a + b * da / a)


# The slope of each operation, given its arguments and their slopes.
SLOPES = {
    "add": lambda a, b, da, db: da + db,
    "sub": lambda a, b, da, db: da - db,
    "mul": lambda a, b, da, db: da * b + a * db,
    "div": lambda a, b, da, db: da / b if is_const(db, 0) else (da * b - a * db) / b**2,
    "pow": _pow,
    "neg": lambda a, da: -da,
    "exp": lambda a, da: make("exp", a) * da,
    "expm1": lambda a, da: make("exp", a) * da,
    "log": lambda a, da: da / a,
    "sqrt": lambda a, da: da / (2 * make("sqrt", a)),
    "sin": lambda a, da: make("cos", a) * da,
    "cos": lambda a, da: -make("sin", a) * da,
    "tan": lambda a, da: da / make("cos", a) ** 2,
    "atan": lambda a, da: da / (1 + a**2),
    "acos": lambda a, da: -da / make("sqrt", 1 - a**2),
    "erf": lambda a, da: 2 / math.sqrt(math.pi) * make("exp", -(a**2)) * da,
    "sigmoid": lambda a, da: make("sigmoid", a) * (1 - make("sigmoid", a)) * da,
    "abs": lambda a, da: make("where", make("lt", a, const(0)), -da, da),
    "min": lambda a, b, da, db: make("where", make("lt", a, b), da, db),
    "max": lambda a, b, da, db: make("where", make("lt", a, b), db, da),
    "stop": lambda a, da: const(0),
}


def derivative(term: Term, variable: Term) -> Term:
    """d term / d variable. Raises NoDerivative for tables, floors and other steps."""
    slopes: dict[Term, Term] = {}
    for part in walk(term):
        slopes[part] = _slope(part, variable, slopes)
    return slopes[term]


def _slope(part: Term, variable: Term, slopes: dict[Term, Term]) -> Term:
    if part is variable:
        return const(1)
    below = [slopes[a] for a in part.args]
    if all(is_const(d, 0) for d in below):
        return const(0)
    if part.op == "inverse":
        body, inner = part.args[:2]
        slope = derivative(body, inner)
        return slopes[part.args[2]] / rebuild(slope, lambda t, args: part if t is inner else None)
    if part.op == "where":
        return make("where", part.args[0], *below[1:])
    if part.op not in SLOPES:
        name = "a table" if part.op == "pick" else f"`{part.op}`"
        raise NoDerivative(f"{name} has no derivative in `t`")
    return SLOPES[part.op](*part.args, *below)
