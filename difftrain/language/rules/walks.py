"""Rules about a solver: what it reads, and options that fit each other and the process."""

from __future__ import annotations

import math
from collections.abc import Iterator

from difftrain.language.domains import is_number
from difftrain.language.finding import Finding, Label
from difftrain.language.forms import clock
from difftrain.language.horizon import horizon
from difftrain.language.meaning import lacking
from difftrain.language.names import Definition, is_shipped
from difftrain.language.nearest import nearest
from difftrain.language.options import Run, schema
from difftrain.language.part import Part
from difftrain.language.rules.case import TIME, Case, shown
from difftrain.language.rules.run import ascending
from difftrain.language.scope import WHOLE, formals, lineage, named
from difftrain.language.spacing import DEFAULTS, Law, Misfit, above, check, chosen
from difftrain.language.spec import Spec
from difftrain.language.tree import Block, Call, Define, Expr, ListOf, Name, Span
from difftrain.language.uses import PART_KINDS, listed, not_a
from difftrain.language.worlds import HERE, Problem

SPOKEN = ("DIF205", "DIF206", "DIF312")  # of a process that is not the one which is meant
NEEDED = ("steps", *DEFAULTS)  # what every solver of the library has
Ends = tuple[float, float]  # of sigma / alpha


def solver(case: Case, found: list[Finding]) -> None:
    """A solver finds every quantity that it reads."""
    run = case.spec.runs.get("sample")
    definition = _solver(case.spec) if run else None
    if definition is None or case.term("loss") is None:
        return
    said = _said(definition)
    found += _idle(case, run, said.get("together"))
    found += _alone(case, run, said.get("between"))
    for name in named(said.get("reads")):
        problem = lacking(case.objective, name)
        if problem or case.term(name) is None:
            found.append(_no_solver(case, run, definition.name, name, problem))
            return


def _idle(case: Case, run: Run, together: Expr | None) -> Iterator[Finding]:
    """Options that the call of a solver sets, and that count for nothing where the first of those
    that go `together` is 0."""
    call, part = _called(case.spec), run["solver"]
    names = named(together)
    if not names or not isinstance(call, Call) or part is None:
        return
    switch, *others = names
    for argument in call.args if part.options.get(switch) == 0 else ():
        if argument.name in others:
            text = f"`{argument.name}` of `{call.dotted}` is set and never read"
            because, hint = f"`{switch}` is 0", f"set `{switch}`, or leave `{argument.name}` out"
            yield Finding("DIF301", text, Label(argument.span), because=because, help=hint)


def _alone(case: Case, run: Run, between: Expr | None) -> Iterator[Finding]:
    """Options that the call of a solver sets, and that count `between` steps, where there is one
    step: only a warning, as the number of steps is what changes most often."""
    call, part = _called(case.spec), run["solver"]
    options = part.options if part is not None and isinstance(call, Call) else {}
    if options.get("steps") != 1 or options.get("times"):
        return
    for argument in call.args:
        name = argument.name
        if name in named(between) and options.get(name) != 0:
            text = f"`{name}` of `{call.dotted}` is set and never read"
            because = "it counts between two steps, and there is one step"
            hint = f"leave `{name}` out, or take more steps"
            at = Label(argument.span)
            yield Finding("DIF301", text, at, (), because, hint, severity="warning")


def _solver(spec: Spec) -> Definition | None:
    """The solver that samples, by the block of the file or the library's default."""
    value = _called(spec)
    return spec.names.find("solver", value.path) if isinstance(value, (Name, Call)) else None


def _called(spec: Spec) -> Expr:
    """What stands for the solver, in the file or by default."""
    blocks = [n for n in spec.tree.body if isinstance(n, Block) and n.kind == "sample"]
    named = [
        s.value for b in blocks for s in b.body if isinstance(s, Define) and s.name == "solver"
    ]
    return named[-1] if named else schema("sample")["solver"][0].default


def _no_solver(case: Case, run, name: str, quantity: str, problem: Finding | None) -> Finding:
    process = case.slot("process")
    if problem:
        because = f"it reads `{quantity}`, and {problem.because or problem.message}"
        hint = problem.help or "choose a solver that does not, such as `multistep`"
        at = Label(run.written.get("solver", run.span))
        title = case.objective.name
        return Finding("DIF216", f"`{name}` cannot sample `{title}`", at, (), because, hint)
    title = process.definition.name if process else "the process"
    at = run.written.get("solver", run.span)
    return Finding(
        "DIF312",
        f"`{name}` cannot sample `{title}`",
        Label(at),
        (Label(process.call.span, "the process"),) if process else (),
        because=f"it reads `{quantity}`, which has no value here",
        help="choose another solver, such as `ddim`",
    )


# ---- options that fit each other and the process


def options(case: Case, found: list[Finding]) -> None:
    """The times of a solver are those of the process, and what it does to some levels of noise it
    does to some that it meets."""
    run = case.spec.runs.get("sample")
    part, definition = run and run["solver"], _solver(case.spec)
    if part is None or definition is None or case.term("loss") is None:
        return
    if any(f.code in SPOKEN for f in found) or None in part.options.values():
        return
    law, before = _law(case), len(found)
    found += _laid_out(case, run, definition, law) if law else ()
    walked = _walked(case, law, part) if law and len(found) == before else None
    if walked and walked[0] > walked[1]:
        found.append(_nowhere(case, run))
    elif walked:
        found += _begins(case, run, walked)
        found += _levels(case, run, definition, walked)
        found += _interval(run, walked) if all(f.code != "DIF314" for f in found) else ()


def _law(case: Case) -> Law | None:
    try:
        law = horizon(case.objective)
    except Problem:
        return None  # said elsewhere
    return None if any(math.isnan(end) for end in law[1:]) else law


def _laid_out(case: Case, run: Run, definition: Definition, law: Law) -> Iterator[Finding]:
    """Options of which no times can be made on a process with this law."""
    part, name = run["solver"], definition.name
    if lost := next((n for n in NEEDED if n not in part.options), None):
        text = f"`{name}` has no `{lost}`, which lays out its times"
        hint = f"write `solver {name} from euler {{ … }}`"
        yield Finding("DIF316", text, Label(_place(case, run)), help=hint)
        return
    try:
        check(law, part.options)
    except Misfit as told:
        yield _misfit(case, run, told)


def _nowhere(case: Case, run: Run) -> Finding:
    names = ("low", "high")
    ends = " and ".join(f"`{n} = {shown(run['solver'].options[n])}`" for n in names)
    text = f"this process has no sigma / alpha between {ends}"
    hint = "choose levels that it has, or leave them out"
    return Finding("DIF316", text, Label(_place(case, run, *names)), help=hint)


def _begins(case: Case, run: Run, walked: Ends) -> Iterator[Finding]:
    """Times of which the first is noisier than the level that sampling begins at."""
    times = run["solver"].options.get("times")
    first = _ratio(case, times[0]) if times else None
    if first is not None and first >= walked[1]:
        where = f"where sigma / alpha is below {shown(walked[1])}"
        yield _misfit(case, run, above(times, where))


def _misfit(case: Case, run: Run, told: Misfit) -> Finding:
    at = Label(_place(case, run, told.option))
    return Finding("DIF316", told.message, at, help=told.hint)


def _levels(case: Case, run: Run, definition: Definition, walked: Ends) -> Iterator[Finding]:
    """A range of sigma / alpha, in which a solver does something, with no step in it."""
    said, options = _said(definition), run["solver"].options
    names = [name for name in named(said.get("levels")) if is_number(options.get(name))]
    off = any(options.get(name) == 0 for name in named(said.get("together"))[:1])
    if off or len(names) != 2:
        return
    low, high = (options[name] for name in names)
    at = Label(_place(case, run, *names))
    pair = " and ".join(f"`{name} = {shown(options[name])}`" for name in names)
    if low >= high:
        text, hint = f"{pair} leave nothing between them", "write the smaller one first"
        yield Finding("DIF316", text, at, help=f"{hint}: both are sigma / alpha")
    elif not _meets((low, high), walked):
        text = f"no step lies between {pair}"
        yield Finding("DIF316", text, at, because=_reaches(walked), help=WITHIN)


def _interval(run: Run, walked: Ends) -> Iterator[Finding]:
    """Guidance that is on where no step lies."""
    ends = run.values.get("guidance_interval")
    if ends and ascending(ends) and not _meets(ends, walked):
        at, text = run.written["guidance_interval"], "there is no guidance at any step"
        because = f"{_reaches(walked)}, and it is on in {shown(ends[0])}..{shown(ends[1])}"
        yield Finding("DIF314", text, Label(at), (), because, WITHIN, severity="warning")


WITHIN = "choose a range of levels that are walked"


def _meets(ends: Ends, walked: Ends) -> bool:
    return ends[0] < walked[1] and ends[1] > walked[0]


def _reaches(walked: Ends) -> str:
    return f"sigma / alpha runs from {shown(walked[1])} down to {shown(walked[0])} here"


def _walked(case: Case, law: Law, part: Part) -> Ends | None:
    """The least and the largest sigma / alpha on the grid of a solver, as far as it can be told."""
    (kind, low, high), word = law, chosen(law, part.options)
    options = {**DEFAULTS, **part.options}
    named = (options["low"] if word == "power" else 0.0, options["high"])
    if kind == "open":
        return named
    least, most = (_ratio(case, t) for t in (low, high - 1 if kind == "index" else high))
    if least is None or most is None:
        return None
    return (max(least, named[0]), min(most, named[1])) if word == "power" else (least, most)


def _ratio(case: Case, t: float) -> float | None:
    """sigma / alpha at a time, where both have a value there."""
    world = HERE.swap({clock(case.objective.equations): TIME})
    terms = [case.term(name, world) for name in ("alpha", "sigma")]
    if None in terms:
        return None
    ((alpha, sigma),) = case.along(*terms, at=(t,))
    if alpha != alpha or sigma != sigma:
        return None
    return sigma / alpha if alpha else math.inf


def _place(case: Case, run: Run, *names: str) -> Span:
    """Where the call of the solver sets one of these options, or a block of the user's own does by
    default; else all of the call."""
    call, known = _called(case.spec), formals(_solver(case.spec))
    order = iter(known)
    args = call.args if isinstance(call, Call) else ()
    given = [a.span for a in args if (a.name or next(order, None)) in names]
    own = [known[n][0].span for n in names if n in known and not is_shipped(known[n][0].span)]
    return next(iter([*given, *own]), run.written.get("solver", run.span))


def _said(definition: Definition) -> dict[str, Expr]:
    """What a solver and those that it is made from say, by name."""
    body = [s for d in lineage(definition) for s in d.node.body if isinstance(s, Define)]
    return {s.name: s.value for s in body}


# ---- blocks of a user's own

OPTIONS = ("together", "between", "levels", WHOLE)  # lists of options; `reads` lists quantities
LISTS = {"solver": ("reads", *OPTIONS), "objective": ()}  # of any other block: WHOLE


def blocks(spec: Spec, found: list[Finding]) -> None:
    """What a block lists are names: of options that it has, or of quantities that a solver reads.
    Levels have two ends."""
    for definition in spec.names.own.values():
        lists = LISTS.get(definition.kind, (WHOLE,))
        for node in getattr(definition.node, "body", ()):
            if isinstance(node, Define) and node.name in lists:
                found += _no_names(definition, node)
                found += _no_ends(node) if node.name == "levels" else ()


def _no_ends(node: Define) -> Iterator[Finding]:
    listed = node.value.items if isinstance(node.value, ListOf) else ()
    if len(listed) not in (0, 2):  # none: those of the base do not count here
        text = "`levels` lists the two ends of a range"
        hint = "write `levels = [low, high]`, both names of options"
        because = f"this lists {len(listed)}"
        yield Finding("DIF118", text, Label(node.value.span), (), because, hint)


def _no_names(definition: Definition, node: Define) -> Iterator[Finding]:
    kind = "option" if node.name in OPTIONS else "quantity"
    known = list(formals(definition))
    if not isinstance(node.value, ListOf):
        text = node.value.span.text
        if definition.kind not in PART_KINDS and text not in known:
            yield _quantity(node)
        else:
            yield not_a("list", node.value, f"write `{node.name} = [{text}]`")
        return
    for item in node.value.items:
        if not isinstance(item, Name):
            yield not_a(kind, item, f"write the name of one: `{node.name}` lists names")
        elif kind == "option" and item.dotted not in known:
            close = nearest(item.dotted, known)
            hint = f"write `{close}`" if close else listed(known)
            yield not_a(f"option of `{definition.name}`", item, hint)


def _quantity(node: Define) -> Finding:
    """A quantity that is called like the list of what counts."""
    text = f"`{node.name}` lists options that count, and `{node.value.span.text}` is no list"
    return Finding("DIF118", text, Label(node.head), help="give the quantity another name")
