"""The operation graph: nodes with an operation, the kind of their value, and ordered arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import networkx as nx

from difftrain.language.term import Term, leaf, show, walk


@dataclass(eq=False)
class Graph:
    """`net` holds the nodes (numbers) with `op`, `kind`, `args`, `attrs`, `names`, `span`; an edge
    runs from an argument to what uses it. `outputs` names the nodes that are wanted."""

    net: nx.DiGraph = field(default_factory=nx.DiGraph)
    outputs: dict[str, int] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    laws: dict[str, Term] = field(default_factory=dict)  # what given quantities would be drawn from

    def __getitem__(self, node: int) -> dict:
        return self.net.nodes[node]

    def add(
        self, op: str, kind: str, args: Iterable[int] = (), names=(), span=None, **attrs
    ) -> int:
        """A new node."""
        node = len(self.net)
        while node in self.net:
            node += 1
        args = tuple(args)
        data = {"op": op, "kind": kind, "args": args, "attrs": attrs}
        self.net.add_node(node, **data, names=tuple(names), span=span)
        self.net.add_edges_from((a, node) for a in args)
        return node

    def set_args(self, node: int, args: Iterable[int]) -> None:
        self.net.remove_edges_from([(a, node) for a in set(self[node]["args"])])
        self[node]["args"] = tuple(args)
        self.net.add_edges_from((a, node) for a in self[node]["args"])

    def replace(self, old: int, new: int) -> None:
        """Everything that used `old` uses `new`."""
        for user in list(self.net.successors(old)):
            self.set_args(user, (new if a == old else a for a in self[user]["args"]))
        self.outputs = {k: new if v == old else v for k, v in self.outputs.items()}
        names = (*self[new]["names"], *self[old]["names"])
        self[new]["names"] = tuple(dict.fromkeys(names))

    def remove(self, nodes: Iterable[int]) -> None:
        self.net.remove_nodes_from(list(nodes))

    def order(self) -> list[int]:
        """The nodes, arguments before what uses them; ties in the order of making."""
        return list(nx.lexicographical_topological_sort(self.net))

    def find(self, *ops: str) -> list[int]:
        return [n for n in self.order() if self[n]["op"] in ops]

    def copy(self) -> Graph:
        net = nx.DiGraph()
        net.add_nodes_from((n, dict(d)) for n, d in self.net.nodes(data=True))
        net.add_edges_from(self.net.edges)
        return Graph(net, dict(self.outputs), self.given, dict(self.laws))

    def below(self, *nodes: int) -> set[int]:
        """The nodes and everything they are computed from."""
        return set(nodes).union(*(nx.ancestors(self.net, n) for n in nodes)) if nodes else set()

    def __str__(self) -> str:
        """One line a node: number, names, operation, arguments, kind."""
        lines = []
        for node in self.order():
            data = self[node]
            attrs = "".join(f" {k}={_brief(v)}" for k, v in sorted(data["attrs"].items()))
            args = " ".join(f"%{a}" for a in data["args"])
            names = " ".join(_shown(data["names"]))
            body = f"{data['op']}{' ' if args else ''}{args}{attrs}"
            lines.append(f"%{node:<4}{data['kind']:<10}{body:<44} {names}".rstrip())
        lines += [f"-> {name} = %{node}" for name, node in self.outputs.items()]
        return "\n".join(lines)


def _shown(names: tuple[str, ...]) -> list[str]:
    """The names, without those of other worlds where the value is the same in this one."""
    return [n for n in names if "~" not in n or n.partition("~")[0] not in names]


def _brief(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def from_terms(
    roots: Mapping[str, Term], names: Mapping[Term, tuple[str, ...]], given=(), laws=None
) -> Graph:
    """The graph of terms; `names` says what each is called in the spec."""
    graph = Graph(given=frozenset(given), laws=dict(laws or {}))
    nodes: dict[Term, int] = {}
    for term in walk(*roots.values()):
        args = [nodes[a] for a in term.args]
        attrs = dict(term.attrs)
        nodes[term] = graph.add(term.op, term.kind, args, names.get(term, ()), term.span, **attrs)
    graph.outputs = {name: nodes[term] for name, term in roots.items()}
    return graph


def to_terms(graph: Graph) -> dict[int, Term]:
    """The term of every node, as it stands."""
    terms: dict[int, Term] = {}
    for node in graph.order():
        data = graph[node]
        args = [terms[a] for a in data["args"]]
        terms[node] = leaf(data["op"], data["kind"], *args, span=data["span"], **data["attrs"])
    return terms


__all__ = ["Graph", "from_terms", "show", "to_terms"]
