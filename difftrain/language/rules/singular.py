"""The rule about predictions that cannot be read back, and what would help, tried out."""

from __future__ import annotations

import math
from itertools import pairwise

from difftrain.language.finding import Finding, Label
from difftrain.language.rules.case import ALONG, Case, shown
from difftrain.language.rules.path import broken
from difftrain.language.term import Term, show
from difftrain.language.tree import Call, Name, Span

ZERO = 1e-9


def singular(case: Case, found: list[Finding]) -> None:
    """Clean data and noise can be recovered from xt and the prediction wherever t goes."""
    prediction, bad = case.slot("prediction_type"), _bad_times(case)
    known = {n: case.term(n, ALONG) for n in ("alpha", "det", "x0_hat")}
    if not bad or prediction is None or None in known.values():
        return
    if any(f.code in ("DIF204", "DIF206") for f in found):
        return  # a network that returns its input has nothing to read back; times to be changed
    touched = not case.times.whole and bad == [case.times.high] != [case.times.low]
    noise = abs(case.along(known["alpha"], at=bad[-1:])[0][0]) < ZERO
    at, names = f"at t = {shown(bad[-1])}", _names(case)
    divided = f"needs division by {show(known['det'], names, top=False)}"
    found.append(
        Finding(
            "DIF203",
            _what_fails(prediction.definition.name, at, noise, case.times.whole),
            Label(case.called(prediction), divided),
            (Label(_guilty(case), f"alpha is 0 {at}" if noise else ""),),
            because=f"x0_hat = {show(known['x0_hat'], names)} has no value {at}",
            help=_ways_out(case, touched),
            severity="warning" if touched else "error",
        )
    )


def _bad_times(case: Case) -> list[float]:
    """The times at which nothing can be recovered; at the data end nothing has to be."""
    zeros = _zeros(case)
    return zeros if len(case.times.values) == 1 else [t for t in zeros if t != case.times.low]


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


def _what_fails(name: str, at: str, noise: bool, whole: bool) -> str:
    if noise and whole:
        return f"`{name}` cannot be trained on a process whose last step is pure noise"
    if noise:
        return f"`{name}` says nothing about clean data {at}, where `xt` is pure noise"
    return f"`{name}` does not tell clean data from noise {at}"


def _names(case: Case) -> dict[Term, str]:
    names = {case.term(n, ALONG): n for n in ("sigma", "alpha", "xt", "pred")}
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
    return case.term("det", ALONG) is None or bool(_bad_times(case))


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
        if not definition.shipped or det is None or any(broken(changed)):
            continue
        least = min((abs(row[0]) for row in changed.along(det)[1:]), default=0)
        if least > most:
            best, most = definition.name, least
    return best
