"""The options of a run: what `data`, `train`, `sample` and the targets of `export` may say
(`specs/std/run.diff`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from difftrain.language.derive import Derivation
from difftrain.language.finding import Finding, Fix, Label
from difftrain.language.names import TARGETS, Names, standard
from difftrain.language.nearest import nearest
from difftrain.language.scope import Equations, Scope, formals
from difftrain.language.term import Term
from difftrain.language.tree import Block, Define, Expr, Formal, ListOf, Name, Quantity, Span, Text
from difftrain.language.values import read_option
from difftrain.language.worlds import HERE, Frame, Problem

FUNCTIONS_OF_STEP = ("ema",)  # options that are an expression in `step`, or a list of them
LISTS_OF_TEXTS = ("prompts",)
MULTIPLIERS = ("k", "M", "G")


@dataclass(frozen=True, eq=False)
class Run:
    """One block of options: every option has a value; `written` holds where the spec says so."""

    kind: str
    values: Mapping[str, object]
    written: Mapping[str, Span]
    span: Span | None = None

    def __getitem__(self, name: str):
        return self.values[name]


def decays(train: Run) -> tuple[Term, ...]:
    """How much of each average of the weights stays at an update, in `step`; what samples is the
    first."""
    value = train["ema"]
    return value if isinstance(value, tuple) else (value,)


def schema(kind: str) -> dict[str, tuple[Formal, Names]]:
    """The options of a block, from the library."""
    for names in standard():
        if block := names.own.get(("options", kind)):
            return {name: (formal, names) for name, (formal, _) in formals(block).items()}
    return {}


def defaults(kind: str) -> Run:
    """The block as if it were written empty."""
    found: list[Finding] = []
    scope = {n: Scope("", home) for n, (_, home) in schema(kind).items()}
    values = {n: _read(n, f.default, scope[n], f, found) for n, (f, _) in schema(kind).items()}
    return Run(kind, values, {})


def read_run(block: Block, names: Names, found: list[Finding]) -> Run:
    """The options of a block, with defaults for those it leaves out."""
    options = schema(block.kind)
    if not options:
        found.append(_not_read(block))
        return Run(block.kind, {}, {}, block.head)
    values = dict(defaults(block.kind).values)
    written: dict[str, Span] = {}
    for node in block.body:
        if not isinstance(node, Define) or node.formals is not None:
            found.append(_no_option(node, block.kind))
        elif node.name not in options:
            found.append(_unknown(node, block.kind, list(options)))
        elif node.name in written:
            first = Label(written[node.name], "here already")
            text = f"`{node.name}` is set twice"
            found.append(Finding("DIF142", text, Label(node.head), (first,), help="set it once"))
        else:
            formal = options[node.name][0]
            written[node.name] = node.span
            values[node.name] = _read(node.name, node.value, Scope("", names), formal, found)
    return Run(block.kind, values, written, block.head)


def read_targets(block: Block, names: Names, runs: dict[str, Run], found: list[Finding]) -> None:
    """Adds the options of every target in an `export` block to `runs`."""
    for node in block.body:
        if not isinstance(node, Block):
            found.append(_no_target(node))
        elif node.kind not in TARGETS:
            found.append(_not_read(node))
        elif node.kind in runs:
            found.append(second_run(node, runs[node.kind]))
        else:
            runs[node.kind] = read_run(node, names, found)


def second_run(block: Block, first: Run) -> Finding:
    return Finding(
        "DIF145",
        f"there are two `{block.kind}` blocks",
        Label(block.head),
        (Label(first.span, "the first one"),),
        because="it would not be clear which of the two counts",
        help="write all options into one of them",
    )


def _read(name: str, expr: Expr, scope: Scope, formal: Formal, found: list[Finding]):
    _check_unit(expr, formal, found)
    if name in FUNCTIONS_OF_STEP and isinstance(expr, ListOf):
        return tuple(_function_of_step(item, scope, found) for item in expr.items)
    if name in FUNCTIONS_OF_STEP:
        return _function_of_step(expr, scope, found)
    if (name in LISTS_OF_TEXTS and not _texts(expr)) or _no_text(expr, formal):
        found.append(_not_text(expr, formal))
        return None
    return read_option(formal, expr, scope, Equations(), found)


def _texts(expr: Expr) -> bool:
    """Whether an expression is a list of texts, or of names of some."""
    return isinstance(expr, ListOf) and all(isinstance(i, (Text, Name)) for i in expr.items)


def _no_text(expr: Expr, formal: Formal) -> bool:
    return isinstance(formal.default, Text) and not isinstance(expr, (Text, Name))


def _not_text(expr: Expr, formal: Formal) -> Finding:
    items = expr.items if isinstance(expr, ListOf) else (expr,)
    texts = ['"' + item.span.text.strip('"') + '"' for item in items]
    form, what = next(iter(texts), '""'), "a text"
    if formal.name in LISTS_OF_TEXTS:
        form, what = f"[{', '.join(texts)}]", "a list of texts"
    text = f"`{formal.name}` is {what}, and `{expr.span.text}` is none"
    return Finding("DIF124", text, Label(expr.span), help=f"write `{formal.name} = {form}`")


def _function_of_step(expr: Expr, scope: Scope, found: list[Finding]):
    try:
        return Derivation(Equations()).number(expr, Frame(scope, {}, HERE))
    except Problem as problem:
        found.append(problem.finding)
        return None


def _check_unit(expr: Expr, formal: Formal, found: list[Finding]) -> None:
    if not isinstance(expr, Quantity) or expr.unit in MULTIPLIERS:
        return
    wanted = formal.default.unit if isinstance(formal.default, Quantity) else None
    if expr.unit != wanted:
        hint = (
            f"write it in `{wanted}`"
            if wanted not in (None, *MULTIPLIERS)
            else "leave out the unit"
        )
        text = f"`{formal.name}` is not counted in `{expr.unit}`"
        found.append(Finding("DIF143", text, Label(expr.span), help=hint))


def _unknown(node: Define, kind: str, known: list[str]) -> Finding:
    close = nearest(node.name, known)
    other = next((k for k in ("data", "train", "sample") if node.name in schema(k)), None)
    listed = "it has " + ", ".join(f"`{n}`" for n in known)
    hint = f"write `{close}`" if close else f"it belongs in `{other}`" if other else listed
    fix = Fix(node.head, close) if close else None
    text = f"`{kind}` has no option `{node.name}`"
    return Finding("DIF140", text, Label(node.head), help=hint, fix=fix)


def _no_option(node, kind: str) -> Finding:
    text = f"`{kind}` holds options, and this is none"
    return Finding("DIF141", text, Label(node.span), help="write `option = value`")


def _no_target(node) -> Finding:
    listed = ", ".join(f"`{name}`" for name in TARGETS)
    text = "`export` holds targets, and this is none"
    hint = f"write one of {listed} and its options in braces"
    return Finding("DIF141", text, Label(node.span), help=hint)


def _not_read(block: Block) -> Finding:
    return Finding(
        "DIF144",
        f"nothing reads `{block.kind}` blocks",
        Label(block.head),
        because="an option that reaches nothing is a mistake that says nothing",
        help="leave the block out",
    )
