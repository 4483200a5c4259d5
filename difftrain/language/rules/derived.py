"""Rules about deriving: every equation has a meaning, every parameter is within its range."""

from __future__ import annotations

from difftrain.language.domains import check_domain
from difftrain.language.finding import Finding, Label
from difftrain.language.names import SLOTS, is_shipped
from difftrain.language.operations import NAMES
from difftrain.language.part import Interface
from difftrain.language.rules.case import Case, inside
from difftrain.language.scope import choices, formals
from difftrain.language.term import Term
from difftrain.language.tree import Name
from difftrain.language.worlds import HERE, Frame, Problem


def domains(case: Case, found: list[Finding]) -> None:
    """Every argument that a spec writes is within the range its block gives."""
    versions = case.objective.equations.versions
    for use in case.objective.equations.uses:
        for name, (formal, _) in formals(use.definition).items():
            written = versions.get(f"{use.label}.{name}", [None])[0]
            bound = formal.domain is not None or formal.whole
            if not bound or written is None or is_shipped(written.span):
                continue
            words = choices(formal)
            term = case.term(f"{use.label}.{name}")
            if words and isinstance(written.value, Name) and written.value.dotted not in words:
                check_domain(formal, written.value, written.value.dotted, found)
            elif isinstance(term, Term) and term.op in ("const", "word"):
                check_domain(formal, written.value, term.value, found)


def given_times(case: Case, found: list[Finding]) -> None:
    """The network is given every time that the objective has, and no other."""
    backbone, versions = case.objective.backbone, case.objective.equations.versions
    if backbone is None or not case.slot("process"):
        return
    call = backbone.uses[0].call.span
    if any(inside(f.at.span, call) or f.code == "DIF119" for f in found):
        return  # which may be why
    times, inputs = backbone.interface.times, backbone.interface.inputs
    if times[0] != "t":
        text, hint = "the first time that a network is given is `t`", "write `times = [t, …]`"
        found.append(Finding("DIF213", text, Label(call), help=hint))
    if "r" in versions and "r" not in times:
        earlier = Label(case.place(case.newest("r")), "this defines `r`")
        text = "the network is not given `r`, the earlier time of this objective"
        because = "what is learned depends on both times"
        hint = f"write `{backbone.uses[0].definition.name}(times = [t, r])`"
        found.append(Finding("DIF212", text, Label(call), (earlier,), because, hint))
    given = [name.rpartition(".")[2] for name in (*times, *inputs)]
    for name in sorted({n for n in given if given.count(n) > 1}):
        text = f"the network is given two values as `{name}`"
        hint = "list each once, and call them differently"
        found.append(Finding("DIF213", text, Label(call), help=hint))
    for name in (*times, *inputs):
        if name != "t" and name not in versions and case.term(name) is None:
            text = f"the network is given `{name}`, which nothing defines"
            hint = f"take `{name}` out of the list, or define it: `{name} = …`"
            found.append(Finding("DIF213", text, Label(call), help=hint))


def noise(case: Case, found: list[Finding]) -> None:
    """Noise has the shape of the data."""
    eps = case.term("eps")
    if eps is None or eps.kind == "field":
        return
    text = f"`eps` is {NAMES[eps.kind]}, and noise is shaped like the data"
    because = "all numbers of a sample would get the same noise"
    at, hint = (
        Label(case.place(case.newest("eps"))),
        "make it of `noise(x0)`, as `2 * noise(x0)` is",
    )
    found.append(Finding("DIF121", text, at, because=because, help=hint))


def meaning(case: Case, found: list[Finding]) -> None:
    """The loss, and every equation that the spec puts there, can be derived."""
    derivation = case.objective.derivation()
    for name, cap in _everything(case):
        try:
            derivation.read(name, HERE.cap(**{name: cap}) if cap is not None else HERE)
        except Problem as problem:
            if not _is_law(case, name, problem):
                _report(case, problem, found)
    for need in case.objective.equations.needs:
        try:
            if not need.use.definition.shipped:
                derivation.value(need.condition, Frame(need.scope, {}, HERE))
        except Problem as problem:
            _report(case, problem, found)


def _is_law(case: Case, name: str, problem: Problem) -> bool:
    """Whether a parameter holds a law, which its block draws from."""
    (first, *_) = case.objective.equations.versions.get(name, (None,))
    return first is not None and first.argument and problem.finding.code == "DIF128"


def _everything(case: Case):
    yield "loss", None
    yield "row_a", None
    for name, versions in case.objective.equations.versions.items():
        for i, equation in enumerate(versions):
            if not equation.scope.home.shipped:
                yield name, None if equation is versions[-1] else i


def _report(case: Case, problem: Problem, found: list[Finding]) -> None:
    """Appends the finding of a problem, unless it follows from what was found before."""
    finding = problem.finding
    if _follows(case, finding, found):
        return
    if is_shipped(finding.at.span):
        finding = _brought_home(case, problem)
    found.append(finding)


def _follows(case: Case, finding: Finding, found: list[Finding]) -> bool:
    if any(inside(finding.at.span, f.at.span) for f in found):
        return True
    equations, backbone = case.objective.equations, case.objective.backbone
    empty = [k for slot, k in SLOTS.items() if slot != "strategy" and not case.slot(slot)]
    there = {*equations.versions, *equations.scopes}
    unset = [n for u in equations.uses for n in formals(u.definition)
             if f"{u.label}.{n}" not in there]  # fmt: skip
    moved = [f.at.span.text for f in found if f.code == "DIF106"]
    given = backbone.interface if backbone else Interface()
    asked = (*unset, *given.times, *given.inputs)
    match finding.code:
        case "DIF122":
            return any(f.code == "DIF122" and _ring(f) == _ring(finding) for f in found)
        case "DIF120":
            parts = any(f"`{kind}." in finding.message for kind in (*empty, *unset))
            return parts or any(f"`{n}`" in finding.message for n in (*unset, *moved))
        case "DIF123" if any(f.message == finding.message for f in found):
            return True
        case "DIF123":
            return bool(empty) or any(f"`{n}`" in finding.message for n in asked if n != "t")
    return False


def _ring(finding: Finding) -> set[str]:
    """The names of a circle, wherever it was entered."""
    return set(finding.message.rpartition(": ")[2].split(" -> "))


def _brought_home(case: Case, problem: Problem) -> Finding:
    """The finding at the nearest place of the spec, the library's own place beside it."""
    finding = problem.finding
    head = case.objective.block.head
    places = [p for e in problem.trail if (p := case.place(e)) != head]
    at = Label(places[0] if places else head)
    also = (Label(finding.at.span, "read here"),)
    return Finding(finding.code, finding.message, at, also, finding.because, finding.help)
