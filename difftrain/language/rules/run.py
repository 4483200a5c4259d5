"""Rules about a run: what the blocks beside the objective may say, and which a command needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from difftrain.language.domains import is_number
from difftrain.language.finding import Finding, Label
from difftrain.language.guidance import own_guidance
from difftrain.language.names import Names, is_shipped
from difftrain.language.numbers import value
from difftrain.language.options import Run, decays
from difftrain.language.part import Part
from difftrain.language.rules.case import Case, shown
from difftrain.language.spec import Spec, top_line
from difftrain.language.term import Term, is_const, walk
from difftrain.language.tree import Redefine
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
    if inside or scale in (None, 1) or run["guide"] != "":
        return
    if blind := _unconditional(case):
        found.append(_nothing_to_guide(run, scale, blind))
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


def _unconditional(case: Case) -> str:
    """The name of the network where it reads no condition; nothing where it may read one."""
    backbone = case.objective.backbone
    text = backbone and backbone.part.options.get("text")
    own = backbone and backbone.part.module != "custom"  # whose caller brings conditions
    blind = own and not isinstance(text, Part) and not (isinstance(text, tuple) and text)
    return backbone.uses[0].definition.name if blind else ""


def _nothing_to_guide(run: Run, scale: float, network: str) -> Finding:
    return Finding(
        "DIF310",
        f"guidance {shown(scale)} needs a network that reads a condition",
        Label(run.written["guidance"]),
        because=f"`{network}` has no `text`, so there is nothing to guide towards",
        help=f"give `{network}` a `text` encoder, set `guide` to a weaker run, or leave `guidance`"
        " out",
    )


WAYS = {"guidance_interval": (), "guidance_rescale": 0, "guide": ""}  # off


def _ways(case: Case, run: Run, scale: float | None, inside: Mapping) -> Iterator[Finding]:
    """How to guide is said where there is guidance, and an interval has two ends."""
    ends, lost = run["guidance_interval"], None
    if ends not in ((), None) and not ascending(ends):
        lost = "guidance_interval"
        at = run.written["guidance_interval"]
        text = f"`{at.text}` is no interval of noise levels"
        hint = "write `guidance_interval = 0.28..2.9`, the smaller sigma / alpha first"
        yield Finding("DIF314", text, Label(at), help=hint)
    for name, off in WAYS.items():
        idle = scale is not None and (inside or scale == 1) and name != lost
        if not idle or run.values.get(name) in (off, None):
            continue
        because = "guidance is 1, which is none"
        if inside:
            because = f"`{case.objective.name}` is given its guidance inside the network"
        text, hint = f"`{name}` changes nothing here", "leave it out"
        hint += "" if inside else ", or set `guidance`"
        at = Label(run.written.get(name, run.span))
        yield Finding("DIF314", text, at, because=because, help=hint, severity="warning")


def ascending(ends: object) -> bool:
    """Whether the ends of an interval of noise levels are two numbers in order."""
    numbers = isinstance(ends, tuple) and all(map(is_number, ends))
    return numbers and len(ends) == 2 and 0 <= ends[0] < ends[1]


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
