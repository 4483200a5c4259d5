"""Rules about what changes nothing: whatever a spec says must be read by training or sampling."""

from __future__ import annotations

from difftrain.language.finding import Finding, Label
from difftrain.language.names import RUN_KINDS, Definition
from difftrain.language.references import paths, references
from difftrain.language.rules.case import Case, inside, name_span
from difftrain.language.rules.loss import discarded
from difftrain.language.scope import Equation, Use, formals, own_name
from difftrain.language.spec import Spec
from difftrain.language.tree import Block, Import

SHOWN = ("guess",)  # quantities that nothing reads but a network that is given them
OUT = "take it out of `strategy`"
NOTHING = "neither training nor sampling depends on it"


def strategies(case: Case, found: list[Finding]) -> None:
    """Every strategy in the list changes something."""
    if not case.complete:
        return
    lost = {e for e, _ in discarded(case)}
    for use in case.objective.slots.get("strategy", ()):
        primes = _primes(case, use)
        if any(e in case.used or e in lost or e.name == "fit" for e in primes):
            continue
        if any(inside(f.at.span, use.definition.node.span) for f in found):
            continue
        names = ", ".join(f"`{n}`" for n in dict.fromkeys(e.name for e in primes))
        because = f"it redefines {names}, and {NOTHING}" if names else "it redefines nothing"
        text = f"`{use.definition.name}` changes nothing here"
        hint = _shown(case, primes)
        if hint and any(
            inside(f.at.span, case.objective.backbone.uses[0].call.span) for f in found
        ):
            continue  # the network was meant to be given it
        at, hint = Label(use.call.span), hint or OUT
        found.append(Finding("DIF303", text, at, because=because, help=hint))


def _shown(case: Case, primes: list[Equation]) -> str:
    """The edit that lets the network read what a strategy redefines, where only that is missing."""
    backbone = case.objective.backbone
    names = [e.name for e in primes if e.name in SHOWN]
    if backbone is None or not names or "inputs" not in backbone.part.options:
        return ""
    given = ", ".join(dict.fromkeys([*backbone.interface.inputs, *names]))
    return f"write `{backbone.uses[0].definition.name}(inputs = [{given}])`, or {OUT}"


def _primes(case: Case, use: Use) -> list[Equation]:
    versions = case.objective.equations.versions.values()
    return [e for v in versions for e in v if e.form == "'" and e.scope.label == use.label]


def arguments(case: Case, found: list[Finding]) -> None:
    """Every argument that a spec writes is read."""
    if not case.complete:
        return
    lost = {e.scope.label for e, _ in discarded(case)}
    if any(f.code == "DIF210" for f in found):
        lost |= {e.scope.label for e in case.objective.equations.versions["fit"]}
    told = {f.at.span for f in found if f.code == "DIF303"}
    for use in case.objective.equations.uses:
        if use.label in lost or use.call.span in told:
            continue
        for equation in _parameters(case, use):
            if equation not in case.used and not equation.scope.home.shipped:
                found.append(_unread_argument(case, use, equation))


def _parameters(case: Case, use: Use) -> list[Equation]:
    versions = case.objective.equations.versions
    names = [f"{use.label}.{name}" for name in formals(use.definition)]
    return [versions[name][0] for name in names if name in versions]


def _unread_argument(case: Case, use: Use, equation: Equation) -> Finding:
    name = equation.name.rpartition(".")[2]
    restated = next(
        (e for e in case.objective.equations.replaced
         if e.scope.label == use.label and own_name(e.value, name)),
        None,
    )  # fmt: skip
    because, also = NOTHING, ()
    if restated is not None:
        newer = case.objective.equations.versions[restated.name][0]
        because = f"only its own `{restated.name}` reads it, and the objective states another"
        also = (Label(case.place(newer), f"the `{restated.name}` that counts"),)
    text = f"`{name}` of `{use.definition.name}` is set and never read"
    at = Label(equation.value.span)
    return Finding("DIF301", text, at, also, because, f"leave `{name}` out")


def equations(case: Case, found: list[Finding]) -> None:
    """Every equation that a spec writes is read."""
    if not case.complete:
        return
    lost = {e for e, _ in discarded(case)}
    told = [f.at.span for f in found if f.code in ("DIF303", "DIF210", "DIF212")]
    labels = {u.label for u in case.objective.slots.get("strategy", ()) if u.call.span in told}
    for versions in case.objective.equations.versions.values():
        for equation in versions:
            silent = equation in case.used or equation in lost or equation.scope.home.shipped
            known = equation.scope.label in labels or equation.name in ("fit", "r")
            wrong = any(inside(f.at.span, equation.span) for f in found)
            if not (silent or equation.argument or known or wrong):
                found.append(_unread(equation))


def _unread(equation: Equation) -> Finding:
    name = equation.name.rpartition(".")[2]
    prime = equation.form == "'"
    text = f"`{name}'` changes nothing" if prime else f"`{name}` is never read"
    hint = f"delete it, or read `{name}` in what `loss` depends on"
    severity = "error" if prime else "warning"
    at = Label(name_span(equation))
    return Finding("DIF304", text, at, because=NOTHING, help=hint, severity=severity)


# ---- definitions of a file


def definitions(spec: Spec, found: list[Finding]) -> None:
    """Every definition and import of a file with objectives is used by one of its blocks."""
    if spec.names.shipped or any(f.code < "DIF130" for f in found):
        return  # a name that means nothing yet may be what uses them
    own = spec.names.own.values()
    if spec.objectives:
        used = _reached(spec)
        found += [_unused(d) for d in own if d not in used and d.kind != "objective"]
    spaces = {p[0] for node in spec.tree.body for p in paths(node) if len(p) > 1}
    for node in spec.tree.body:
        if not isinstance(node, Import):
            continue
        alias = node.alias or node.path[-1]
        if alias in spec.names.spaces and alias not in spaces:
            found.append(_unused_import(node))


def _reached(spec: Spec) -> set[Definition]:
    """The definitions that objectives and options name, directly or through each other."""
    tops = [n for n in spec.tree.body if isinstance(n, Block)]
    tops = [n for n in tops if n.kind in ("objective", *RUN_KINDS)]
    reached: set[Definition] = set()
    stack = [d for n in tops for d in references(n, spec.names)]
    while stack:
        definition = stack.pop()
        if definition not in reached and not definition.shipped:
            reached.add(definition)
            stack += references(definition.node, definition.home)
    return reached


def _unused(definition: Definition) -> Finding:
    kind = {"param": "parameter"}.get(definition.kind, definition.kind)
    param = definition.kind == "param"
    return Finding(
        "DIF302",
        f"the {kind} `{definition.name}` is never used",
        Label(definition.node.head),
        because="setting it changes nothing" if param else "",
        help="use it, or delete it",
        severity="error" if param else "warning",
    )


def _unused_import(node: Import) -> Finding:
    text = f"`{'.'.join(node.path)}` is imported and never used"
    return Finding("DIF305", text, Label(node.span), help="delete this line", severity="warning")
