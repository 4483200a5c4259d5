"""Rules about the loss: one number per sample, with a gradient, and weights that reach it."""

from __future__ import annotations

from difftrain.language.finding import Finding, Fix, Label
from difftrain.language.rules.case import Case
from difftrain.language.scope import Equation, own_name, parts
from difftrain.language.term import Term
from difftrain.language.tree import Binary, Name, Number

BLOCKING = ("stop", "lt", "le", "gt", "ge", "eq", "ne", "floor", "ceil", "numel")
KIND = {
    "field": "one number per element",
    "tokens": "one number per token",
    "scalar": "one number for the whole batch",
    "table": "a table",
}


def per_sample(case: Case, found: list[Finding]) -> None:
    """The loss is one number per sample."""
    loss = case.term("loss")
    if loss is None or loss.kind == "sample":
        return
    equation = _origin(case, case.newest("loss"))
    expr, fix = equation.value, None
    hint = f"write `mean({' '.join(expr.span.text.split())})`"
    match expr:
        case Binary(op="^", left=Binary(op="-", left=left, right=right), right=Number(value=2)):
            text = f"mse({left.span.text}, {right.span.text})"
            hint, fix = f"write `{text}`", Fix(expr.span, text)
    if loss.kind == "scalar":
        hint = "compare `pred` with `target`: `mse(pred, target)`"
    found.append(
        Finding(
            "DIF207",
            f"the loss is {KIND.get(loss.kind, 'no number')}, not one number per sample",
            Label(case.place(equation)),
            because="weights and logs are per sample, and the mean over the batch comes last",
            help=hint,
            fix=fix,
        )
    )


def _origin(case: Case, equation: Equation) -> Equation:
    """The equation that an equation only repeats, however far back."""
    versions = case.objective.equations.versions
    while isinstance(equation.value, Name) and equation.value.dotted in versions:
        if case.newest(equation.value.dotted) is equation:
            break
        equation = case.newest(equation.value.dotted)
    return equation


def gradient(case: Case, found: list[Finding]) -> None:
    """The network that is trained is reached from the loss."""
    loss = case.term("loss")
    if loss is None or loss.kind != "sample" or _trains(loss):
        return
    if any(f.code == "DIF130" for f in found):
        return  # a number outside its range may be what takes the network away
    stopped = any(t.op == "network" for t in _below(loss, ()))
    because = (
        "every way from `loss` to the network leads through `stop`, a comparison or a frozen net"
    )
    if not stopped:
        because = "`loss` does not read what the network returns"
    text = "the loss gives the network no gradient, so training changes nothing"
    at = Label(case.place(_last_written(case)))
    found.append(
        Finding("DIF208", text, at, because=because, help="let `loss` read `pred` outside `stop`")
    )


def _trains(loss: Term) -> bool:
    nets = [t for t in _below(loss, BLOCKING) if t.op == "network"]
    return any(t.args[0].op == "module" and t.args[0]["name"] == "student" for t in nets)


def _below(root: Term, blocking) -> set[Term]:
    """The terms under the root that are not behind one of the blocking operations."""
    seen, stack = set(), [root]
    while stack:
        term = stack.pop()
        if term not in seen and term.op not in blocking:
            seen.add(term)
            stack.extend(term.args[1:] if term.op == "where" else term.args)
    return seen


def _last_written(case: Case) -> Equation:
    """The newest equation on the way from the loss that the spec itself wrote."""
    versions = case.objective.equations.versions
    for name in ("loss", "fit", "pred", "output", "target", "net"):
        if name in versions and not case.newest(name).scope.home.shipped:
            return case.newest(name)
    return case.newest("loss")


def weights_are_read(case: Case, found: list[Finding]) -> None:
    """A redefinition of `fit` reaches the loss."""
    fits = case.objective.equations.versions["fit"]
    if not case.complete or len(fits) == 1 or case.newest("fit") in case.used:
        return
    loss = _origin(case, case.newest("loss"))
    same = next((e for e in parts(loss.value) if e == fits[0].value), None)
    edit = f"`fit` for `{same.span.text}`" if same else "`fit` into `loss`: `loss = fit + …`"
    found.append(
        Finding(
            "DIF210",
            f"{case.owner(fits[-1])} weights `fit`, and `loss` does not read it",
            Label(same.span if same else case.place(loss)),
            (Label(case.place(fits[-1]), "this would change nothing"),),
            because="a weight redefines `fit`, the regression term, and `loss` adds terms to it",
            help=f"write {edit}",
            fix=Fix(same.span, "fit") if same else None,
        )
    )


def thrown_away(case: Case, found: list[Finding]) -> None:
    """No redefinition is lost because a later one does not read it."""
    if not case.complete:
        return
    for earlier, later in discarded(case):
        name = earlier.name
        mine, other = case.owner(earlier), case.owner(later)
        text = f"`{name}'` of {mine} is thrown away by {other}"
        if mine == other:
            text = f"this `{name}'` is thrown away by a later one"
        by = Label(case.place(later), f"does not read `{name}`")
        found.append(
            Finding(
                "DIF211",
                text,
                Label(case.place(earlier)),
                (by,),
                because=f"`{_flat(later)}` starts again without the `{name}` before it",
                help=_last(case, earlier)
                or f"leave one of the two out, or let the later one read `{name}`",
                severity="warning",
            )
        )


def _last(case: Case, earlier: Equation) -> str:
    """The line that does to the newest `fit` what an earlier redefinition meant to do."""
    if earlier.name != "fit" or earlier.scope.label or not own_name(earlier.value, "fit"):
        return ""
    value = " ".join(earlier.value.span.text.split())
    if case.objective.equations.versions["loss"][0].scope.home.shipped:
        return f"write `loss = {value}`, which reads the newest `fit`"
    return f"write `{value}` for `fit` in `loss`, which reads the newest"


def discarded(case: Case) -> list[tuple[Equation, Equation]]:
    """(the redefinition that nothing reads, the later one that is read instead)."""
    found = []
    for versions in case.objective.equations.versions.values():
        for i, earlier in enumerate(versions):
            later = next((e for e in versions[i + 1 :] if e in case.used), None)
            if i > 0 and earlier not in case.used and later is not None:
                found.append((earlier, later))
    return found


def _flat(equation: Equation) -> str:
    return " ".join(equation.span.text.split())
