"""Rules about a run: what the blocks beside the objective may say, and which a command needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from difftrain.language.finding import Finding, Label
from difftrain.language.guidance import own_guidance
from difftrain.language.meaning import lacking
from difftrain.language.names import Definition, Names, is_shipped
from difftrain.language.numbers import value
from difftrain.language.options import Run, decays, schema
from difftrain.language.rules.case import Case, shown
from difftrain.language.scope import lineage
from difftrain.language.spec import Spec, top_line
from difftrain.language.term import Term, is_const, walk
from difftrain.language.tree import Block, Call, Define, Expr, ListOf, Name, Redefine
from difftrain.language.worlds import Problem

STEPS = (1, 2, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
NEEDED = {"train": ("data", "train"), "compile": ("data", "train"), "sample": ("sample",)}
BLOCKS = {
    "data": 'data { source = folder("photos") }',
    "train": "train { steps = 1000 }",
    "sample": "sample { solver = ddim(steps = 30) }",
}


def averaging(spec: Spec, found: list[Finding]) -> None:
    """There is an average of the weights, and every decay is a number in 0..1 at every step."""
    run = spec.runs.get("train")
    if run is None or "ema" not in run.written:
        return
    at, hint = Label(run.written["ema"]), "write `ema = 0.999`"
    if not decays(run):
        text = "there is no average of the weights, which is what samples"
        found.append(Finding("DIF311", text, at, help=hint))
    because = next(filter(None, map(_runs_away, decays(run))), "")
    if because:
        text = "the decay of the averaged weights is not between 0 and 1"
        found.append(Finding("DIF311", text, at, because=because, help=hint))


def copies(case: Case, found: list[Finding]) -> None:
    """Every averaged copy of the network has a decay in 0..1 at every step."""
    if case.term("loss") is None or any(f.code == "DIF130" for f in found):
        return
    for name, decay in case.derivation.averages.items():
        if because := _runs_away(decay):
            text = f"the decay of `{name}` is not between 0 and 1"
            at = Label(case.place(case.newest(name)))
            hint = "write a number such as 0.95, or an expression in `step` that stays below 1"
            found.append(Finding("DIF311", text, at, because=because, help=hint))


def _runs_away(decay: Term | None) -> str:
    """At which step a decay is not between 0 and 1; nothing where it always is, or has no value."""
    if decay is None:
        return ""
    inputs = [t for t in walk(decay) if t.op == "input"]
    for step in STEPS:
        number = value(decay, dict.fromkeys(inputs, step))
        if not 0 <= number <= 1:
            return f"at step {step} it is {shown(number)}"
    return ""


def products(case: Case, found: list[Finding]) -> None:
    """Products in eight bits are of numbers in bf16, and are not differentiated along the path."""
    run, loss = case.spec.runs.get("train"), case.term("loss")
    if run is None or run["products"] != "fp8":
        return
    precision, at = run["precision"], Label(run.written.get("products", run.span))
    if precision not in ("bf16", None):
        text = "`products = fp8` needs `precision = bf16`"
        because = f"`precision` is `{precision}`, and eight bits are made of numbers in bf16"
        hint = "write `precision = bf16`, or leave `products` out"
        found.append(Finding("DIF315", text, at, because=because, help=hint))
    elif loss is not None and any(term.op == "jvp" for term in walk(loss)):
        text = "`products = fp8` cannot be differentiated along the path"
        because = "the loss reads `ddt`, and products in eight bits have no forward-mode derivative"
        found.append(Finding("DIF315", text, at, because=because, help="leave `products` out"))


def guidance(case: Case, found: list[Finding]) -> None:
    """Guided sampling needs a network that knows the empty condition."""
    run = case.spec.runs.get("sample")
    scale = run.values.get("guidance") if run else None
    dropped = case.term("dropped")
    try:
        inside = case.objective.backbone and own_guidance(case.objective)
    except Problem as problem:
        found.append(problem.finding)
        return
    if run:
        found += _ways(case, run, scale, inside)
    if inside or scale in (None, 1) or run["guide"]:
        return
    if dropped is None or not is_const(dropped) or dropped.value:
        return
    trained = case.objective.backbone and case.objective.backbone.part.options.get("weights")
    name = case.objective.name
    strategy = _redefining("dropped", case.spec.names)
    found.append(
        Finding(
            "DIF310",
            f"guidance {shown(scale)} needs a network that has seen rows without a condition",
            Label(run.written["guidance"]),
            because=f"`dropped` is false for every row of `{name}`",
            help=f"add `{strategy}(0.1)` to `strategy`, or leave `guidance` out",
            severity="note" if trained else "error",
        )
    )


WAYS = {"guidance_interval": (), "guidance_rescale": 0, "guide": ""}  # off


def _ways(case: Case, run: Run, scale: float | None, inside: Mapping) -> Iterator[Finding]:
    """How to guide is said where there is guidance, and an interval has two ends."""
    ends = run["guidance_interval"]
    if ends and not _ascending(ends):
        at = run.written["guidance_interval"]
        text = f"`{at.text}` is no interval of noise levels"
        hint = "write `guidance_interval = 0.28..2.9`, the smaller sigma / alpha first"
        yield Finding("DIF314", text, Label(at), help=hint)
    for name, off in WAYS.items():
        if scale is None or run.values.get(name) in (off, None) or not (inside or scale == 1):
            continue
        because = "guidance is 1, which is none"
        if inside:
            because = f"`{case.objective.name}` is given its guidance inside the network"
        text, hint = f"`{name}` changes nothing here", "leave it out"
        hint += "" if inside else ", or set `guidance`"
        at = Label(run.written.get(name, run.span))
        yield Finding("DIF314", text, at, because=because, help=hint, severity="warning")


def _ascending(ends: object) -> bool:
    numbers = isinstance(ends, tuple) and all(isinstance(e, (int, float)) for e in ends)
    return numbers and len(ends) == 2 and 0 <= ends[0] < ends[1]


def solver(case: Case, found: list[Finding]) -> None:
    """A solver finds every quantity that it reads."""
    run = case.spec.runs.get("sample")
    definition = _solver(case.spec) if run else None
    if definition is None or case.term("loss") is None:
        return
    said = {s.name: s.value for d in lineage(definition) for s in d.node.body}
    found += _idle(case, run, said.get("together"))
    for item in said["reads"].items if isinstance(said.get("reads"), ListOf) else ():
        problem = lacking(case.objective, item.dotted)
        if problem or case.term(item.dotted) is None:
            found.append(_no_solver(case, run, definition.name, item.dotted, problem))
            return


def _idle(case: Case, run: Run, together: Expr | None) -> Iterator[Finding]:
    """Options that the call of a solver sets, and that count for nothing where the first of those
    that go `together` is 0."""
    call, part = _called(case.spec), run["solver"]
    if not isinstance(together, ListOf) or not isinstance(call, Call) or part is None:
        return
    switch, *others = (item.dotted for item in together.items)
    for argument in call.args if part.options[switch] == 0 else ():
        if argument.name in others:
            text = f"`{argument.name}` of `{call.dotted}` is set and never read"
            because, hint = f"`{switch}` is 0", f"set `{switch}`, or leave `{argument.name}` out"
            yield Finding("DIF301", text, Label(argument.span), because=because, help=hint)


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


def time_scale(case: Case, found: list[Finding]) -> None:
    """A network that embeds an index is not fed times between 0 and 1 as they are."""
    backbone = case.objective.backbone
    options = backbone.part.options if backbone else {}
    seen = case.times.values
    index = options.get("time_scale") == 1 and options.get("clock", "index") == "index"
    if not index or not seen or max(seen) > 1:
        return
    found.append(
        Finding(
            "DIF313",
            "the network tells an index from its neighbour, and here t stays below 1",
            Label(backbone.uses[0].call.span),
            because=f"t runs from {shown(min(seen))} to {shown(max(seen))}, one step of an index",
            help="add `time_scale = 1000` to its arguments",
            severity="warning",
        )
    )


def _redefining(quantity: str, names: Names) -> str:
    """The library's strategy for redefining a quantity."""
    for definition in names.definitions("strategy"):
        body = definition.node.body
        if is_shipped(definition.node.span) and any(
            isinstance(s, Redefine) and s.name == quantity for s in body
        ):
            return definition.name
    return f"{quantity}'"


def need(spec: Spec, command: str) -> list[Finding]:
    """The blocks that a command reads and the file lacks."""
    return [
        Finding(
            "DIF320",
            f"`difftrain {command}` needs a `{kind}` block, and this file has none",
            Label(top_line(spec.tree)),
            help=f"add `{BLOCKS[kind]}`",
        )
        for kind in NEEDED.get(command, ())
        if kind not in spec.runs
    ]
