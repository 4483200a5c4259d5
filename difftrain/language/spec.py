"""The typed spec: objectives with their equations and parts, and the options of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from difftrain.language.adopt import adopted
from difftrain.language.derive import Derivation
from difftrain.language.finding import Finding, Fix, Label, SpecError
from difftrain.language.laws import on_time
from difftrain.language.layers import add_statements, add_use
from difftrain.language.names import RUN_KINDS, SLOTS, Names, collect, is_library, standard
from difftrain.language.nearest import nearest
from difftrain.language.options import Run, read_run, read_targets, second_run
from difftrain.language.part import Interface, Part
from difftrain.language.scope import (
    GIVEN,
    OPEN,
    Equations,
    Scope,
    Use,
    is_function,
)
from difftrain.language.settings import apply_settings
from difftrain.language.syntax import parse
from difftrain.language.term import Term
from difftrain.language.tree import (
    Block,
    Define,
    Draw,
    Expr,
    ListOf,
    Name,
    Redefine,
    Source,
    Span,
    Tree,
)
from difftrain.language.uses import use_of
from difftrain.language.values import read_part
from difftrain.language.worlds import Problem


@dataclass(frozen=True, eq=False)
class Backbone:
    """The network of an objective: which module, what it reads besides xt, where it was written."""

    part: Part
    interface: Interface
    uses: tuple[Use, ...]


@dataclass(eq=False)
class Objective:
    """One objective: its equations, and the parts that it trains."""

    name: str
    block: Block
    names: Names
    equations: Equations
    slots: Mapping[str, tuple[Use, ...]]
    backbone: Backbone | None
    teacher: Objective | None = None  # what the frozen net was trained on, where it is said
    vision: Part | None = None  # the frozen encoder of pictures

    def derivation(self, given=(), net: str = "student") -> Derivation:
        """A fresh derivation; `given` names are inputs, `net` is what is trained."""
        interface = self.backbone.interface if self.backbone else Interface()
        teacher = self.teacher.derivation(net="teacher") if self.teacher else None
        return Derivation(self.equations, frozenset(given), interface, teacher, net)

    def quantity(self, name: str) -> Term:
        """The term of a quantity, after all redefinitions. Raises SpecError."""
        try:
            return self.derivation().read(name)
        except Problem as problem:
            raise SpecError([problem.finding]) from None


@dataclass(eq=False)
class Spec:
    """A whole file, checked."""

    path: str
    tree: Tree
    names: Names
    objectives: Mapping[str, Objective]
    runs: Mapping[str, Run]
    settings: Mapping[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    def objective(self, name: str | None = None) -> Objective:
        """The objective of that name, or the only one. Raises SpecError."""
        taught = [o.teacher.name for o in self.objectives.values() if o.teacher]
        trained = [o for o in self.objectives.values() if o.name not in taught]
        if name is None and len(trained) == 1:
            return trained[0]
        if name in self.objectives:
            return self.objectives[name]
        listed = ", ".join(f"`{n}`" for n in self.objectives)
        hint = f"name one of {listed}" if listed else "write `objective name { … }`"
        start = Label(top_line(self.tree))
        if name is None:
            text = f"this file has {len(self.objectives)} objectives, and one is needed"
        else:
            text = f"there is no objective `{name}`"
        raise SpecError([Finding("DIF105", text, start, help=hint)])

    @cached_property
    def text(self) -> str:
        return self.tree.source.text


def top_line(tree: Tree):
    line_end = len(tree.source.line(1)) if tree.source.text else 0
    return Span(tree.source, 0, line_end)


def build(tree: Tree, names: Names, found: list[Finding]) -> Spec:
    """The typed spec of a tree; what is wrong is appended to `found`."""
    objectives = {}
    runs = {}
    for node in tree.body:
        if not isinstance(node, Block):
            continue
        if node.kind == "objective":
            objectives[node.name or ""] = build_objective(node, names, found)
        elif node.kind == "export":
            read_targets(node, names, runs, found)
        elif node.kind in runs:
            found.append(second_run(node, runs[node.kind]))
        elif node.kind in RUN_KINDS:
            runs[node.kind] = read_run(node, names, found)
    return Spec(tree.source.path, tree, names, objectives, runs)


def build_objective(block: Block, names: Names, found: list[Finding]) -> Objective:
    """An objective: the prelude, its process and prediction, its own statements, its strategies."""
    equations = Equations()
    scope = Scope("", names)
    equations.scopes[""] = scope
    prelude = next(n.own["prelude", ""] for n in standard() if ("prelude", "") in n.own)
    base = [s for s in prelude.node.body if isinstance(s, (Define, Draw))]
    equations.quantities = {s.name for s in base} | {*GIVEN, *OPEN}
    add_statements(equations, base, Scope("", prelude.home), found, "base")
    slots, body = _split(block, names, found)
    uses = {
        slot: _uses(slots[slot], kind, scope, found)
        for slot, kind in SLOTS.items()
        if slot in slots
    }
    for use in (*uses.get("process", ()), *uses.get("prediction_type", ())):
        add_use(equations, use, found, "base")
    add_statements(equations, on_time(body, equations, found), scope, found, "base")
    for use in uses.get("strategy", ()):
        add_use(equations, use, found, "strategy")
    for slot in ("process", "prediction_type", "backbone"):
        if slot not in slots:
            found.append(_no_slot(block, slot))
    backbone = vision = teacher = None
    if "backbone" in slots:
        backbone = _backbone(slots["backbone"].value, equations, scope, found)
    if "vision" in slots:
        vision = _vision(slots["vision"].value, equations, scope, found)
    if "teacher" in slots:
        teacher = _teacher(slots["teacher"].value, block, scope, found)
    return Objective(block.name or "", block, names, equations, uses, backbone, teacher, vision)


def _split(block: Block, names: Names, found: list[Finding]) -> tuple[dict[str, Define], list]:
    """The slots of an objective, and its other statements."""
    known = {*KINDS, *FURTHER}
    slots = {s.name: s for s in block.body if isinstance(s, Define) and s.name in known}
    body = [s for s in block.body if not (isinstance(s, Define) and s.name in known)]
    body = [s for s in body if not is_function(s)]
    for slot, kind in KINDS.items():
        if slot not in slots and (meant := _meant(slot, kind, body, names)):
            body.remove(meant)
            slots[slot] = meant
            found.append(_no_such_slot(meant, slot, kind))
    return slots, body


def _meant(slot: str, kind: str, body: list, names: Names) -> Define | None:
    """The statement that was meant to fill a slot: a name like it, or a value of its kind."""
    for node in body:
        if isinstance(node, Define):
            path = getattr(node.value, "path", None)
            of_kind = path and kind != "strategy" and names.find(kind, path)
            if nearest(node.name, [slot], MEANT) or of_kind:
                return node
    return None


KINDS = {**SLOTS, "backbone": "backbone"}
FURTHER = ("teacher", "vision")  # slots that an objective may leave out
MEANT = {"prediction": "prediction_type", "strategies": "strategy", "network": "backbone"}
MEANT |= {"model": "backbone", "schedule": "process", "scheduler": "process"}


def _no_such_slot(node: Define, slot: str, kind: str) -> Finding:
    text = f"an objective has no `{node.name}`"
    if not nearest(node.name, [slot], MEANT):
        text = f"`{node.name}` is not where a {kind} goes"
    return Finding(
        "DIF108", text, Label(node.head), help=f"write `{slot}`", fix=Fix(node.head, slot)
    )


EXAMPLES = {"process": "linear", "prediction_type": "flow", "backbone": "custom"}


def _no_slot(block: Block, slot: str) -> Finding:
    title = f"objective `{block.name}`" if block.name else "this objective"
    return Finding(
        "DIF110",
        f"{title} does not say its `{slot}`",
        Label(block.head),
        help=f"add `{slot} = {EXAMPLES[slot]}`, or what you want there",
    )


def _uses(slot: Define, kind: str, scope: Scope, found: list[Finding]) -> tuple[Use, ...]:
    """The blocks that a slot puts to use, left to right."""
    items = slot.value.items if isinstance(slot.value, ListOf) else (slot.value,)
    if kind != "strategy" and len(items) != 1:
        text = f"`{slot.name}` takes one {kind}, not a list"
        found.append(Finding("DIF116", text, Label(slot.value.span), help="keep one of them"))
        items = items[:1]
    uses: dict[str, Use] = {}
    for item in items:
        use = adopted(use_of(item, kind, scope, found), found)
        if use is None:
            continue
        if use.label in uses:
            again = Label(uses[use.label].call.span, "here already")
            text = f"`{use.definition.name}` is listed twice"
            found.append(Finding("DIF117", text, Label(item.span), (again,), help="list it once"))
            continue
        uses[use.label] = use
    return tuple(uses.values())


# ---- backbone


def _backbone(value: Expr, equations: Equations, scope: Scope, found) -> Backbone | None:
    use = use_of(value, "backbone", scope, found)
    if use is None:
        return None
    uses: list[Use] = []
    part = read_part(use, equations, found, uses)
    options = dict(part.options)
    times, inputs = (_quantities(use, options.get(n), found) for n in ("times", "inputs"))
    interface = Interface(times or ("t",), inputs, bool(options.get("dropout")))
    options |= {"times": interface.times, "inputs": interface.inputs}
    return Backbone(Part(part.kind, part.module, options), interface, tuple(uses))


def _vision(value: Expr, equations: Equations, scope: Scope, found) -> Part | None:
    use = use_of(value, "encoder", scope, found)
    return use and read_part(use, equations, found, [])


def _teacher(value: Expr, block: Block, scope: Scope, found) -> Objective | None:
    """The objective that the teacher was trained on."""
    path = getattr(value, "path", ())
    definition = scope.home.find("objective", path) if isinstance(value, Name) else None
    if definition is None or definition.node is block:
        known = [n for n in scope.home.known("objective") if n != block.name]
        close = nearest(value.span.text, known)
        text = f"there is no other objective `{value.span.text}` for a teacher"
        hint = f"write `teacher = {close or (known or ['name'])[0]}`"
        hint += "" if known else ", the objective that it was trained on, and declare that here"
        found.append(Finding("DIF160", text, Label(value.span), help=hint))
        return None
    inner: list[Finding] = []
    teacher = build_objective(definition.node, definition.home, inner)
    if inner and definition.home is not scope.home:
        text = f"the objective `{value.span.text}` has errors of its own"
        hint = f"lint `{Path(definition.home.path).name}` first"
        found.append(Finding("DIF160", text, Label(value.span), help=hint))
    return teacher


def _quantities(use: Use, value, found: list[Finding]) -> tuple[str, ...]:
    """The names of quantities in an option that lists them."""
    items = value if isinstance(value, tuple) else () if value is None else (value,)
    for item in items:
        if item is not None and not isinstance(item, str):
            text = f"`{item}` is not a quantity that a network could be given"
            found.append(Finding("DIF213", text, Label(use.call.span), help="name a quantity"))
    return tuple(i for i in items if isinstance(i, str))


# ---- reading a file


def read_source(source: Source, found: list[Finding], settings: Mapping | None = None) -> Spec:
    """The typed spec of a source text, with settings (`--set`) applied first."""
    tree = parse(source, found)
    if settings:
        tree = apply_settings(tree, settings, found)
    names = collect(tree, found, shipped=is_library(source.path))
    spec = build(tree, names, found)
    spec.settings = {k: str(v) for k, v in (settings or {}).items()}
    return spec


def read_text(path: str | Path) -> Source:
    """The source of a file; bytes that are not text become what the parser calls a binary file."""
    data = Path(path).read_bytes()
    return Source(str(path), data.decode("utf-8", errors="replace").replace("\r\n", "\n"))


__all__ = ["Backbone", "Objective", "Redefine", "Spec", "build", "read_source"]
