"""The algebra pass: what cancels is cancelled before anything is evaluated.

A weight is stated by the residual it multiplies. Where that residual is a multiple c of
`pred - target`, which is proved on the coefficients of every field in both, `mean(residual^2)`
becomes `c^2 * mean((pred - target)^2)` and c^2 is multiplied into the weight, so min(snr, g) on an
x0 residual is min(snr, g) / snr where noise is predicted, and 0 / 0 at an end never arises.
Estimates lose divisions the same way: `x0_hat` of a prediction that is x0 is that prediction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property, reduce
from operator import add

from difftrain.graph.graph import Graph, from_terms, to_terms
from difftrain.language.algebra import NotLinear, linear, linear_leaves, reaches, simplify
from difftrain.language.numbers import constant, draws, points, values
from difftrain.language.term import Term, const, is_const, leaf, make, rebuild, walk, with_args

WHOLE = ("alpha", "sigma")  # kept as they are: expanding them would lose digits
REDUCTIONS = ("mean", "sum")
STEPPED = ("where", "min", "max", "abs", "floor", "ceil", "pick")


class Facts:
    """What the graph says about its terms: names, the pairs (pred, target), numbers."""

    def __init__(self, graph: Graph):
        terms = to_terms(graph)
        self.names: dict[Term, tuple[str, ...]] = {}
        for node in graph.order():
            if graph[node]["names"]:
                self.names[terms[node]] = graph[node]["names"]
        self.roots = {name: terms[node] for name, node in graph.outputs.items()}
        self.laws = graph.laws
        self.atoms = frozenset(t for t in self.names if self.quantity(t) & {*WHOLE})

    def quantity(self, term: Term) -> set[str]:
        return {n.partition("~")[0] for n in self.names.get(term, ())}

    @cached_property
    def pairs(self) -> list[tuple[Term, Term]]:
        """(pred, target) of every world that has both."""
        found = {"pred": {}, "target": {}}
        for term, names in self.names.items():
            for name in names:
                quantity, _, world = name.partition("~")
                if quantity in found:
                    found[quantity][world] = term
        preds, targets = found.values()
        return list(dict.fromkeys((p, targets[w]) for w, p in preds.items() if w in targets))

    def provable(self, *terms: Term) -> list[Term]:
        """The terms with given quantities drawn from their laws, in a form to prove identities."""
        return free_of_steps([rebuild(term, self._drawn) for term in terms])

    def _drawn(self, part: Term, args) -> Term | None:
        """A given quantity, drawn from its law."""
        if part.op == "input" and part["name"] in self.laws:
            return self.laws[part["name"]]

    def known(self, term: Term) -> float | None:
        """The number that a term always equals, if there is one."""
        (shown,) = self.provable(term)
        return constant(shown, points(shown))

    def simple(self, term: Term) -> Term:
        return simplify(term, self.atoms, self.known)

    def multiple(self, residual: Term) -> tuple[Term, Term, Term] | None:
        """(c, pred, target) where the residual is c * (pred - target) for every x0 and eps."""
        for pred, target in self.pairs:
            error = make("sub", pred, target)
            leaves = linear_leaves(residual) | linear_leaves(error)
            outputs = [t for t in leaves if t.op == "network" and reaches(pred, {t})]
            left, right = _parts(residual, leaves), _parts(error, leaves)
            found = next((o for o in outputs if o in left and o in right), None)
            if found is None or not self._proportional(left, right, found):
                continue
            return self.simple(make("div", left[found], right[found])), pred, target
        return None

    def _proportional(self, left: dict, right: dict, pivot: Term) -> bool:
        """Whether left = c * right for one c, entry by entry, wherever both are finite."""
        zero = const(0)
        keys = [pivot, *(k for k in {*left, *right} if k is not pivot)]
        shown = self.provable(*(side.get(k, zero) for k in keys for side in (left, right)))
        rows = values(shown, points(*shown))
        finite = [row for row in rows if all(math.isfinite(v) for v in row)]
        return 2 * len(finite) > len(rows) and all(_same_ratio(row) for row in finite)


def _same_ratio(row: list[float]) -> bool:
    """Whether a / b is the same for all pairs (a, b) that follow each other."""
    top, bottom, *others = row
    pairs = zip(others[::2], others[1::2], strict=True)
    return all(math.isclose(a * bottom, b * top, rel_tol=1e-9, abs_tol=1e-12) for a, b in pairs)


def _parts(term: Term, leaves: frozenset[Term]) -> dict[Term, Term]:
    """The coefficient of each leaf; nothing where one depends on a leaf, as in x / |x|."""
    try:
        return linear(term, leaves)
    except NotLinear:
        return {}


def free_of_steps(terms: list[Term]) -> list[Term]:
    """The terms as functions of numbers that are free of each other and smooth between them.

    An identity of smooth functions that holds on a grid holds everywhere; one with steps in it
    might fail between two points. So every index of a discrete process is looked at, and elsewhere
    whatever has steps (`if`, `min`, `floor`, a table) stands for any number, as `step` always does.
    """
    leaves = draws(*terms)
    every_point = len(leaves) == 1 and leaves[0]["law"] == "integer"
    free = () if every_point else STEPPED
    names: dict[Term, str] = {}

    def change(part: Term, args):
        if part.op == "draw" and part["law"] == "choice":
            return part  # its weights are a table, whatever they depend on
        if part.op in free or (part.op == "input" and part["name"] == "step"):
            name = names.setdefault(part, f"any.{len(names)}")
            return leaf("draw", part.kind, const(0.05), const(0.95), law="uniform", name=name)

    return [rebuild(term, change) for term in terms]


def cancel(graph: Graph) -> Graph:
    """Needs: the graph as derived, with the target of every world that has a pred as an output
    `target~k`. Ensures: equal values where the old graph had one, and no such outputs."""
    facts = Facts(graph)
    done: dict[Term, Term] = {}
    weighted: set[Term] = set()
    pairs = (term for pair in facts.pairs for term in pair)  # first: a residual becomes these
    for term in walk(*pairs, *facts.roots.values()):
        new = _divided(term, facts, done) or _residual(term, facts, done, weighted)
        if new is None:
            new = with_args(term, tuple(done[a] for a in term.args))
            new = _weight(new, facts, weighted) or new
        done[term] = new
    roots = {name: done[root] for name, root in facts.roots.items() if "~" not in name}
    names: dict[Term, tuple[str, ...]] = {}
    for term, called in facts.names.items():
        names[done[term]] = tuple(dict.fromkeys((*names.get(done[term], ()), *called)))
    for weight in _weights(roots.values()):
        names.setdefault(weight, ("weight",))
    return from_terms(roots, names, graph.given, graph.laws)


def _weights(roots: Iterable[Term]) -> list[Term]:
    """What multiplies a reduction."""
    pairs = [(t.args, t.args[::-1]) for t in walk(*roots) if t.op == "mul" and t.kind == "sample"]
    both = [pair for pair_of in pairs for pair in pair_of]
    return [w for w, error in both if error.op in REDUCTIONS and w.kind == "sample"]


def _divided(term: Term, facts: Facts, done: dict[Term, Term]) -> Term | None:
    """A field divided by a number per sample, as a sum of fields with cancelled coefficients."""
    if term.op != "div" or term.kind != "field" or term.args[1].kind != "sample":
        return None
    named = frozenset(t for t in facts.names if t.kind == "field" and t is not term)
    leaves = linear_leaves(term.args[0], named)
    parts = [facts.simple(factor) * done[field] for field, factor in _parts(term, leaves).items()]
    return reduce(add, parts) if parts else None


def _residual(term: Term, facts: Facts, done: dict, weighted: set[Term]) -> Term | None:
    """`c^2 * mean((pred - target)^2)` for the mean of a squared multiple of pred - target."""
    if term.op not in REDUCTIONS or not _is_square(term.args[0]):
        return None
    found = facts.multiple(term.args[0].args[0])
    if found is None:
        return None
    factor, pred, target = found
    if pred not in done or target not in done:
        return None  # made of the residual itself
    error = make(term.op, (done[pred] - done[target]) ** 2)
    weighted.add(error)
    return facts.simple(factor**2) * error


def _is_square(term: Term) -> bool:
    return term.op == "pow" and is_const(term.args[1], 2) and term.args[0].op == "sub"


def _weight(term: Term, facts: Facts, weighted: set[Term]) -> Term | None:
    """A weight times a rewritten residual, cancelled."""
    if term.kind != "sample" or term.op not in ("mul", "div") or not weighted:
        return None
    inside = [t for t in walk(term) if t in weighted]
    if len(inside) != 1 or not _is_factor(term, inside[0]):
        return None
    rest = rebuild(term, lambda t, args: const(1) if t is inside[0] else None)
    return facts.simple(rest) * inside[0]


def _is_factor(term: Term, factor: Term) -> bool:
    if term is factor:
        return True
    if term.op == "mul":
        return sum(_is_factor(a, factor) for a in term.args) == 1 and not all(
            reaches(a, {factor}) for a in term.args
        )
    if term.op != "div" or reaches(term.args[1], {factor}):
        return False
    return _is_factor(term.args[0], factor)
