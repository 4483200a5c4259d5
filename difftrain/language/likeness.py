"""Whether two specs train the same: equations, then w(lambda), then the options of the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from difftrain.language.density import Curve, Likeness
from difftrain.language.density import compare as compare_curves
from difftrain.language.equations import equations
from difftrain.language.explain import Subject, levels
from difftrain.language.options import Run
from difftrain.language.part import Part
from difftrain.language.spec import Spec
from difftrain.language.term import Term
from difftrain.language.weighting import simple

EXACT = 1e-6
# Where none of these is redefined, an objective is its law of t, its row and its weight.
PLAIN = ("eps", "xt", "flow", "target", "output", "pred", "det", "x0_hat", "eps_hat")
SHOWN = 7


@dataclass(frozen=True)
class Verdict:
    same: bool
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)


def compare(first: Spec, second: Spec) -> Verdict:
    """What two specs have in common, objective by objective. Raises SpecError."""
    names = {n: n for n in first.objectives if n in second.objectives}
    if len(first.objectives) == len(second.objectives) == 1:
        names = dict(zip(first.objectives, second.objectives, strict=True))
    verdicts = [_objectives(_subject(first, a), _subject(second, b)) for a, b in names.items()]
    alone = [f"only A has objective `{n}`" for n in first.objectives if n not in names]
    alone += [f"only B has objective `{n}`" for n in second.objectives if n not in names.values()]
    options = list(_options(first, second))
    lines = [line for v in verdicts for line in v.lines] + alone + options
    return Verdict(all(v.same for v in verdicts) and not alone and not options, tuple(lines))


def _subject(spec: Spec, name: str) -> Subject:
    return Subject.of(spec, spec.objective(name))


def _objectives(a: Subject, b: Subject) -> Verdict:
    if a.read("loss") is b.read("loss"):
        return Verdict(True, (f"{_title(a, b)}: the same equations",))
    different = tuple(_different_equations(a, b))
    if not (_weighs_only(a) and _weighs_only(b) and a.read("dropped") is b.read("dropped")):
        return Verdict(False, (f"{_title(a, b)}: another objective", *different))
    curves = [levels(s.derivation, s.weighting.weight) for s in (a, b)]
    same, lines = _levels(*curves)
    if a.weighting.reduction != b.weighting.reduction:
        both = f"`{a.weighting.reduction}` in A, `{b.weighting.reduction}` in B"
        lines.append(f"  over the numbers of a sample: {both}, a factor of numel(x0)")
    lines += _rows(a, b) if same else [*_rows(a, b), *different]
    return Verdict(same, (f"{_title(a, b)}: {lines[0]}", *lines[1:]))


def _title(a: Subject, b: Subject) -> str:
    names = dict.fromkeys((a.objective.name, b.objective.name))
    return " and ".join(f"`{n}`" for n in names)


def _weighs_only(subject: Subject) -> bool:
    """Whether the objective is fixed by its row, its weight and its law of t."""
    versions = subject.derivation.equations.versions
    plain = all(len(versions[name]) == 1 for name in PLAIN) and subject.read("eps").op == "draw"
    return plain and subject.weighting.weight is not None and not subject.weighting.rest


def _levels(a: Curve, b: Curve) -> tuple[bool, list[str]]:
    """Whether w(lambda) is the same up to a constant, and what to say about it."""
    like = compare_curves(a, b)
    if like is None:
        return False, ["another objective: they train different noise levels", *_ranges(a, b)]
    times = "that of A" if abs(like.factor - 1) < EXACT else f"{like.factor:.6g} times that of A"
    if like.spread > EXACT:
        nearly = (
            f"nearly {times}, within {like.spread:.1%}" if like.spread < 0.05 else "not that of A"
        )
        lines = [f"another objective: w(lambda) of B is {nearly}", *_table(like)]
        return False, lines + _ranges(a, b)
    if ranges := _ranges(a, b):
        return False, [
            f"another objective, though w(lambda) of B is {times} where both train",
            *ranges,
        ]
    return True, [f"the same objective up to a constant: w(lambda) of B is {times}"]


def _ranges(a: Curve, b: Curve) -> list[str]:
    if all(x == y or abs(x - y) < EXACT for x, y in zip(a.range, b.range, strict=True)):
        return []
    spans = [
        f"{low:.4g} to {high:.4g} in {n}" for n, (low, high) in (("A", a.range), ("B", b.range))
    ]
    return [f"  logsnr goes from {', '.join(spans)}"]


def _table(like: Likeness) -> list[str]:
    last = len(like.pairs) - 1
    picked = dict.fromkeys(round(i * last / (SHOWN - 1)) for i in range(SHOWN))
    lines = [f"  {'logsnr':>10}{'w of A':>12}{'w of B':>12}{'B / A':>12}"]
    for level, a, b in (like.pairs[i] for i in picked):
        ratio = f"{b / a:12.4g}" if a else f"{'-':>12}"
        lines.append(f"  {level:10.4g}{a:12.4g}{b:12.4g}{ratio}")
    return lines


def _rows(a: Subject, b: Subject) -> list[str]:
    texts = [_row(s) for s in (a, b)]
    if texts[0] == texts[1]:
        return []
    return [f"  the networks return different things: {texts[0]} in A, {texts[1]} in B"]


def _row(subject: Subject) -> str:
    atoms = frozenset((subject.read("alpha"), subject.read("sigma")))
    names = {**subject.names, subject.read("alpha"): "alpha", subject.read("sigma"): "sigma"}
    named = Subject(subject.spec, subject.objective, subject.derivation, subject.weighting, names)
    a, b = (named.show(simple(subject.read(n), atoms)) for n in ("row_a", "row_b"))
    return f"a * x0 + b * eps with a = {a}, b = {b}"


def _different_equations(a: Subject, b: Subject) -> Iterator[str]:
    """The equations that do not read the same."""
    left, right = (
        {line.name: f"{line.sign} {line.text}" for line in equations(s.derivation)} for s in (a, b)
    )
    for name in dict.fromkeys((*left, *right)):
        if left.get(name) != right.get(name):
            yield f"  A: {name} {left[name]}" if name in left else f"  A: no `{name}`"
            yield f"  B: {name} {right[name]}" if name in right else f"  B: no `{name}`"


def _options(first: Spec, second: Spec) -> Iterator[str]:
    """Networks and options of the run that differ."""
    parts = [
        [o.backbone.part for o in s.objectives.values() if o.backbone] for s in (first, second)
    ]
    if parts[0] != parts[1]:
        yield "the networks are built differently"
    for kind in dict.fromkeys((*first.runs, *second.runs)):
        left, right = first.runs.get(kind), second.runs.get(kind)
        if left is None or right is None:
            yield f"only {'A' if left else 'B'} has a `{kind}` block"
        else:
            yield from _option_lines(kind, left, right)


def _option_lines(kind: str, left: Run, right: Run) -> Iterator[str]:
    for name in left.values:
        a, b = left[name], right[name]
        same = a is b if isinstance(a, Term) else a == b
        if not same:
            yield f"{kind}.{name}: {_told(a)} in A, {_told(b)} in B"


def _told(value) -> str:
    if isinstance(value, Part):
        return f"{value.module}({', '.join(f'{k} = {_told(v)}' for k, v in value.options.items())})"
    return str(value)
