"""Names: what a file defines and imports, and where each name is found.

Kinds are separate name spaces: the process `linear` and the betas `linear` do not meet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from difftrain.language.finding import Finding, Fix, Label
from difftrain.language.nearest import nearest
from difftrain.language.syntax import parse
from difftrain.language.tree import Block, Define, Import, Param, Source, Span, Tree
from difftrain.shipped import folder

LIBRARY_KINDS = ("process", "prediction", "strategy", "backbone", "encoder", "codec", "solver")
SLOTS = {"process": "process", "prediction_type": "prediction", "strategy": "strategy"}  # kinds
OPTION_KINDS = ("options", "source", "optimizer")  # in the library alone
RUN_KINDS = ("data", "train", "sample", "export")
TARGETS = ("onnx", "pt2", "tensorrt")  # blocks in `export`
KINDS = (*LIBRARY_KINDS, "objective", *RUN_KINDS)


@dataclass(frozen=True, eq=False)
class Definition:
    """A block, function or parameter, and the names among which its text is read."""

    kind: str
    node: Block | Define | Param
    home: Names

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def shipped(self) -> bool:
        return self.home.shipped


@dataclass(eq=False)
class Names:
    """What is in scope in one file: its own definitions, the prelude, and imported spaces."""

    path: str
    shipped: bool = False
    own: dict[tuple[str, str], Definition] = field(default_factory=dict)
    spaces: dict[str, Names] = field(default_factory=dict)

    @property
    def prelude(self) -> tuple[Names, ...]:
        return standard()

    def find(self, kind: str, path: tuple[str, ...]) -> Definition | None:
        """The definition that a dotted name means here."""
        if len(path) > 1:
            space = self.spaces.get(path[0])
            return space.find(kind, path[1:]) if space else None
        if (kind, path[0]) in self.own:
            return self.own[kind, path[0]]
        return next((n.own[kind, path[0]] for n in self.prelude if (kind, path[0]) in n.own), None)

    def known(self, kind: str) -> list[str]:
        """Every name of a kind that could be written here."""
        near = [n for names in (self, *self.prelude) for k, n in names.own if k == kind]
        far = [f"{s}.{n}" for s, names in self.spaces.items() for k, n in names.own if k == kind]
        return [*near, *far]

    def definitions(self, kind: str) -> list[Definition]:
        return [d for names in (self, *self.prelude) for d in names.own.values() if d.kind == kind]


def collect(tree: Tree, found: list[Finding], shipped: bool = False, chain=()) -> Names:
    """The names of a file, with what it imports read as well; `chain`: the files that import it."""
    names = Names(tree.source.path, shipped)
    for node in tree.body:
        match node:
            case Import():
                _import(node, names, found, chain)
            case Block(kind="prelude") if shipped:
                names.own["prelude", ""] = Definition("prelude", node, names)
            case Block(kind=kind) if kind in LIBRARY_KINDS or kind == "objective":
                _define(kind, node, names, found)
            case Block(kind=kind) if shipped and kind in OPTION_KINDS:
                _define(kind, node, names, found)
            case Block(kind=kind) if kind not in KINDS:
                found.append(_unknown_kind(node))
            case Define(formals=None):
                found.append(_loose(node))
            case Define():
                _define("function", node, names, found)
            case Param():
                _define("param", node, names, found)
    return names


def _define(kind: str, node, names: Names, found: list[Finding]) -> None:
    name = node.name or ""
    earlier = names.own.get((kind, name)) if names.shipped else names.find(kind, (name,))
    if earlier is not None:
        first = Label(earlier.node.head, "defined here first")
        found.append(
            Finding(
                "DIF101",
                f"`{name}` is defined twice as a {kind}",
                Label(node.head),
                (first,),
                because="two meanings of one name cannot both hold",
                help="give one of them another name",
            )
        )
        return
    names.own[kind, name] = Definition(kind, node, names)


def _unknown_kind(node: Block) -> Finding:
    close = nearest(node.kind, KINDS)
    hint = f"write `{close}`" if close else "the kinds are " + ", ".join(f"`{k}`" for k in KINDS)
    start = node.span.start
    span = Span(node.span.source, start, start + len(node.kind))
    fix = Fix(span, close) if close else None
    return Finding(
        "DIF102", f"there is no block kind `{node.kind}`", Label(span), help=hint, fix=fix
    )


def _loose(node: Define) -> Finding:
    return Finding(
        "DIF103",
        f"`{node.name}` is defined outside any block",
        Label(node.head),
        because="an equation belongs to an objective, a process, a prediction or a strategy",
        help=f"move it into `objective {{ … }}`, or write `param {node.name} = …` for a parameter",
    )


def _import(node: Import, names: Names, found: list[Finding], chain: tuple[str, ...]) -> None:
    alias = node.alias or node.path[-1]
    target, choices = locate(node.path, names.path)
    if target is None:
        dotted = ".".join(node.path)
        close = nearest(dotted, choices)
        listed = ", ".join(f"`{c}`" for c in choices)
        hint = f"write `import {close}`" if close else f"there are {listed}" if choices else ""
        text = f"there is nothing to import at `{dotted}`"
        found.append(Finding("DIF104", text, Label(node.span), help=hint))
    elif node.path[0] == "std":
        names.spaces[alias] = _shipped(target.name)
    elif str(target) in (chain := (*chain, names.path)):
        found.append(_imports_itself(node, [*chain, str(target)]))
    else:
        source = Source(str(target), target.read_text(encoding="utf-8", errors="replace"))
        names.spaces[alias] = collect(parse(source, found), found, chain=chain)


def _imports_itself(node: Import, chain: list[str]) -> Finding:
    names = " -> ".join(Path(path).stem for path in chain[chain.index(chain[-1]) :])
    text = "this import leads back to the file that imports it"
    hint = "move what both files need into a third one"
    return Finding("DIF107", text, Label(node.span), because=names, help=hint)


def locate(path: tuple[str, ...], beside: str):
    """The file of an import (or None), and the imports that would have worked.

    `std.NAME` is shipped; anything else is looked for beside the file that imports it.
    """
    if path[0] == "std":
        std = folder("specs") / "std"
        choices = sorted(f"std.{f.name[:-5]}" for f in std.iterdir() if f.name.endswith(".diff"))
        target = std / f"{path[-1]}.diff"
        return (target if len(path) == 2 and target.is_file() else None), choices
    here = Path(beside).parent
    target = here.joinpath(*path).with_suffix(".diff")
    choices = sorted(p.stem for p in here.glob("*.diff") if str(p) != beside)
    return (target if target.is_file() else None), choices


_SHIPPED: set[Source] = set()


def is_shipped(span: Span) -> bool:
    """Whether a place is in the standard library."""
    return span.source in _SHIPPED


def is_library(path: str) -> bool:
    """Whether a file is one of the standard library's own."""
    std = folder("specs") / "std"
    return isinstance(std, Path) and Path(path).resolve().parent == std.resolve()


@cache
def _shipped(file_name: str) -> Names:
    """The names of one file of the standard library."""
    found: list[Finding] = []
    text = (folder("specs") / "std" / file_name).read_text(encoding="utf-8")
    source = Source(f"std/{file_name}", text)
    _SHIPPED.add(source)
    names = collect(parse(source, found), found, shipped=True)
    if found:
        raise RuntimeError(f"the standard library is broken: {found}")
    return names


@cache
def standard() -> tuple[Names, ...]:
    """What is in scope in every file: the files that `std/prelude.diff` imports."""
    return tuple(_shipped("prelude.diff").spaces.values())
