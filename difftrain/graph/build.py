"""Spec to graph: the wanted quantities of an objective, derived and laid out."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from difftrain.graph.graph import Graph, from_terms
from difftrain.language.derive import Derivation
from difftrain.language.finding import SpecError
from difftrain.language.spec import Objective
from difftrain.language.term import Term
from difftrain.language.worlds import ALL, Problem, World

BEFORE = "@0"  # `xt@0`: the value before every redefinition


def build(
    objective: Objective,
    wanted: Iterable[str],
    given: Iterable[str] = (),
    fixed: Iterable[str] = (),
) -> Graph:
    """The graph of the wanted quantities. `given` ones are inputs that later redefinitions still
    change; `fixed` ones are inputs that nothing changes, as a sampler needs xt and t (and with xt
    no condition is dropped). Raises SpecError."""
    derivation = objective.derivation(given)
    try:
        if fixed:
            derivation.fix(fixed)
        roots = {name: wanted_term(derivation, name) for name in wanted}
        known = [n for n in (*given, *fixed) if n in objective.equations.versions]
        laws = {name: derivation.read(name, World(plain=frozenset({ALL}))) for name in known}
        names = labels(derivation)
    except Problem as problem:
        raise SpecError([problem.finding]) from None
    return from_terms({**_targets(names), **roots}, names, given, laws)


def _targets(names: dict[Term, tuple[str, ...]]) -> dict[str, Term]:
    """The target of every other world that has a pred, which cancelling reads."""
    titled = {title: term for term, called in names.items() for title in called}
    worlds = [t.removeprefix("pred") for t in titled if t.startswith("pred~")]
    return {f"target{w}": titled[f"target{w}"] for w in worlds if f"target{w}" in titled}


def wanted_term(derivation: Derivation, name: str) -> Term:
    """The term of `name`, or of `name@0`, its value before every redefinition."""
    if not name.endswith(BEFORE):
        return derivation.read(name)
    first = {n: 0 for n, versions in derivation.equations.versions.items() if len(versions) > 1}
    return derivation.read(name.removesuffix(BEFORE), derivation.home.cap(**first))


def labels(derivation: Derivation) -> dict[Term, tuple[str, ...]]:
    """What each term is called: its quantity, and `~k` behind it in the k-th other world."""
    for key in [k for k in derivation.memo if k[0] == "pred"]:
        derivation.read("target", key[1])
    for name in dict.fromkeys(k[0] for k in list(derivation.memo) if k[0] != "~"):
        with suppress(Problem):  # a name that has no meaning outside its world needs no label
            derivation.read(name)
    worlds: dict[World, int] = {derivation.home: 0}
    names: dict[Term, tuple[str, ...]] = {}
    entries = [(*key, term) for key, term in derivation.memo.items() if len(key) == 2]
    for name, world, term in sorted(entries, key=lambda e: e[1] != derivation.home):
        number = worlds.setdefault(world, len(worlds))
        title = f"{name}~{number}" if number else name
        if isinstance(term, Term) and term.op not in ("const", "word"):
            names[term] = (*names.get(term, ()), title)
    return names
