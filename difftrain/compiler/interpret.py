"""The interpreter: what a graph means, node by node. The oracle for the emitted step.

It runs any graph, before the passes or after them, in the type of its inputs (float64 for tests).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from difftrain.compiler.network import apply_module, call_network, call_tapped
from difftrain.compiler.operations import CHANNELS, TORCH, rows, solved
from difftrain.graph.graph import Graph

BINDERS = {"jvp": 2, "inverse": 1}  # operations on a function, with how many variables it has


def interpret(graph: Graph, inputs: Mapping[str, object], draws, nets: Mapping) -> dict:
    """The values of the outputs. `inputs` holds what the graph is given by name, `draws` is a
    `Draws`, `nets` maps net names to callables `network(x, t, cond, **extra)`. An output inside a
    binder has no value of its own."""
    values: dict[int, object] = {}
    inside = inside_derivatives(graph)
    for node in graph.order():
        if node not in inside:
            values[node] = _value(graph, node, values, inputs, draws, nets, inside)
    return {name: values[node] for name, node in graph.outputs.items() if node not in inside}


def inside_derivatives(graph: Graph) -> set[int]:
    """Nodes that depend on a variable of a derivative: computed only inside it."""
    result: set[int] = set()
    for node in graph.order():
        data = graph[node]
        free = data["op"] == "variable" or any(a in result for a in data["args"])
        if free and not (data["op"] in BINDERS and _closed(graph, node, result)):
            result.add(node)
    return result


def bound(graph: Graph, node: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """The body of a binder, its variables, and what it reads outside."""
    body, *rest = graph[node]["args"]
    count = BINDERS[graph[node]["op"]]
    return body, tuple(rest[:count]), tuple(rest[count:])


def members(graph: Graph, node: int) -> list[int]:
    """What the body of a binder computes for each value of its variables, without what only the
    binders in it compute."""
    body, variables, _ = bound(graph, node)
    below, inside = graph.below(body), inside_derivatives(graph)
    others = {n for n in below if graph[n]["op"] in BINDERS}
    hidden = {v for n in others for v in bound(graph, n)[1]} - {*variables}
    for member in (n for n in graph.order() if n in below):
        within = any(a in hidden for a in graph[member]["args"])
        if within and not (member in others and _closed(graph, member, hidden)):
            hidden.add(member)
    shown = (below & inside) - hidden
    return [n for n in graph.order() if n in shown and graph[n]["op"] != "variable"]


def _closed(graph: Graph, node: int, inside: set[int]) -> bool:
    """Whether a binder depends on no variable but its own."""
    return not any(a in inside for a in bound(graph, node)[2])


def _value(graph, node, values, inputs, draws, nets, inside):
    data = graph[node]
    args, attrs = data["args"], data["attrs"]
    match data["op"]:
        case "const" | "word" | "text":
            return attrs["value"]
        case "module":
            return nets[attrs["name"]]
        case "input":
            return inputs[attrs["name"]]
        case "draw":
            return getattr(draws, attrs["law"])(attrs["name"], *(values[a] for a in args))
        case "network" | "primal":
            return _network(graph, data, values, draws)
        case "tap":
            return _network(graph, graph[args[0]], values, draws, call_tapped)[1]
        case "apply":
            return apply_module(*(values[a] for a in args))
        case "jvp" | "inverse":
            return _bound(graph, node, values, inputs, draws, nets, inside)
        case "where" if data["kind"] == "condition":
            return rows(*(values[a] for a in args))
    operands = [
        _spread(values[a], graph[a]["kind"], data["kind"], values, graph, args) for a in args
    ]
    if data["op"] not in ("pick", "real"):
        operands = [_real(x, inputs) for x in operands]
    axis = (CHANNELS[graph[args[0]]["kind"]],) if data["op"] == "cosine" else ()
    return TORCH[data["op"]](*operands, *axis)


def _real(value, inputs):
    """Whole numbers in the precision of the data."""
    like = next((inputs[n] for n in ("x0", "xt") if inputs.get(n) is not None), None)
    whole = isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)
    return TORCH["real"](value, like) if whole and like is not None else value


def _spread(value, kind: str, target: str, values, graph, args):
    """A number per sample, shaped to go with the field beside it."""
    if kind != "sample" or target not in ("field", "tokens") or not isinstance(value, Tensor):
        return value
    like = next(values[a] for a in args if graph[a]["kind"] == target)
    return TORCH["widen"](value, like)


def _network(graph, data, values, draws, call=call_network):
    given = data["args"][data["op"] == "primal" :]
    net, x, tau, cond, dropout, *extra = (values[a] for a in given)
    named = dict(zip(data["attrs"]["extras"], extra, strict=True))
    if dropout:
        named["masks"] = draws.masks
    grad = data["attrs"].get("grad", True)
    with torch.set_grad_enabled(torch.is_grad_enabled() and grad):
        return call(net, x, tau, cond, **named)


def _bound(graph, node, values, inputs, draws, nets, inside):
    body, variables, rest = bound(graph, node)
    computed = members(graph, node)

    def function(*at):
        local = {**values, **dict(zip(variables, at, strict=True))}
        for member in computed:
            local[member] = _value(graph, member, local, inputs, draws, nets, inside)
        return local[body]

    outside = [values[a] for a in rest]
    if graph[node]["op"] == "inverse":
        return solved(function, *outside)
    t, xt, one, flow = outside
    return torch.func.jvp(function, (t, xt), (one * torch.ones_like(t), flow))[1]
