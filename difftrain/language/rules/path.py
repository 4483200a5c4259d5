"""Rules about the path from data to noise: what can be recovered along it, and where t may go."""

from __future__ import annotations

import math

from difftrain.language.algebra import NotLinear, linear
from difftrain.language.finding import Finding, Label
from difftrain.language.mistakes import kept_inside
from difftrain.language.names import is_shipped
from difftrain.language.numbers import Support, draws, points, support, values
from difftrain.language.operations import LAWS
from difftrain.language.rules.case import ALONG, Case, inside, shown
from difftrain.language.scope import Equation, Need, formals, parts
from difftrain.language.term import Term, const, leaf, rebuild, show, walk
from difftrain.language.tree import Binary, Call, Define, Name

X0, EPS = (leaf("variable", "field", name=n) for n in ("x0", "eps"))


# ---- a target that is the input


def identity(case: Case, found: list[Finding]) -> None:
    """The network is not asked for what it is given."""
    world = ALONG.swap({"x0": X0, "eps": EPS})
    xt, target = (case.term(name, world) for name in ("xt", "target"))
    if xt is None or target is None or not case.times:
        return
    if not _parallel(case, _open(target), xt):
        return
    equation = case.newest("target")
    edit = f"write `prediction_type = {name}`" if (name := _clean(case)) else "compare with `x0`"
    text = f"`{' '.join(equation.span.text.split())}` trains the network to return its input"
    found.append(
        Finding(
            "DIF204",
            text,
            Label(case.place(equation)),
            because="the best network is then the identity, and nothing is denoised",
            help=edit,
        )
    )


def _open(term: Term) -> Term:
    """The term as a value, without what only concerns the gradient."""
    return rebuild(term, lambda part, args: args[0] if part.op == "stop" else None)


def _parallel(case: Case, target: Term, xt: Term) -> bool:
    """Whether the target is a multiple of xt at every time inside the support."""
    try:
        forms = [linear(term, frozenset((X0, EPS))) for term in (target, xt)]
    except NotLinear:
        return False
    row = [form.get(x, const(0)) for form in forms for x in (X0, EPS)]
    inner = case.times.values[1:-1] or case.times.values
    numbers = case.along(*row, at=inner)
    return all(
        math.isclose(a * sigma, b * alpha, rel_tol=1e-9, abs_tol=1e-12) and (a or b)
        for a, b, alpha, sigma in numbers
    )


def _clean(case: Case) -> str | None:
    """The name of the library's prediction of clean data."""
    for definition in case.spec.names.definitions("prediction"):
        for node in definition.node.body:
            target = isinstance(node, Define) and node.name == "target"
            if target and isinstance(node.value, Name) and node.value.path == ("x0",):
                return definition.name
    return None


# ---- what a block takes for granted


def needs(case: Case, found: list[Finding]) -> None:
    """What the blocks in use take for granted holds; of each block the first that does not."""
    first = {row[0].use.label: row for row in reversed([*broken(case)])}
    for need, number, t in reversed(first.values()):
        text = f"`{need.use.definition.name}` needs `{need.condition.span.text}`"
        because = f"at t = {shown(t)} it is {number}" if number else ""
        hint = need.help or f"use something else than `{need.use.definition.name}` here"
        if settings := _settings(case, need):
            because = " and ".join(f"`{name}` is {value}" for name, value in settings.items())
            hint = "choose another " + " or ".join(f"`{name}`" for name in settings)
        at = Label(case.called(need.use))
        found.append(Finding("DIF205", text, at, because=because, help=hint))


def _settings(case: Case, need: Need) -> dict[str, str]:
    """The arguments of a block that a condition is about, where it is about nothing else."""
    names = [e.dotted for e in parts(need.condition) if isinstance(e, Name)]
    arguments = formals(need.use.definition)
    terms = {n: case.term(f"{need.use.label}.{n}") for n in names if n in arguments}
    known = len(terms) == len(names) and all(t and t.op == "const" for t in terms.values())
    return {n: show(t) for n, t in terms.items()} if known else {}


def broken(case: Case):
    """(need, the number found instead, at which time) of what does not hold."""
    for need in case.objective.equations.needs:
        match need.condition:
            case Binary(op="==", left=left, right=right):
                sides = [case.expression(e, need.scope, ALONG) for e in (left, right)]
                if None not in sides and (miss := _miss(case, *sides)):
                    yield need, *miss
            case condition:
                truth = case.expression(condition, need.scope, ALONG)
                bad = [] if truth is None else _where(case, truth)
                if bad:
                    yield need, "", bad[len(bad) // 2]


def _miss(case: Case, left: Term, right: Term) -> tuple[str, float] | None:
    """The value of the left side where the two differ most."""
    if "word" in (left.kind, right.kind):
        return None if left is right else (f"`{show(left)}`", 0.0)
    inner = case.times.values[1:-1] or case.times.values
    rows = zip(inner, case.along(left, right, at=inner), strict=True)
    far = [(t, a) for t, (a, b) in rows if abs(a - b) > 1e-9 * max(1, abs(b))]
    if not far:
        return None
    t, a = far[len(far) // 2]
    return shown(a), t


def _where(case: Case, truth: Term) -> list[float]:
    if truth.op == "const":
        return [] if truth.value else [0.0]
    values = case.along(truth)
    return [t for t, (v,) in zip(case.times.values, values, strict=True) if v == 0]


# ---- laws

SOUND = {
    "uniform": (lambda low, high: low < high, "its lower end has to be below the upper one"),
    "normal": (lambda mean, std: std > 0, "its standard deviation has to be above 0"),
    "integer": (lambda n: n >= 1, "it has to have at least one number"),
    "bernoulli": (lambda p: 0 <= p <= 1, "a probability is between 0 and 1"),
    "choice": (
        lambda weights: min(weights, default=-1) >= 0 < sum(weights),
        "its weights have to be 0 or more, and not all 0",
    ),
}


def laws(case: Case, found: list[Finding]) -> None:
    """Every law that is drawn from has values."""
    loss, versions = case.term("loss"), case.objective.equations.versions
    for draw in draws(loss) if loss is not None else ():
        name = draw["name"]
        equation = versions.get(name, versions.get(name.rpartition(".")[0], [None]))[0]
        sound, because = SOUND.get(draw["law"], (None, ""))
        args = values(list(draw.args), points(*draw.args)[:1])[0] if sound else []
        if equation is None or not sound or any(a != a for a in args) or sound(*args):
            continue
        if any(inside(f.at.span, case.place(equation)) for f in found):
            continue
        law = f"{draw['law']}({', '.join(show(a) for a in draw.args)})"
        text = f"nothing can be drawn from `{law}`"
        form = LAWS[draw["law"]].partition(":")[0]
        at, hint = Label(case.place(equation)), f"choose other numbers for `{form}`"
        found.append(Finding("DIF214", text, at, because=because, help=hint))


# ---- where t may go


def time_law(case: Case, found: list[Finding]) -> None:
    """The law of t stays where the process is defined."""
    own, process = case.own_time, case.slot("process")
    if own is None or process is None or case.newest("t") is own or not case.own_times:
        return
    if any(f.at.span == case.place(case.newest("t")) for f in found):
        return
    given, allowed = case.times, case.own_times
    leaves = not _within(given, allowed)
    if given.whole == allowed.whole and not leaves:
        return
    equation, name = case.newest("t"), process.definition.name
    if given.whole != allowed.whole:
        text = (
            f"`t` is {'an index' if allowed.whole else 'a real number'} on `{name}`, and this law "
        )
        text += "gives whole numbers" if given.whole else "gives fractions"
    else:
        text = f"this law of `t` leaves the range on which `{name}` is defined"
    because = f"it gives {_range(given)}, and `{name}` is defined for {_range(allowed)}"
    at, also = Label(case.place(equation)), Label(case.called(process), f"t is {_range(allowed)}")
    hint = _same_law(case, equation) or _own_help(case, equation)
    hint = hint or _kept(equation, given, allowed)
    if given.whole != allowed.whole:
        hint = f"leave it out, and `{own.span.text}` of `{name}` counts"
    found.append(Finding("DIF206", text, at, (also,), because, hint))


def _kept(equation: Equation, given: Support, allowed: Support) -> str:
    """The edit that keeps a law of t where the process is defined."""
    if equation.form != "~" or is_shipped(equation.span):
        return f"keep `t` in {shown(allowed.low)}..{shown(allowed.high)}"
    law = kept_inside(equation.value, given, (allowed.low, allowed.high))
    edit = f"write `t ~ {law}`"
    return edit if _within(given, allowed, NEAR) else f"choose other numbers, or {edit}"


def grid(case: Case, found: list[Finding]) -> None:
    """A grid of times stays where the process that it is laid over is defined."""
    equations, process = case.objective.equations, case.slot("process")
    time = case.term("time")
    for label in equations.scopes:
        own = equations.versions.get(f"{label}.t", [None])[0]
        if process is None or time is None or "." not in label or own is None:
            continue
        inner = next(u for u in equations.uses if u.label == label)
        allowed, given = case.law_support(own), support(time)
        name, at = inner.definition.name, Label(case.called(inner))
        if allowed.whole:
            text = f"`{name}` counts steps already, and a grid of times needs times to stand on"
            hint = f"write `process = {inner.call.span.text}`, or a grid of a continuous process"
            found.append(Finding("DIF206", text, at, help=hint))
        elif allowed and given and not _within(given, allowed):
            text = f"this grid leaves the range on which `{name}` is defined"
            because = (
                f"its times are {_range(given)}, and `{name}` is defined for {_range(allowed)}"
            )
            hint = "give the spacing other ends: `spacing = trailing(low = …, high = …)`"
            found.append(Finding("DIF206", text, at, because=because, help=hint))


def moments(case: Case, found: list[Finding]) -> None:
    """A quantity that is read at another time is read where the process is defined."""
    process, allowed = case.slot("process"), case.own_times if case.own_time else Support()
    if process is None or not allowed or any(f.code in ("DIF206", "DIF221") for f in found):
        return
    for term, written in case.reading.moments:
        known = not any(part.op == "input" for part in walk(term))  # else only a run can tell
        given = support(term) if known else Support()
        if not given or is_shipped(written.span) or _within(given, allowed, NEAR):
            continue
        name = process.definition.name
        text = f"`t = {written.span.text}` leaves the range on which `{name}` is defined"
        because = f"it gives {_range(given)}, and `{name}` is defined for {_range(allowed)}"
        hint = f"keep it in {shown(allowed.low)}..{shown(allowed.high)}, with `min` or `max`"
        found.append(Finding("DIF206", text, Label(written.span), (), because, hint))
        return


NEAR = 1e-4  # of an end, at which a law may stop only to be safe


def _within(given: Support, allowed: Support, near: float = 1e-9) -> bool:
    slack = near * max(1.0, abs(allowed.low))
    return allowed.low - slack <= given.low and given.high <= allowed.high + slack


def _range(support: Support) -> str:
    if support.low == support.high:
        return shown(support.low)
    return f"{shown(support.low)} to {shown(support.high)}"


def _own_help(case: Case, equation: Equation) -> str:
    """What the block that a law of t is from says to do where it does not fit."""
    needs = case.objective.equations.needs
    return next((n.help for n in needs if n.use.label == equation.scope.label and n.help), "")


def _same_law(case: Case, equation: Equation) -> str:
    """The law of t that gives sigma / alpha the law that was written, on a logistic path."""
    law = equation.value
    if not isinstance(law, Call) or not _logistic(case):
        return ""
    meant = equation.scope.home.find("function", law.path)
    body = meant.node.value if meant else None
    if not isinstance(body, Call) or body.path != ("exp",):
        return ""
    for other in equation.scope.home.definitions("function"):
        value = other.node.value
        if isinstance(value, Call) and value.path == ("sigmoid",) and value.args == body.args:
            args = law.span.text[len(law.dotted) :]
            return f"write `t ~ {other.name}{args}`, which gives `sigma / alpha` that law"
    return ""


def _logistic(case: Case) -> bool:
    """Whether sigma / alpha = t / (1 - t)."""
    terms = [case.term(name, ALONG) for name in ("alpha", "sigma")]
    if None in terms:
        return False
    at = (0.2, 0.5, 0.9)
    return all(
        math.isclose(sigma * (1 - t), alpha * t, rel_tol=1e-9)
        for t, (alpha, sigma) in zip(at, case.along(*terms, at=at), strict=True)
    )
