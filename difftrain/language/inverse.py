"""Solving `body(variable) = value` for the variable: in closed form where it stands in one place,
else by bisection when the step runs (the operation `inverse`)."""

from __future__ import annotations

import math

from difftrain.language.numbers import between
from difftrain.language.numbers import value as number_of
from difftrain.language.term import Term, const, is_const, leaf, make, rebuild, walk

# What undoes an operation of one argument; of two, where the left or the right one is unknown.
LEFT = {
    "neg": lambda v, _: -v,
    "exp": lambda v, _: make("log", v),
    "expm1": lambda v, _: make("log", 1 + v),
    "log": lambda v, _: make("exp", v),
    "sqrt": lambda v, _: v**2,
    "cos": lambda v, _: make("acos", v),
    "tan": lambda v, _: make("atan", v),
    "atan": lambda v, _: make("tan", v),
    "sigmoid": lambda v, _: make("log", v / (1 - v)),
    "add": lambda v, b: v - b,
    "sub": lambda v, b: v + b,
    "mul": lambda v, b: v / b,
    "div": lambda v, b: v * b,
    "pow": lambda v, b: make("pow", v, 1 / b),
}
RIGHT = {
    "add": lambda v, a: v - a,
    "sub": lambda v, a: a - v,
    "mul": lambda v, a: v / a,
    "div": lambda v, a: a / v,
    "pow": lambda v, a: make("log", v) / make("log", a),
}


def solved(body: Term, variable: Term, value: Term, low: float, high: float) -> Term:
    """The term of the variable between low and high at which the body has the value."""
    found = isolated(once(body, variable), variable, value)
    if found is not None and _holds(body, variable, found, value, low, high):
        return found
    return leaf("inverse", value.kind, body, variable, value, const(low), const(high))


def isolated(body: Term, variable: Term, value: Term) -> Term | None:
    """The variable in closed form; None where it stands in two places, or under what cannot be
    undone."""
    while body is not variable:
        moving = [variable in set(walk(a)) for a in body.args]
        if sum(moving) != 1:
            return None
        table = LEFT if moving[0] else RIGHT
        if body.op not in table or len(body.args) > 2:
            return None
        other = body.args[moving.index(False)] if len(body.args) == 2 else None
        value = table[body.op](value, other)
        body = body.args[moving.index(True)]
    return value


def once(body: Term, variable: Term) -> Term:
    """The body with the ratios of a path written so that the variable stands in one place:
    `(c - x) / x` is `c / x - 1`, and `cos(u) / sin(u)` is `1 / tan(u)`."""
    if body.op == "log" and (ratio := _ratio(body.args[0], variable)) is not None:
        base, power = ratio
        return power * make("log", base)
    return body


def _ratio(term: Term, variable: Term) -> tuple[Term, Term] | None:
    """(base, n) where the term is `(a / b)^n`, and a / b has the variable in one place."""
    if term.op != "div" or any(a.op != "pow" for a in term.args):
        return None
    (a, n), (b, m) = (side.args for side in term.args)
    if n is not m:
        return None
    factor = const(1)
    if b.op == "mul" and is_const(b.args[0]):
        factor, b = b.args
    if a.op == "cos" and b.op == "sin" and a.args == b.args:
        return 1 / (factor * make("tan", a.args[0])), n
    if a.op == "sub" and a.args[1] is b and variable not in set(walk(a.args[0])):
        return (a.args[0] / b - 1) / factor, n
    return (a / b, n) if variable not in set(walk(b)) or variable not in set(walk(a)) else None


def _holds(body, variable, found: Term, value: Term, low: float, high: float) -> bool:
    """Whether the closed form gives the variable back, at some points between low and high."""
    stand_in = leaf("variable", "sample", name="value")
    undone = _put(found, value, stand_in)
    for share in (0.2, 0.5, 0.8):
        at = between(low, high, share)
        reached = number_of(body, {variable: at})
        back = number_of(undone, {stand_in: reached})
        if not math.isclose(back, at, rel_tol=1e-7, abs_tol=1e-9):
            return False
    return True


def _put(term: Term, old: Term, new: Term) -> Term:
    return rebuild(term, lambda part, args: new if part is old else None)


__all__ = ["isolated", "once", "solved"]
