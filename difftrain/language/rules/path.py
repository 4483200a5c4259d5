"""Rules about the path from data to noise: what can be recovered along it, and where t may go."""

from __future__ import annotations

import math
from itertools import pairwise

from difftrain.language.algebra import NotLinear, linear
from difftrain.language.finding import Finding, Label
from difftrain.language.numbers import Support
from difftrain.language.rules.case import ALONG, Case, shown
from difftrain.language.scope import Equation
from difftrain.language.term import Term, const, leaf, rebuild, show
from difftrain.language.tree import Binary, Call, Define, Name, Span

ZERO = 1e-9
X0, EPS = (leaf("variable", "field", name=n) for n in ("x0", "eps"))


# ---- a prediction that cannot be read back


def singular(case: Case, found: list[Finding]) -> None:
    """Clean data and noise can be recovered from xt and the prediction wherever t goes."""
    zeros = _zeros(case)
    if None in (case.term("x0_hat", ALONG), case.term("alpha", ALONG)):
        return
    if not zeros or len(zeros) == len(case.times.values) > 1:
        return  # everywhere: then the target is the input, which is a rule of its own
    bad = [t for t in zeros if t != case.times.low] or (
        zeros if len(case.times.values) == 1 else []
    )
    prediction = case.slot("prediction_type")
    if not bad or prediction is None:
        return
    touched = not case.times.whole and bad == [case.times.high] and len(case.times.values) > 1
    alpha = case.term("alpha", ALONG)
    noise = abs(case.along(alpha, at=bad[-1:])[0][0]) < ZERO
    text = _what_fails(prediction.definition.name, bad[-1], noise, case.times.whole)
    names = _names(case, ALONG)
    at = Label(
        case.called(prediction),
        f"needs division by {show(case.term('det', ALONG), names, top=False)}",
    )
    where = Label(_guilty(case), f"alpha is 0 at t = {shown(bad[-1])}" if noise else "")
    because = (
        f"x0_hat = {show(case.term('x0_hat', ALONG), names)} has no value at t = {shown(bad[-1])}"
    )
    severity = "warning" if touched else "error"
    hint = _ways_out(case, touched)
    found.append(Finding("DIF203", text, at, (where,), because, hint, severity=severity))


def _zeros(case: Case) -> list[float]:
    """The times at which the determinant vanishes."""
    det = case.term("det", ALONG)
    if det is None:
        return []
    at = list(case.times.values)
    numbers = [row[0] for row in case.along(det)]
    zeros = [t for t, d in zip(at, numbers, strict=True) if abs(d) < ZERO]
    if not case.times.whole:
        steps = pairwise(zip(at, numbers, strict=True))
        crossed = (_crossing(case, det, a, b) for (a, x), (b, y) in steps if x * y < 0)
        zeros += [t for t in crossed if t is not None]
    return sorted(zeros)


def _crossing(case: Case, det: Term, low: float, high: float) -> float | None:
    """Where between two times of different sign the determinant is 0; None at a pole or a jump."""
    if not math.isfinite(high - low):
        return None
    at_low = case.along(det, at=[low])[0][0]
    for _ in range(60):
        middle = (low + high) / 2
        if case.along(det, at=[middle])[0][0] * at_low > 0:
            low = middle
        else:
            high = middle
    return low if abs(case.along(det, at=[low])[0][0]) < 1e-6 else None


def _what_fails(name: str, t: float, noise: bool, whole: bool) -> str:
    if noise and whole:
        return f"`{name}` cannot be trained on a process whose last step is pure noise"
    if noise:
        return f"`{name}` says nothing about clean data at t = {shown(t)}, where `xt` is pure noise"
    return f"`{name}` does not tell clean data from noise at t = {shown(t)}"


def _names(case: Case, world) -> dict[Term, str]:
    names = {case.term(n, world): n for n in ("sigma", "alpha", "xt", "pred")}
    return {t: n for t, n in names.items() if t is not None and t.op != "const"}


def _guilty(case: Case) -> Span:
    """The argument of the process without which it would work, or the whole process."""
    process = case.slot("process")
    dropped = next((a for a, _ in _without_arguments(case)), None)
    return (
        dropped.span if dropped else case.called(process) if process else case.objective.block.head
    )


def _without_arguments(case: Case):
    """The written arguments of the process without which nothing is singular."""
    process = case.slot("process")
    call = process.call if process else None
    for argument in call.args if isinstance(call, Call) else ():
        rest = tuple(a for a in call.args if a is not argument)
        changed = case.variant("process", Call(call.path, rest, call.span, call.head))
        if not _troubled(changed):
            yield argument, changed


def _troubled(case: Case) -> bool:
    zeros = _zeros(case)
    return case.term("det", ALONG) is None or any(t != case.times.low for t in zeros)


def _ways_out(case: Case, touched: bool) -> str:
    """Edits that help, tried out: another prediction, a process without an argument, less of t."""
    ways = [f"use `{name}`"] if (name := _best_prediction(case)) else []
    ways += [f"drop `{a.span.text}`" for a, _ in _without_arguments(case)]
    law = case.term("t")
    if touched and law is not None and law.op == "draw" and law["law"] == "uniform":
        low, high = case.times.low, case.times.high
        ways.append(f"write `t ~ uniform({shown(low)}, {shown(high - (high - low) / 1000)})`")
    return ", or ".join(ways) or "keep `t` away from there"


def _best_prediction(case: Case) -> str | None:
    """The library's prediction whose determinant stays farthest from 0."""
    best, most = None, ZERO
    for definition in case.spec.names.definitions("prediction"):
        span = case.objective.block.head
        changed = case.variant("prediction_type", Name((definition.name,), span))
        det = changed.term("det", ALONG)
        if not definition.shipped or det is None or any(_broken(changed)):
            continue
        least = min((abs(row[0]) for row in changed.along(det)[1:]), default=0)
        if least > most:
            best, most = definition.name, least
    return best


# ---- a target that is the input


def identity(case: Case, found: list[Finding]) -> None:
    """The network is not asked for what it is given."""
    world = ALONG.swap({"x0": X0, "eps": EPS})
    xt, target = (case.term(name, world) for name in ("xt", "target"))
    if xt is None or target is None or not case.times:
        return
    parallel = _parallel(case, _open(target), xt)
    if not parallel:
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
            if (
                isinstance(node, Define)
                and node.name == "target"
                and node.value == _name("x0", node)
            ):
                return definition.name
    return None


def _name(word: str, node: Define) -> Name:
    return Name((word,), node.span)


# ---- what a block takes for granted


def needs(case: Case, found: list[Finding]) -> None:
    """What the blocks in use take for granted holds."""
    for need, number, t in _broken(case):
        text = f"`{need.use.definition.name}` needs `{need.condition.span.text}`"
        because = f"at t = {shown(t)} it is {number}" if number else ""
        at = Label(case.called(need.use))
        hint = need.help or f"use something else than `{need.use.definition.name}` here"
        found.append(Finding("DIF205", text, at, because=because, help=hint))


def _broken(case: Case):
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
    values = case.along(truth)
    return [t for t, (v,) in zip(case.times.values, values, strict=True) if v == 0]


# ---- where t may go


def time_law(case: Case, found: list[Finding]) -> None:
    """The law of t stays where the process is defined."""
    own, process = case.own_time, case.slot("process")
    if own is None or process is None or case.newest("t") is own or not case.own_times:
        return
    given, allowed = case.times, case.own_times
    slack = 1e-9 * max(1.0, abs(allowed.low))
    leaves = given.low < allowed.low - slack or given.high > allowed.high + slack
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
    hint = _same_law(case, equation) or f"keep `t` in {shown(allowed.low)}..{shown(allowed.high)}"
    if given.whole != allowed.whole:
        hint = f"leave it out, and `{own.span.text}` of `{name}` counts"
    found.append(Finding("DIF206", text, at, (also,), because, hint))


def _range(support: Support) -> str:
    return f"{shown(support.low)} to {shown(support.high)}"


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
