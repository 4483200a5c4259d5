"""The equations of an objective after every redefinition, as lines a person can read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add, sub

from difftrain.language.algebra import linear, linear_leaves
from difftrain.language.derive import Derivation
from difftrain.language.term import Term, const, is_const, show, walk
from difftrain.language.weighting import simple
from difftrain.language.worlds import HERE, Problem, World

MAIN = ("t", "alpha", "sigma", "xt", "target", "pred", "x0_hat", "fit", "loss")
RANKED = (
    "t",
    "alpha",
    "sigma",
    "eps",
    "xt",
    "flow",
    "pred",
    "target",
    "x0_hat",
    "eps_hat",
    "fit",
    "loss",
)
LEAVES = ("const", "word", "text", "module", "input")
UNNAMED = ("row_a", "row_b")  # they are alpha, sigma or numbers: those names say more


@dataclass(frozen=True)
class Line:
    """`name sign text`, the sign being `=` or `~`."""

    name: str
    sign: str
    text: str


def equations(derivation: Derivation, roots: tuple[str, ...] = MAIN) -> list[Line]:
    """An equation for each root and for what it is made of, in the order of reading.

    `eps@1` is eps as it stands after one redefinition, and `x0_hat(t = s)` is x0_hat derived again
    with t replaced. Raises Problem.
    """
    terms = {name: derivation.read(name) for name in roots}
    page = _Page(derivation, labels(derivation))
    for name, term in terms.items():
        page.put(name, term)
    return page.lines


def labels(derivation: Derivation) -> dict[Term, str]:
    """What each derived term is called; the plain name of a quantity comes first."""
    for name in dict.fromkeys(k[0] for k in list(derivation.memo) if k[0] != "~"):
        with suppress(Problem):  # what has no meaning outside its world needs no plain name
            derivation.read(name)
    found: dict[Term, str] = {const(math.pi): "pi"}
    entries = [(*key, term) for key, term in derivation.memo.items() if len(key) == 2]
    for name, world, term in sorted(entries, key=lambda e: (e[1] != HERE, _rank(e[0]))):
        if _has_label(name, world, term) and term not in found:
            inside = _inside_derivative(term)
            found[term] = name if inside else _label(derivation, name, world, found)
    return found


def _rank(name: str) -> tuple[bool, int]:
    """Main quantities come first; a local of a block is known by the quantity that it is."""
    return ("." in name, RANKED.index(name) if name in RANKED else len(RANKED))


def _has_label(name: str, world: World, term) -> bool:
    plain = isinstance(term, Term) and term.op not in LEAVES and name not in UNNAMED
    return plain and not world.plain


def _inside_derivative(term: Term) -> bool:
    """Whether the term reads a moving t or xt of a derivative around it."""
    stack, seen = [term], set()
    while stack:
        top = stack.pop()
        if top.op == "variable":
            return True
        if top not in seen:
            seen.add(top)
            stack.extend(top.args[1 + len(top.args) // 3 :] if top.op == "jvp" else top.args)
    return False


def _label(derivation: Derivation, name: str, world: World, found: dict[Term, str]) -> str:
    swaps = sorted(dict(world.swaps).items())
    free = replace(world, caps=frozenset())
    caps = {} if derivation.read(name, free) is derivation.read(name, world) else dict(world.caps)
    standing = caps.get(name, min(caps.values(), default=None))
    before = "" if standing is None else f"@{standing}"
    told = [(n, v) for n, v in swaps if not is_const(v) or not isinstance(v.value, bool)]
    short, long = (_spelt(f"{name}{before}", some, found) for some in (told, swaps))
    return long if short in found.values() else short


def _spelt(name: str, swaps: list, found: dict[Term, str]) -> str:
    inside = ", ".join(f"{n} = {_brief(v, found)}" for n, v in swaps)
    return f"{name}({inside})" if inside else name


def _brief(value, found: dict[Term, str]) -> str:
    text = show(value, found, top=False) if isinstance(value, Term) else str(value)
    return text if len(text) <= 24 else "..."


@dataclass(eq=False)
class _Page:
    """Lines put down so far; what a line reads is put before it."""

    derivation: Derivation
    labels: dict[Term, str]
    lines: list[Line] = field(default_factory=list)
    done: set[str] = field(default_factory=set)

    def put(self, name: str, term: Term) -> None:
        if name in self.done:
            return
        self.done.add(name)
        own = self.labels.get(term)
        if own is not None and own != name:
            self.put(own, term)
            self.lines.append(Line(name, "=", own))
            return
        if self._is_draw(name, term):
            self.lines.append(Line(name, "~", law(term)))
            return
        tidy = self._tidy(term)
        alias = tidy is not term and tidy in self.labels
        for inner in [tidy] if alias else self._named_below(tidy):
            self.put(self.labels[inner], inner)
        self.lines.append(Line(name, "=", self.text(tidy, top=tidy is term)))

    def _tidy(self, term: Term) -> Term:
        """The term with what cancels cancelled, where that is shorter to read."""
        atoms = frozenset(self.derivation.read(n) for n in ("alpha", "sigma"))
        if term in atoms or term.op in ("network", "jvp", "draw"):
            return term
        if term.kind == "field":
            new = _sum_of_fields(term, frozenset(self.labels) - {term}, atoms)
        elif term is self.derivation.read("det"):
            new = simple(term, atoms)
        else:
            return term
        return min(term, new, key=lambda t: len(self.text(t, top=t is term)))

    def _is_draw(self, name: str, term: Term) -> bool:
        base, _, version = name.partition("@")
        versions = self.derivation.equations.versions.get(base, ())
        if term.op == "draw" or not versions:
            return term.op == "draw"
        standing = int(version) if version.isdigit() else len(versions) - 1
        return standing < len(versions) and versions[standing].form == "~"

    def _named_below(self, term: Term) -> Iterator[Term]:
        """The nearest terms under this one that have a line of their own, and draws."""
        stack, seen = list(reversed(term.args)), set()
        while stack:
            top = stack.pop()
            if top in seen or top.op in LEAVES:
                continue
            seen.add(top)
            if top in self.labels and top.op != "const":
                yield top
            elif top.op == "draw":
                self.labels[top] = top["name"]
                yield top
            else:
                stack.extend(reversed(_shown_args(top)))

    def text(self, term: Term, top: bool) -> str:
        """The term in the language's notation, with names for what has a line; the top one is
        written out."""
        names = dict(self.labels)
        if top:
            names.pop(term, None)
        for part in walk(term):
            if part not in names and part.op == "network":
                names[part] = _network(part, names, self.derivation.interface.dropout)
            elif part not in names and part.op == "jvp":
                names[part] = _derivative(part, names)
        return names[term] if term in names else show(term, names)


def _sum_of_fields(term: Term, named: frozenset[Term], atoms: frozenset[Term]) -> Term:
    """A linear combination of fields, what is added before what is taken away."""
    leaves = linear_leaves(term, named)
    parts = [(simple(c, atoms), leaf) for leaf, c in linear(term, leaves).items()]
    plus = [leaf * c if is_const(c, 1) else c * leaf for c, leaf in parts if not _negative(c)]
    minus = [simple(-c, atoms) * leaf for c, leaf in parts if _negative(c)]
    start = reduce(add, plus) if plus else const(0)
    return reduce(sub, minus, start)


def _negative(factor: Term) -> bool:
    """Whether a factor is written with a minus."""
    return factor.op == "neg" or str(factor).startswith("-")


def law(term: Term) -> str:
    """An expression over base draws as it is written behind `~`."""
    named = {const(math.pi): "pi"}
    for part in walk(term):
        if part.op == "draw":
            inner = ", ".join(show(a, named, top=False) for a in part.args)
            named[part] = f"{part['law']}({inner})"
    return show(term, named, top=False)


def _shown_args(term: Term) -> tuple[Term, ...]:
    match term.op:
        case "network":
            return (*term.args[1:4], *term.args[5:])
        case "jvp":
            return term.args[-1:]
    return term.args


def _network(term: Term, names: dict[Term, str], masked: bool) -> str:
    """A call as it is written; `masked` says whether the network has dropout at all."""
    net, x, tau, cond, dropout, *extra = term.args
    shown = [show(a, names, top=False) for a in (x, tau, cond)]
    shown += [
        f"{n} = {show(a, names, top=False)}" for n, a in zip(term["extras"], extra, strict=True)
    ]
    if masked and is_const(dropout) and not dropout.value:
        shown.append("dropout = false")
    title = "network" if net.op == "module" and net["name"] == "student" else show(net, names)
    return f"{title}({', '.join(shown)})"


def _derivative(term: Term, names: dict[Term, str]) -> str:
    body = names.get(term.args[0])
    return f"ddt({body or show(term.args[0], names, top=False)})"
