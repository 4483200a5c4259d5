"""What a loss weighs: the factor of its squared error, carried to the space of the prediction.

A loss is a sum of terms `factor * mean(residual^2)`. Where a residual is a multiple c of
`pred - target` the term is `factor * c^2 * mean((pred - target)^2)`, whatever it was stated on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from operator import add

from difftrain.language.algebra import linear, linear_leaves, simplify
from difftrain.language.derive import Derivation
from difftrain.language.numbers import constant, points, values
from difftrain.language.term import Term, const, is_const, make, rebuild, walk

REDUCTIONS = ("mean", "sum")
TRAINED = ("network", "jvp")
NUMBERS = 16384  # of one sample, where something depends on `numel(x0)`


@dataclass(frozen=True, eq=False)
class Weighting:
    """`loss = weight * reduction((pred - target)^2) + rest`; weight is None where no part of the
    loss has this form, or where its parts are reduced in different ways."""

    weight: Term | None
    reduction: str
    rest: tuple[Term, ...]


def weighting(derivation: Derivation) -> Weighting:
    """How the loss of a derivation weighs its squared error. Raises Problem."""
    loss, pred, target, *atoms = (
        derivation.read(n) for n in ("loss", "pred", "target", "alpha", "sigma")
    )
    error = make("sub", pred, target)
    found: dict[str, list[Term]] = {}
    rest = []
    for factor, part in pieces(loss):
        residual = squared(part)
        ratio = residual and proportion(residual, error, frozenset(atoms))
        if ratio is None:
            rest.append(-part if is_const(factor, -1) else factor * part)
        else:
            found.setdefault(part.op, []).append(factor * ratio**2)
    if len(found) != 1:
        return Weighting(None, ", ".join(found), tuple(rest))
    ((reduction, weights),) = found.items()
    return Weighting(simple(reduce(add, weights), frozenset(atoms)), reduction, tuple(rest))


def pieces(term: Term) -> list[tuple[Term, Term]]:
    """(factor, part) of a sum, where no factor depends on what is trained."""
    match term.op, term.args:
        case "add", (left, right):
            return pieces(left) + pieces(right)
        case "sub", (left, right):
            return pieces(left) + [(-factor, part) for factor, part in pieces(right)]
        case "neg", (inner,):
            return [(-factor, part) for factor, part in pieces(inner)]
        case "mul", (left, right) if not trained(left):
            return [(left * factor, part) for factor, part in pieces(right)]
        case "mul", (left, right) if not trained(right):
            return [(right * factor, part) for factor, part in pieces(left)]
        case "div", (above, below) if not trained(below):
            return [(factor / below, part) for factor, part in pieces(above)]
    return [(const(1), term)]


def trained(term: Term) -> bool:
    """Whether a network is under the term, stopped or not."""
    return any(t.op in TRAINED for t in walk(term))


def squared(term: Term) -> Term | None:
    """The residual of `mean((a - b)^2)`."""
    if term.op not in REDUCTIONS:
        return None
    (power,) = term.args
    is_square = power.op == "pow" and is_const(power.args[1], 2)
    return power.args[0] if is_square and power.args[0].op == "sub" else None


def proportion(residual: Term, error: Term, atoms: frozenset[Term]) -> Term | None:
    """c where the residual is c * error for every x0, eps and output; else None."""
    leaves = linear_leaves(residual) | linear_leaves(error)
    left, right = linear(residual, leaves), linear(error, leaves)
    outputs = [t for t in leaves if t.op == "network" and t in left and t in right]
    if not outputs:
        return None
    top, bottom = left[outputs[0]], right[outputs[0]]
    zero = const(0)
    crossed = [
        pair
        for leaf in {*left, *right}
        for pair in ((left.get(leaf, zero), bottom), (right.get(leaf, zero), top))
    ]
    return simple(top / bottom, atoms) if _equal_products(crossed) else None


def _equal_products(pairs: list[tuple[Term, Term]]) -> bool:
    """Whether the products of neighbouring pairs are equal, wherever both are finite."""
    entries = [sized(entry) for pair in pairs for entry in pair]
    rows = values(entries, points(*entries))
    finite = [row for row in rows if all(math.isfinite(v) for v in row)]
    return 2 * len(finite) > len(rows) and all(_same_products(row) for row in finite)


def _same_products(row: list[float]) -> bool:
    products = [a * b for a, b in zip(row[::2], row[1::2], strict=True)]
    pairs = zip(products[::2], products[1::2], strict=True)
    return all(math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in pairs)


def simple(term: Term, atoms: frozenset[Term]) -> Term:
    """An equal term: what cancels is cancelled, and sums that are one number become it."""
    short = simplify(term, atoms, lambda t: constant(t, points(t)))
    return -short.args[1] if short.op == "mul" and is_const(short.args[0], -1) else short


def sized(term: Term) -> Term:
    """The term with a number for `numel(x0)`, which is known only when there is data."""
    return rebuild(term, lambda t, args: const(NUMBERS) if t.op == "numel" else None)


def in_spaces(weight: Term, derivation: Derivation) -> dict[str, Term]:
    """The weight as it would be written on other residuals: an error of pred is
    -det / sigma times one of x0_hat and det / alpha times one of eps_hat."""
    alpha, sigma, det = (derivation.read(n) for n in ("alpha", "sigma", "det"))
    carried = {
        "pred": weight,
        "x0_hat": weight * (det / sigma) ** 2,
        "eps_hat": weight * (det / alpha) ** 2,
        "v": weight * det**2 / (alpha**2 + sigma**2),
    }
    return {space: simple(term, frozenset((alpha, sigma))) for space, term in carried.items()}


def forwards(loss: Term) -> tuple[int, int, int]:
    """How many forwards of a network one step makes: with gradient, without, and with a
    forward-mode derivative (counted among the others as well)."""
    loss = _plain(loss)
    live, stack = set(), [loss]
    while stack:
        term = stack.pop()
        if term not in live:
            live.add(term)
            stack.extend(term.args if term.op != "stop" else ())
    moving = {v for t in walk(loss) if t.op == "jvp" for v in t.args[1 : 1 + len(t.args[1:]) // 3]}
    networks = {t for t in walk(loss) if t.op == "network" and not moving & set(walk(t))}
    derivatives = sum(t.op == "jvp" for t in walk(loss))
    unshared = sum(t.op == "jvp" and not _primal(t) & networks for t in walk(loss))
    return len(networks & live), len(networks - live) + unshared, derivatives


def _plain(loss: Term) -> Term:
    """The loss without `stop` around what needs no gradient anyway."""

    def change(term: Term, args: tuple[Term, ...]) -> Term | None:
        return args[0] if term.op == "stop" and not trained(args[0]) else None

    return rebuild(loss, change)


def _primal(derivative: Term) -> set[Term]:
    """The forwards inside a derivative, at the point where it is taken."""
    body, *rest = derivative.args
    count = (len(rest)) // 3
    at = dict(zip(rest[:count], rest[count : 2 * count], strict=True))
    return {t for t in walk(rebuild(body, lambda t, args: at.get(t))) if t.op == "network"}


__all__ = ["Weighting", "forwards", "in_spaces", "proportion", "weighting"]
