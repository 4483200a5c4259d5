"""What a spec trains, as a page of text: equations, time, weights, the cost of a step, the run."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from difftrain.language.density import Curve, Row, curve
from difftrain.language.derive import Derivation
from difftrain.language.equations import MAIN, Line, equations, labels, law
from difftrain.language.finding import SpecError
from difftrain.language.guidance import own_guidance
from difftrain.language.horizon import horizon, own_shift
from difftrain.language.names import standard
from difftrain.language.part import Part, written
from difftrain.language.scope import Equation, Use, formals
from difftrain.language.spec import Objective, Spec
from difftrain.language.term import Term, const, is_const, show, walk
from difftrain.language.weighting import (
    NUMBERS,
    Weighting,
    forwards,
    in_spaces,
    simple,
    sized,
    weighting,
)
from difftrain.language.worlds import Problem

WIDTH = 100
BAR = 16
ROWS = 9
QUANTILES = (0.02, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.98)
CURVE = ("t", "alpha", "sigma", "snr", "logsnr", "det")
HOW = {
    "exact": "p(lambda) is exact: t is a monotone map of one draw",
    "steps": "p(lambda) of an index is its share over the distance to the level before",
    "sampled": "p(lambda) is counted over 2048 points: t is no monotone map of one draw",
}
RESIDUALS = {
    "pred": "(pred - target)^2",
    "x0_hat": "(x0_hat - x0)^2",
    "eps_hat": "(eps_hat - eps)^2",
    "v": "(v_hat - v)^2",
}
REDUCED = {
    "mean": "the mean over the numbers of a sample, then over the batch",
    "sum": "the sum over the numbers of a sample (numel(x0) times their mean), then the mean over "
    "the batch",
}


@dataclass(eq=False)
class Subject:
    """An objective with everything that its page tells."""

    spec: Spec
    objective: Objective
    derivation: Derivation
    weighting: Weighting
    names: dict[Term, str]

    @classmethod
    def of(cls, spec: Spec, objective: Objective) -> Subject:
        """Raises SpecError."""
        derivation = objective.derivation()
        try:
            for name in (*MAIN, "eps", *CURVE):
                derivation.read(name)
            weight = weighting(derivation)
            return cls(spec, objective, derivation, weight, labels(derivation))
        except Problem as problem:
            raise SpecError([problem.finding]) from None

    def read(self, name: str) -> Term:
        return self.derivation.read(name)

    def show(self, term: Term) -> str:
        return show(term, self.names, top=False)


def explain(spec: Spec, name: str | None = None) -> str:
    """The page of one objective of a spec, or of all. Raises SpecError."""
    chosen = [spec.objective(name)] if name else spec.objectives.values()
    return "\n".join(page(spec, objective) for objective in chosen)


def page(spec: Spec, objective: Objective) -> str:
    """The page of one objective. Raises SpecError."""
    subject = Subject.of(spec, objective)
    head = f"objective {objective.name or '(unnamed)'}  in {spec.path}\n"
    return head + "".join(f"\n{title}\n{_indented(part(subject))}" for title, part in PARTS.items())


def _indented(lines: Iterable[str]) -> str:
    return "".join(f"  {part}".rstrip() + "\n" for line in lines for part in _fitted(line))


def _fitted(line: str) -> list[str]:
    wrap = {"subsequent_indent": "    ", "break_long_words": False, "break_on_hyphens": False}
    return [line] if len(line) <= WIDTH - 2 else textwrap.wrap(line, WIDTH - 2, **wrap)


# ---- equations


def _equations(subject: Subject) -> list[str]:
    lines = equations(subject.derivation)
    width = min(14, max(len(line.name) for line in lines))
    return [text for line in lines for text in _wrapped(line, width)]


def _wrapped(line: Line, width: int) -> list[str]:
    head = f"{line.name:{width}} {line.sign} "
    later = " " * (width + 3)
    return textwrap.wrap(
        head + line.text, WIDTH - 2, subsequent_indent=later, break_long_words=False,
        break_on_hyphens=False, drop_whitespace=True,
    )  # fmt: skip


# ---- arguments


def _arguments(subject: Subject) -> list[str]:
    """What every block in use was given, by position, by name or by default."""
    told = {u.label: _bound(subject, u) for u in subject.objective.equations.uses}
    titles = {u.label: u.definition.name for u in subject.objective.equations.uses}
    return [f"{titles[n]}: {given}" for n, given in told.items() if given] or ["none"]


def _bound(subject: Subject, use: Use) -> str:
    versions = subject.objective.equations.versions
    given = {n: versions.get(f"{use.label}.{n}") for n in formals(use.definition)}
    return ", ".join(f"{n} = {_argument(subject, found[0])}" for n, found in given.items() if found)


def _argument(subject: Subject, given: Equation) -> str:
    """An argument as a number or a word, or as it was written."""
    with suppress(Problem):
        term = subject.read(given.name)
        if isinstance(term, Term) and term.op in ("const", "word"):
            return show(term)
    return " ".join(given.value.span.text.split())


# ---- time and prediction


def _time(subject: Subject) -> list[str]:
    t = subject.read("t")
    line = _curve(subject, const(1))
    low, high = line.range
    rows = line.rows
    about = "about " if line.kind == "sampled" else ""
    span = f"logsnr from {about}{_number(high)} (data) to {about}{_number(low)} (noise)"
    ends = f"indices {rows[0].t:g} to {rows[-1].t:g}" if line.kind == "steps" else ""
    told = [f"t ~ {law(t)}", ", ".join(x for x in (ends, span) if x), HOW[line.kind]]
    return [*_adopted(subject), *told, *_assumed(t)]


def _adopted(subject: Subject) -> list[str]:
    """The process, where the spec itself only says where it is read from."""
    (use,) = subject.objective.slots["process"]
    written = use.call.span
    inside = written.source is subject.objective.block.span.source
    return [] if inside else [f"process = {written.text}, from {written.source.path}"]


def _assumed(term: Term) -> list[str]:
    told = {"numel": f"numel(x0) = {NUMBERS}", "step": "step = 1000"}
    read = {t["name"] if t.op == "input" else t.op for t in walk(term)}
    return [f"numbers below are for {text}" for name, text in told.items() if name in read]


def _prediction(subject: Subject) -> list[str]:
    atoms = frozenset((subject.read("alpha"), subject.read("sigma")))
    a, b, det = (subject.show(simple(subject.read(n), atoms)) for n in ("row_a", "row_b", "det"))
    lines = [f"pred stands for a * x0 + b * eps with a = {a}, b = {b}"]
    lines.append(f"det = alpha * b - sigma * a = {det}")
    scales = [(n, subject.read(n)) for n in ("c_in", "c_out", "c_skip", "c_noise")]
    usual = {"c_in": const(1), "c_out": const(1), "c_skip": const(0), "c_noise": subject.read("t")}
    told = [f"{n} = {subject.show(term)}" for n, term in scales if term is not usual[n]]
    return lines + (["network scaled by " + ", ".join(told)] if told else [])


# ---- cost


def _cost(subject: Subject) -> list[str]:
    live, still, derivatives = forwards(subject.read("loss"))
    parts = [f"{_count(live, 'forward')} with gradient", f"{_count(still, 'forward')} without"]
    if derivatives:
        parts.append(f"{_count(derivatives, 'forward-mode derivative')}")
    return [", ".join(parts)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


# ---- weights


def _weights(subject: Subject) -> list[str]:
    rest = [f"beside it: {subject.show(term)}" for term in subject.weighting.rest]
    weight = subject.weighting.weight
    if weight is None:
        mixed = "," in subject.weighting.reduction
        why = "its parts are reduced in different ways" if mixed else NO_SQUARE
        return [f"none: {why}", *rest]
    named = in_spaces(weight, subject.derivation)
    lines = [f"{RESIDUALS[space]:18} {subject.show(term)}" for space, term in named.items()]
    remark = (
        "one weight written on each error; v = (alpha * eps - sigma * x0) / sqrt(alpha^2 + sigma^2)"
    )
    return [*lines, remark, f"reduced by {REDUCED[subject.weighting.reduction]}", *rest]


NO_SQUARE = "no part of the loss is a weight times a square of pred - target"


def _table(subject: Subject) -> list[str]:
    weight = subject.weighting.weight
    if weight is None:
        return ["none: the loss is no weighted square"]
    line = _curve(subject, weight)
    rows = shown_rows(line)
    known = [row.w for row in rows if math.isfinite(row.w)]
    largest = max((abs(w) for w in known), default=0.0)
    if not largest:
        return ["none: the weight has no number before a run"]
    titles = ("t", "alpha", "sigma", "snr", "logsnr", "p(lambda)", "weight", "w(lambda)")
    lines = ["".join(f"{title:>10}" for title in titles)]
    lines += [_table_row(row, largest) for row in rows]
    scale = (
        f"w(lambda) = 2 * weight * (det / alpha)^2 * p(lambda), scaled: 1 stands for {largest:.4g}"
    )
    return [*lines, scale, *_assumed(weight)]


def _table_row(row: Row, largest: float) -> str:
    numbers = (row.t, row.alpha, row.sigma, row.snr, row.logsnr, row.density, row.weight)
    w = row.w / largest
    bar = "#" * round(BAR * w) if math.isfinite(w) and w > 0 else ""
    return "".join(f"{_number(n):>10}" for n in (*numbers, w)) + f"  {bar}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def shown_rows(line: Curve) -> list[Row]:
    """A few rows from the first to the last."""
    last = len(line.rows) - 1
    picked = dict.fromkeys(round(i * last / (ROWS - 1)) for i in range(ROWS))
    return [line.rows[i] for i in picked]


def _curve(subject: Subject, weight: Term) -> Curve:
    return levels(subject.derivation, weight, QUANTILES)


def levels(derivation: Derivation, weight: Term, *quantiles) -> Curve:
    """The curve of a weight under a derivation, with a number for `numel(x0)`."""
    terms = {name: derivation.read(name) for name in CURVE} | {"weight": weight}
    return curve({name: sized(term) for name, term in terms.items()}, *quantiles)


# ---- the run


def _run(subject: Subject) -> list[str]:
    lines = [f"conditions: {_dropping(subject)}", f"network: {_backbone(subject.objective)}"]
    for kind, tell in RUNS.items():
        run = subject.spec.runs.get(kind)
        told = tell(run, subject.objective) if run else f"this spec has no `{kind}` block"
        lines.append(f"{kind}: {told}")
    return lines


def _dropping(subject: Subject) -> str:
    dropped = subject.read("dropped")
    if is_const(dropped):
        return "always dropped" if dropped.value else "never dropped"
    if dropped.op == "draw" and dropped["law"] == "bernoulli":
        return f"dropped for a sample with probability {subject.show(dropped.args[0])}"
    return f"dropped where {subject.show(dropped)}"


def _backbone(objective: Objective) -> str:
    backbone = objective.backbone
    if backbone is None:
        return "none is declared"
    reads = ", ".join(("xt", *backbone.interface.times, *backbone.interface.inputs, "cond"))
    return f"`{backbone.part.module}` reads {reads}"


def _train(run, objective: Objective) -> str:
    kept = f"weights in fp32, averaged with decay {written(run['ema'])}"
    return (
        f"{written(run['optimizer'])}, {run['steps']} steps, forwards in {run['precision']}, {kept}"
    )


def _sample(run, objective: Objective) -> str:
    w = run["guidance"]
    form = "no guidance" if w == 1 else f"guidance u + {w} * (c - u), where 1 is none"
    if objective.backbone and own_guidance(objective):
        form = f"guidance {w} inside the network, none outside"
    ways = [f"{words} {written(run[name])}" for name, words in WAYS.items() if run.values.get(name)]
    solver = f"{written(run['solver'])}{_shifted(run, objective)}"
    return ", ".join([solver, form, *ways]) + _origin(run["solver"])


WAYS = {
    "guidance_interval": "where sigma / alpha is in",
    "guidance_rescale": "rescaled by",
    "guide": "u from",
}


def _origin(solver: Part) -> str:
    """Where a solver of one's own comes from."""
    place, colon, function = solver.module.partition(":")
    if solver.name in ("", solver.module):
        return ""
    if colon:
        return f"; `{solver.name}` is the function `{function}` of the Python module `{place}`"
    shipped = any(("solver", place) in names.own for names in standard())
    made = "made from" if shipped else "what an installed package calls"
    return f"; `{solver.name}` is {made} `{place}`"


def _shifted(run, objective: Objective) -> str:
    """What `shift = auto` means, where it means something."""
    options = run["solver"].options
    even = options.get("grid") in ("auto", "even") and horizon(objective)[0] == "real"
    shift = own_shift(objective) if even and options.get("shift") == "auto" else 1
    if shift == 1:
        return ""
    return f", times shifted {'as' if math.isnan(shift) else f'by {shift:g} as'} they were trained"


def _data(run, objective: Objective) -> str:
    return f"{written(run['source'])}, {run['size']} px, {run['batch']} samples a step"


RUNS: dict[str, Callable] = {"data": _data, "train": _train, "sample": _sample}
PARTS: dict[str, Callable[[Subject], Iterable[str]]] = {
    "equations, after every redefinition": _equations,
    "arguments": _arguments,
    "time": _time,
    "prediction": _prediction,
    "cost of a step": _cost,
    "weight of each squared error": _weights,
    "weight of each noise level (lambda = logsnr)": _table,
    "run": _run,
}
