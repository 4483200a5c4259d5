"""What every graph must satisfy, before the passes and between them."""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx

from difftrain.graph.graph import Graph
from difftrain.language.operations import LAWS, NAMES, OPERATIONS, KindError

LEAVES = {"const", "word", "text", "input", "module", "variable"}
# What is no plain operation: how many arguments at least, and attributes it must have.
OTHERS = {
    "draw": (0, ("law", "name")),
    "network": (5, ("extras",)),
    "jvp": (7, ()),
    "primal": (6, ("extras", "inner")),
    "inverse": (5, ()),
    "tap": (1, ()),
    "apply": (2, ()),
    "widen": (2, ()),
    "real": (2, ()),
}


class BrokenGraph(Exception):
    """A pass made a graph that means nothing: our own bug."""


def verify(graph: Graph, after: str, wanted: Iterable[str] = ()) -> None:
    """Raises BrokenGraph with the first node that is not legal, or a wanted output that is gone."""
    if not nx.is_directed_acyclic_graph(graph.net):
        raise BrokenGraph(f"after {after}: the graph has a cycle")
    for node, data in graph.net.nodes(data=True):
        if problem := _edges(graph, node) or _problem(graph, data):
            raise BrokenGraph(f"after {after}: %{node} {data.get('op', 'nothing')} {problem}")
    for name in dict.fromkeys((*graph.outputs, *wanted)):
        if graph.outputs.get(name) not in graph.net:
            raise BrokenGraph(f"after {after}: output {name} is gone")


def _edges(graph: Graph, node: int) -> str | None:
    if missing := {"op", "kind", "args", "attrs", "names"} - graph[node].keys():
        return f"has no {', '.join(sorted(missing))}"
    if set(graph.net.predecessors(node)) != set(graph[node]["args"]):
        return "has edges that are not its arguments"
    return None


def _problem(graph: Graph, data: dict) -> str | None:
    op, args = data["op"], data["args"]
    if data["kind"] not in NAMES:
        return f"has the kind {data['kind']}, which there is not"
    if op in LEAVES:
        return "is a leaf with arguments" if args else None
    if op in OTHERS:
        return _other(data, *OTHERS[op])
    if op not in OPERATIONS:
        return "is not an operation"
    return _operation(graph, data)


def _other(data: dict, count: int, attrs: tuple[str, ...]) -> str | None:
    if len(data["args"]) < count:
        return f"has {len(data['args'])} arguments"
    if missing := [a for a in attrs if a not in data["attrs"]]:
        return f"does not say its {', '.join(missing)}"
    if data["op"] == "draw" and data["attrs"]["law"] not in LAWS:
        return f"is drawn from {data['attrs']['law']}, which is no law"
    return None


def _operation(graph: Graph, data: dict) -> str | None:
    operation = OPERATIONS[data["op"]]
    if len(data["args"]) != operation.arity:
        return f"has {len(data['args'])} arguments"
    try:
        kind = operation.kind(*(graph[a]["kind"] for a in data["args"]))
    except KindError as problem:
        return str(problem)
    return None if kind == data["kind"] else f"is called {data['kind']}, and is {kind}"
