"""What every graph must satisfy, before the passes and between them."""

from __future__ import annotations

import networkx as nx

from difftrain.graph.graph import Graph
from difftrain.language.operations import OPERATIONS, KindError

LEAVES = {"const", "word", "text", "input", "module", "variable"}
OTHERS = {"draw", "network", "jvp", "widen"}


class BrokenGraph(Exception):
    """A pass made a graph that means nothing: our own bug."""


def verify(graph: Graph, after: str) -> None:
    """Raises BrokenGraph with the first node that is not legal."""
    if not nx.is_directed_acyclic_graph(graph.net):
        raise BrokenGraph(f"after {after}: the graph has a cycle")
    for node, data in graph.net.nodes(data=True):
        if problem := _problem(graph, data) or _edges(graph, node):
            raise BrokenGraph(f"after {after}: %{node} {data['op']} {problem}")
    for name, node in graph.outputs.items():
        if node not in graph.net:
            raise BrokenGraph(f"after {after}: output {name} is gone")


def _problem(graph: Graph, data: dict) -> str | None:
    op, args = data["op"], data["args"]
    if op in LEAVES:
        return "is a leaf with arguments" if args else None
    if op in OTHERS:
        return None
    if op not in OPERATIONS:
        return "is not an operation"
    if len(args) != OPERATIONS[op].arity:
        return f"has {len(args)} arguments"
    kinds = [graph[a]["kind"] for a in args]
    try:
        kind = OPERATIONS[op].kind(*kinds)
    except KindError as problem:
        return str(problem)
    return None if kind == data["kind"] else f"is called {data['kind']}, and is {kind}"


def _edges(graph: Graph, node: int) -> str | None:
    args = graph[node]["args"]
    if set(graph.net.predecessors(node)) != set(args):
        return "has edges that are not its arguments"
    return None
