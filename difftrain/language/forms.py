"""Forms that look like functions and are more: they read their argument in another world, or make
something that a function cannot. Each is `(derivation, call, frame) -> Term`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from difftrain.language import mistakes
from difftrain.language.calculus import NoDerivative, derivative
from difftrain.language.chances import density, odds, runs_one_way, seen
from difftrain.language.finding import Finding, Label
from difftrain.language.inverse import solved
from difftrain.language.numbers import support
from difftrain.language.numbers import value as number_of
from difftrain.language.part import Interface
from difftrain.language.scope import Equations
from difftrain.language.term import Term, const, leaf, rebuild
from difftrain.language.tree import Call
from difftrain.language.worlds import ALL, Frame, Problem, World

if TYPE_CHECKING:
    from difftrain.language.derive import Derivation

NOTHING = 1e-15  # of cos(pi / 2) and the like: 0 in doubles
STILL = ("r", "cond", "guess", "x0", "eps")  # what `ddt` holds fixed, beside every draw
# Modules that are applied to a value: the kind that each is given, and the kind that it returns.
HEADS = {
    "project": ("tokens", "tokens"),
    "vision": ("field", "tokens"),
    "logvar": ("sample", "sample"),
}


def _again(self: Derivation, expr: Call, frame: Frame) -> Term:
    """`again(q)`: the law of q with streams of its own."""
    argument = self.only(expr)
    world = replace(frame.world, plain=frozenset({ALL}))
    law = self.number(argument.value, Frame(frame.scope, frame.env, world))

    def fresh(term: Term, args):
        if term.op == "draw":
            copy = self.stream(term.kind, term["law"], args, expr)
            self.copied[copy["stream"]] = term["name"]
            return copy

    return rebuild(law, fresh)


def clock(equations: Equations) -> str:
    """What moves along the path: `time`, where a process counts it apart from `t`, or `t`."""
    (first, *_) = equations.versions.get("time", (None,))
    return "t" if first is None or getattr(first.value, "path", ()) == ("t",) else "time"


def _dot(self: Derivation, expr: Call, frame: Frame) -> Term:
    """`dot(e)`: the derivative in time, nothing else moving."""
    argument = self.only(expr)
    name = clock(self.equations)
    now = self.read(name, frame.world, expr)
    moving = leaf("variable", "sample", name="t")
    inner = Frame(frame.scope, frame.env, frame.world.swap({name: moving}))
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
    return rebuild(slope, lambda term, args: now if term is moving else None)


def _ddt(self: Derivation, expr: Call, frame: Frame) -> Term:
    """`ddt(e)`: forward-mode derivative of e, time moving with 1 and xt with `flow`."""
    argument = self.only(expr)
    self.depth += 1
    names = (clock(self.equations), "xt")
    at = [self.read(n, frame.world, expr) for n in names]
    titles = ("t", "xt")
    moving = [
        leaf("variable", a.kind, name=f"{n}.{self.depth}") for n, a in zip(titles, at, strict=True)
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


# ---- networks and other modules


def _network(self: Derivation, expr: Call, frame: Frame) -> Term:
    """`network(x, tau, cond)` of the current net, with its further times and inputs."""
    x, tau, cond = self.positional(expr, frame, 3)
    world = frame.world
    net = self.read("net", world, expr)
    if net.op != "module":
        raise Problem(mistakes.no_net(self.equations.versions["net"][-1].value))
    given = self.interface if net["name"] in (self.net, *self.averages) else Interface()
    extra = [_clocked(self, n, world, expr) for n in given.times[1:]]
    extra += [self.read(n, world, expr) for n in given.inputs]
    names = tuple(n.rpartition(".")[2] for n in (*given.times[1:], *given.inputs))
    masks = self.read("dropout", world, expr) if given.dropout else const(False)
    return leaf("network", "field", net, x, tau, cond, masks, *extra, span=expr.span, extras=names)


def _clocked(self: Derivation, name: str, world: World, expr: Call) -> Term:
    """What the network is told of a further time; a solver decides it on the clock of the path."""
    decided = {name, "time"} <= dict(self.home.swaps).keys()
    moved = "time" if decided else "t"
    return self.read("c_noise", world.swap({moved: self.read(name, world, expr)}), expr)


def _features(self: Derivation, expr: Call, frame: Frame) -> Term:
    """`features(output)`: the tokens that a network returns beside its output."""
    argument = self.only(expr)
    output = self.number(argument.value, frame)
    if output.op != "network":
        text = f"`{argument.span.text}` is not what a network returned"
        hint = "write `features(output)`"
        raise Problem(Finding("DIF121", text, Label(argument.span), help=hint))
    return leaf("tap", "tokens", output, span=expr.span)


def _head(self: Derivation, expr: Call, frame: Frame) -> Term:
    """`project(tokens)`, `vision(image)`, `logvar(c_noise)`: a module applied to a value."""
    takes, gives = HEADS[expr.dotted]
    (value,) = self.positional(expr, frame, 1)
    if value.kind not in (takes, "scalar" if takes == "sample" else takes):
        raise Problem(mistakes.head(expr, takes, value.kind))
    module = leaf("module", "module", name=expr.dotted)
    return leaf("apply", gives, module, value, span=expr.span)


def _average(self: Derivation, expr: Call, frame: Frame) -> Term:
    """`name = average(decay)`: a copy of the student that follows it; the decay is in `step`."""
    decay = self.number(self.only(expr).value, frame)
    name = self.active[-1][0]
    if decay.kind != "scalar":
        text = "the decay of an average is one number for the whole batch"
        hint = "write a number or an expression in `step`"
        raise Problem(Finding("DIF121", text, Label(expr.span), help=hint))
    self.averages[name] = decay
    return leaf("module", "module", name=name)


# ---- laws


def _inverse(self: Derivation, expr: Call, frame: Frame) -> Term:
    """`inverse(q, v)`: the time at which q, a monotone quantity of the process, is v."""
    quantity, wanted = expr.args
    value = self.number(wanted.value, frame)
    if clock(self.equations) != "t":
        text = f"`{quantity.span.text}` of an index has no inverse"
        hint = "put the law on `t`, the index, or use the process without its grid"
        raise Problem(Finding("DIF215", text, Label(expr.span), help=hint))
    moving = leaf("variable", "sample", name="t")
    world = frame.world.swap({"t": moving})
    body = self.number(quantity.value, Frame(frame.scope, frame.env, world))
    own = self.equations.process_time()
    ends = support(self.law(own)) if own else None
    low, high = (ends.low, ends.high) if ends else (0.0, 1.0)
    if not _monotone(body, moving, low, high):
        raise Problem(mistakes.not_monotone(quantity, expr))
    reached = sorted(_end(body, moving, t) for t in (low, high))
    asked = support(value)
    if asked and not (reached[0] <= asked.low and asked.high <= reached[1]):
        raise Problem(mistakes.leaves_range(quantity, wanted, asked, reached, expr))
    return solved(body, moving, value, low, high)


def _end(body: Term, moving: Term, t: float) -> float:
    """The value of a quantity at an end of t; infinite where it has none there."""
    found = number_of(body, {moving: t})
    found = 0.0 if abs(found) < NOTHING else found
    most = 60 if body.op == "log" else 1e12  # beyond what doubles tell from an open end
    if not math.isnan(found):
        return found if abs(found) < most else math.copysign(math.inf, found)
    inner = [number_of(body, {moving: abs(t - s)}) for s in (1e-3, 1e-2)]
    return math.copysign(math.inf, inner[0] - inner[1])


def _monotone(body: Term, moving: Term, low: float, high: float) -> bool:
    return runs_one_way(seen(body, moving, low, high))


def _gaussian(self: Derivation, expr: Call, frame: Frame) -> Term:
    """`gaussian(eps)`: whether a draw is standard normal."""
    return const(is_gaussian(self.number(self.only(expr).value, frame)))


def is_gaussian(noise: Term) -> bool:
    """Whether a term is one standard normal draw, but for corrections without gradient."""
    while noise.op in ("add", "sub") and _held(noise.args[1]):
        noise = noise.args[0]
    return noise.op in ("input", "variable") or (noise.op == "draw" and noise["law"] == "noise")


def _held(term: Term) -> bool:
    return term.op == "stop" or (term.op == "mul" and any(_held(a) for a in term.args))


SPECIAL: dict[str, Callable] = {
    "again": _again,
    "average": _average,
    "ddt": _ddt,
    "density": density,
    "dot": _dot,
    "features": _features,
    "gaussian": _gaussian,
    "inverse": _inverse,
    "network": _network,
    "odds": odds,
    **dict.fromkeys(HEADS, _head),
}
