"""Forms that look like functions and are more: they read their argument in another world, or make
something that a function cannot. Each is `(derivation, call, frame) -> Term`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from difftrain.language.calculus import NoDerivative, derivative
from difftrain.language.finding import Finding, Label
from difftrain.language.term import Term, const, leaf, rebuild
from difftrain.language.tree import Call
from difftrain.language.worlds import ALL, Frame, Problem

if TYPE_CHECKING:
    from difftrain.language.derive import Derivation

STILL = ("r", "cond", "guess", "x0", "eps")  # what `ddt` holds fixed, beside every draw


def _again(self: Derivation, expr: Call, frame: Frame) -> Term:
    """`again(q)`: the law of q with streams of its own."""
    argument = self.only(expr)
    world = replace(frame.world, plain=frozenset({ALL}))
    law = self.number(argument.value, Frame(frame.scope, frame.env, world))

    def fresh(term: Term, args):
        if term.op == "draw":
            return self.stream(term.kind, term["law"], args, expr)

    return rebuild(law, fresh)


def _dot(self: Derivation, expr: Call, frame: Frame) -> Term:
    """`dot(e)`: the derivative in t, nothing else moving."""
    argument = self.only(expr)
    t = self.read("t", frame.world, expr)
    moving = leaf("variable", "sample", name="t")
    inner = Frame(frame.scope, frame.env, frame.world.swap({"t": moving}))
    value = self.number(argument.value, inner)
    try:
        slope = derivative(value, moving)
    except NoDerivative as problem:
        raise Problem(
            Finding(
                "DIF201",
                f"`{expr.span.text}` has no value: {problem}",
                Label(expr.span),
                because="the path of a discrete process is a table of steps, not a curve",
                help="use a continuous process such as `linear`, or another prediction type",
            )
        ) from None
    return rebuild(slope, lambda term, args: t if term is moving else None)


def _ddt(self: Derivation, expr: Call, frame: Frame) -> Term:
    """`ddt(e)`: forward-mode derivative of e, t moving with 1 and xt with `flow`."""
    argument = self.only(expr)
    self.depth += 1
    names = ("t", "xt")
    at = [self.read(n, frame.world, expr) for n in names]
    moving = [
        leaf("variable", a.kind, name=f"{n}.{self.depth}") for n, a in zip(names, at, strict=True)
    ]
    held = {
        n: self.read(n, frame.world)
        for n in STILL
        if n in self.equations.versions or n in ("x0", "cond")
    }
    world = frame.world.swap({**held, **dict(zip(names, moving, strict=True))})
    body = self.number(argument.value, Frame(frame.scope, frame.env, world))
    flow = self.read("flow", frame.world, expr)
    self.depth -= 1
    return leaf("jvp", body.kind, body, *moving, *at, const(1), flow, span=expr.span)


def _network(self: Derivation, expr: Call, frame: Frame) -> Term:
    """`network(x, tau, cond)` of the current net, with its further times and inputs."""
    x, tau, cond = self.positional(expr, frame, 3)
    world = frame.world
    times = [self.read(n, world, expr) for n in self.times[1:]]
    extra = [self.read("c_noise", world.swap({"t": t}), expr) for t in times]
    extra += [self.read(n, world, expr) for n in self.inputs]
    names = tuple(n.rpartition(".")[2] for n in (*self.times[1:], *self.inputs))
    return leaf(
        "network",
        "field",
        self.read("net", world, expr),
        x,
        tau,
        cond,
        self.read("dropout", world, expr),
        *extra,
        span=expr.span,
        extras=names,
    )


SPECIAL: dict[str, Callable] = {
    "again": _again,
    "dot": _dot,
    "ddt": _ddt,
    "network": _network,
}
