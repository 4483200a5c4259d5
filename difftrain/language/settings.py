"""Settings: values put into a tree from outside, as `--set gamma=3` does.

A setting names one place by the words that the spec itself uses:

    gamma                    a `param`
    train.steps              an option of a run; block and option are added where they are missing
    train.optimizer.lr       an argument of what an option holds, as deep as it goes
    process                  a slot of the objective
    process.steps            an argument of what a slot holds
    blur.p                   an argument of a strategy in the list
    align                    an equation or a draw of the objective
    sd15.process.steps       the same, where a file has several objectives

The value is written as in a `.diff` file; where the place holds a text, quotes may be left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from difftrain.language.finding import Finding, Label
from difftrain.language.names import SLOTS, TARGETS, Definition, Names, collect
from difftrain.language.nearest import nearest
from difftrain.language.options import schema
from difftrain.language.part import quoted, written
from difftrain.language.scope import formals
from difftrain.language.syntax import parse
from difftrain.language.tree import (
    Argument,
    Block,
    Call,
    Define,
    Draw,
    Expr,
    ListOf,
    Name,
    Param,
    Source,
    Span,
    Text,
    Tree,
)

RUNS = ("data", "train", "sample")
PARTS = ("process", "prediction", "strategy", "backbone", "encoder", "codec")
PARTS += ("source", "optimizer", "solver")


def apply_settings(tree: Tree, settings: Mapping[str, object], found: list[Finding]) -> Tree:
    """The tree with every setting put in its place; what is wrong is appended to `found`.

    A value is a number, a truth value, a list, or text as it would stand in the file.
    """
    for path, value in settings.items():
        places = _Places(tree, collect(tree, []))
        place = places.find(path)
        if place is None:
            found.append(_unknown(path, value, places))
        elif (expr := _parsed(path, value, place.old, found)) is not None:
            tree = place.put(expr)
    return tree


# ---- values


def _parsed(path: str, value: object, old: Expr | None, found: list[Finding]) -> Expr | None:
    """The expression of a value, its places in a source named after the setting."""
    source = _source(path.rpartition(".")[2], path, _written(value, isinstance(old, Text)))
    before = len(found)
    body = parse(source, found).body
    if len(found) > before:
        return None
    if len(body) == 1 and isinstance(body[0], Define):
        return body[0].value
    text = f"`--set {path}` takes one value"
    whole = Span(source, 0, len(source.text))
    found.append(Finding("DIF151", text, Label(whole), help=f"write `--set {path}=VALUE`"))
    return None


def _source(name: str, path: str, text: str) -> Source:
    return Source(f"--set {path}", f"{name} = {text}")


def _written(value: object, text: bool = False) -> str:
    """A value as it would stand in a file."""
    match value:
        case list() | tuple():
            return f"[{', '.join(_written(v, isinstance(v, str)) for v in value)}]"
        case str() if text and not value.lstrip().startswith('"'):
            return quoted(value)
    return written(value)


# ---- places


@dataclass(frozen=True)
class Place:
    """Where a value goes: what is there now, and the tree with something else there."""

    old: Expr | None
    put: Callable[[Expr], Tree]


@dataclass(frozen=True)
class _Places:
    tree: Tree
    names: Names

    def find(self, path: str) -> Place | None:
        """The place that a path names, or None."""
        first, *rest = path.split(".")
        for node in self.tree.body:
            if isinstance(node, Param) and node.name == first and not rest:
                return Place(node.default, lambda e, n=node: self._with(n, replace(n, default=e)))
        if first in RUNS and rest and rest[0] in schema(first):
            return self._option(first, rest[0], rest[1:])
        if first == "export" and len(rest) > 1 and rest[1] in _options(rest[0]):
            return self._target(*rest[:2], rest[2:])
        objectives = [n for n in self.tree.body if isinstance(n, Block) and n.kind == "objective"]
        for block in objectives:
            if block.name == first and rest:
                return self._in_objective(block, rest)
        return self._in_objective(objectives[0], [first, *rest]) if len(objectives) == 1 else None

    def _with(self, old, new) -> Tree:
        return replace(self.tree, body=tuple(new if n is old else n for n in self.tree.body))

    def _option(self, kind: str, name: str, rest: list[str]) -> Place | None:
        block = next((n for n in self.tree.body if isinstance(n, Block) and n.kind == kind), None)
        default = schema(kind)[name][0].default
        if block is not None:
            return self._statement(block, name, default, rest)

        def put(expr: Expr) -> Tree:
            body = (Define(name, None, expr, expr.span, expr.span),)
            new = Block(kind, None, (), None, body, expr.span, expr.span)
            return replace(self.tree, body=(*self.tree.body, new))

        return self._inside(default, rest, put)

    def _target(self, kind: str, name: str, rest: list[str]) -> Place | None:
        """An option of a target in `export`; whatever is missing on the way is added."""
        export = _first(self.tree.body, "export")
        block = _first(export.body, kind) if export else None
        nodes = [n for n in (block.body if block else ()) if isinstance(n, Define)]
        node = next((n for n in nodes if n.name == name), None)

        def put(expr: Expr) -> Tree:
            new = Define(name, None, expr, expr.span, expr.span)
            inner = _with(block, kind, node, new, expr.span)
            outer = _with(export, "export", block, inner, expr.span)
            kept = [n for n in self.tree.body if n is not export]
            return replace(self.tree, body=(*kept, outer))

        return self._inside(node.value if node else schema(kind)[name][0].default, rest, put)

    def _in_objective(self, block: Block, path: list[str]) -> Place | None:
        first, *rest = path
        if first in (*SLOTS, "backbone"):
            return self._statement(block, first, None, rest)
        for node in block.body:
            if isinstance(node, Define) and node.name == "strategy" and rest:
                items = node.value.items if isinstance(node.value, ListOf) else (node.value,)
                for item in items:
                    if isinstance(item, (Name, Call)) and item.path[-1] == first:
                        return self._item(block, node, item, rest)
            if isinstance(node, (Define, Draw)) and node.name == first:
                return self._statement(block, first, None, rest)
        return None

    def _item(self, block: Block, node: Define, item: Expr, rest: list[str]) -> Place | None:
        def put(expr: Expr) -> Tree:
            if isinstance(node.value, ListOf):
                items = tuple(expr if i is item else i for i in node.value.items)
                expr = replace(node.value, items=items)
            return self._changed(block, node, replace(node, value=expr))

        return self._inside(item, rest, put)

    def _statement(self, block: Block, name: str, default, rest: list[str]) -> Place | None:
        """The value of a statement of a block, which is added where it is missing."""
        nodes = [n for n in block.body if isinstance(n, (Define, Draw)) and n.name == name]
        if not nodes:
            return self._inside(default, rest, lambda e: self._added(block, name, e))
        node = nodes[-1]
        slot = "law" if isinstance(node, Draw) else "value"

        def put(expr: Expr) -> Tree:
            whole = Span(expr.span.source, 0, expr.span.end)
            return self._changed(block, node, replace(node, span=whole, **{slot: expr}))

        return self._inside(getattr(node, slot), rest, put)

    def _added(self, block: Block, name: str, expr: Expr) -> Tree:
        new = Define(name, None, expr, expr.span, expr.span)
        return self._with(block, replace(block, body=(*block.body, new)))

    def _changed(self, block: Block, old, new) -> Tree:
        body = tuple(new if n is old else n for n in block.body)
        return self._with(block, replace(block, body=body))

    def _inside(self, old: Expr | None, rest: list[str], put) -> Place | None:
        """The place of an argument, an argument of that one, and so on."""
        if not rest:
            return Place(old, put)
        if not isinstance(old, (Name, Call)):
            return None
        args = old.args if isinstance(old, Call) else ()
        name, definition = rest[0], self._meant(old)
        given = _given(args, name, definition)
        default = formals(definition)[name][0].default if _has(definition, name) else None

        def inner(expr: Expr) -> Tree:
            whole = Span(expr.span.source, 0, expr.span.end)
            new = Argument(name if given is None else given.name, expr, whole)
            kept = tuple(new if a is given else a for a in args)
            kept = kept if given is not None else (*args, new)
            head = old.head if isinstance(old, Call) else old.span
            return put(Call(old.path, kept, old.span, head))

        return self._inside(given.value if given is not None else default, rest[1:], inner)

    def _meant(self, expr: Name | Call) -> Definition | None:
        found = (self.names.find(kind, expr.path) for kind in PARTS)
        return next((d for d in found if d is not None), None)


def _options(target: str):
    """The options of a target of `export`; of anything else none."""
    return schema(target) if target in TARGETS else {}


def _first(body: tuple, kind: str) -> Block | None:
    return next((n for n in body if isinstance(n, Block) and n.kind == kind), None)


def _with(block: Block | None, kind: str, old, new, span: Span) -> Block:
    """A block with a new statement in the place of an old one; both may be missing."""
    if block is None:
        return Block(kind, None, (), None, (new,), span, span)
    return replace(block, body=(*(n for n in block.body if n is not old), new))


def _has(definition: Definition | None, name: str) -> bool:
    return definition is not None and name in formals(definition)


def _given(args: tuple[Argument, ...], name: str, definition: Definition | None) -> Argument | None:
    """The argument that a call has for a parameter, by name or by position."""
    order = iter(formals(definition) if definition else ())
    for argument in args:
        if (argument.name or next(order, None)) == name:
            return argument
    return None


def _unknown(path: str, value: object, places: _Places) -> Finding:
    source = Source(f"--set {path}", f"{path} = {_written(value)}")
    known = _known(places.tree)
    names = [n.name for n in places.tree.body if isinstance(n, Block) and n.kind == "objective"]
    longer = next((f"{n}.{path}" for n in names if places.find(f"{n}.{path}")), None)
    last = {k.rpartition(".")[2]: k for k in reversed(known)}
    ends = {k.partition(".")[2]: k for k in known if k.count(".") > 1}  # `onnx.precision`
    meant = longer or last.get(path) or nearest(path, known) or last.get(nearest(path, last))
    meant = meant or ends.get(path) or ends.get(nearest(path, ends))
    listed = ", ".join(f"`{k}`" for k in known[:6])
    hint = f"write `--set {meant}=…`" if meant else f"there are {listed} and more"
    at = Label(Span(source, 0, len(path)))
    return Finding("DIF150", f"this spec has nothing called `{path}` to set", at, help=hint)


def _known(tree: Tree) -> list[str]:
    """The places that a setting could name without going into arguments."""
    params = [n.name for n in tree.body if isinstance(n, Param)]
    options = [f"{kind}.{name}" for kind in RUNS for name in schema(kind)]
    options += [f"export.{kind}.{name}" for kind in TARGETS for name in schema(kind)]
    blocks = [n for n in tree.body if isinstance(n, Block) and n.kind == "objective"]
    slots = [*SLOTS, "backbone"]
    inner = [
        name if len(blocks) == 1 else f"{b.name}.{name}"
        for b in blocks
        for name in (*slots, *(s.name for s in b.body if isinstance(s, (Define, Draw))))
    ]
    return list(dict.fromkeys([*params, *inner, *options]))
