"""The pass that lets a derivative along the path also give the forward that it differentiates.

Forward-mode differentiation computes a network's output beside its tangent, so the forward at the
same point need not be made again.
"""

from __future__ import annotations

from difftrain.graph.graph import Graph


def share_primals(graph: Graph) -> Graph:
    """Needs: stop_gradients, widen. Ensures: a forward at the point of a derivative of the same
    network is `primal` of that derivative (its first argument), unless what the derivative
    moves along needs it first."""
    graph = graph.copy()
    for node in graph.find("jvp"):
        for inner, outer in _pairs(graph, node):
            if _free(graph, node, outer):
                _share(graph, node, inner, outer)
                break
    return graph


def _pairs(graph: Graph, node: int):
    """(a forward inside the derivative, the same one outside it at the derivative's point)."""
    body, *rest = graph[node]["args"]
    variables, at = rest[:2], rest[2:4]
    place = dict(zip(variables, at, strict=True))
    known = {_key(graph, n, graph[n]["args"]): n for n in graph.order()}
    below = graph.below(body)
    for member in graph.order():
        if member not in below or member in place:
            continue
        args = [place.get(a, a) for a in graph[member]["args"]]
        found = known.get(_key(graph, member, args))
        if found is not None:
            place[member] = found
        if graph[member]["op"] == "network" and found not in (None, member):
            yield member, found


def _key(graph: Graph, node: int, args) -> tuple:
    """What a node computes, whether or not with gradient."""
    data = graph[node]
    attrs = ((k, type(v), v) for k, v in sorted(data["attrs"].items()) if k != "grad")
    return data["op"], data["kind"], tuple(args), tuple(attrs)


def _free(graph: Graph, node: int, outer: int) -> bool:
    """Whether the derivative can be computed before the forward outside is used."""
    tapped = any(graph[u]["op"] == "tap" for u in graph.net.successors(outer))
    return not tapped and outer not in graph.below(node) and _beside(graph, node, outer)


def _beside(graph: Graph, node: int, outer: int) -> bool:
    """Whether every derivative of the forward outside contains this one, which else it would have
    to compute as well."""
    bodies = [graph.below(graph[n]["args"][0]) for n in graph.find("jvp")]
    return all(node in body for body in bodies if outer in body)


def _share(graph: Graph, node: int, inner: int, outer: int) -> None:
    data = graph[outer]
    grad = data["attrs"].get("grad", True) or graph[inner]["attrs"].get("grad", True)
    graph[inner]["attrs"] = {**graph[inner]["attrs"], "grad": grad}
    args, attrs = (node, *data["args"]), {**data["attrs"], "inner": inner}
    new = graph.add("primal", data["kind"], args, data["names"], data["span"], **attrs)
    graph.replace(outer, new)
    graph.remove([outer])


__all__ = ["share_primals"]
