"""The interpreter: what a graph means, node by node. The oracle for the emitted step.

It runs any graph, before the passes or after them, in the type of its inputs (float64 for tests).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from difftrain.compiler.network import call_network
from difftrain.compiler.operations import TORCH, rows
from difftrain.graph.graph import Graph


def interpret(graph: Graph, inputs: Mapping[str, object], draws, nets: Mapping) -> dict:
    """The values of the outputs. `inputs` holds what the graph is given by name, `draws` is a
    `Draws`, `nets` maps net names to callables `network(x, t, cond, **extra)`. An output inside a
    derivative has no value of its own."""
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
        if free and not (data["op"] == "jvp" and _closed(graph, node, result)):
            result.add(node)
    return result


def _closed(graph: Graph, node: int, inside: set[int]) -> bool:
    """Whether a derivative depends on no variable but its own."""
    return not any(a in inside for a in graph[node]["args"][3:])


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
        case "network":
            return _network(values, args, attrs)
        case "jvp":
            return _derivative(graph, node, values, inputs, draws, nets, inside)
        case "where" if data["kind"] == "condition":
            return rows(*(values[a] for a in args))
    operands = [
        _spread(values[a], graph[a]["kind"], data["kind"], values, graph, args) for a in args
    ]
    return TORCH[data["op"]](*operands)


def _spread(value, kind: str, target: str, values, graph, args):
    """A number per sample, shaped to go with the field beside it."""
    if kind != "sample" or target not in ("field", "tokens") or not isinstance(value, Tensor):
        return value
    like = next(values[a] for a in args if graph[a]["kind"] == target)
    return TORCH["widen"](value, like)


def _network(values, args, attrs):
    net, x, tau, cond, _, *extra = (values[a] for a in args)
    named = dict(zip(attrs["extras"], extra, strict=True))
    with torch.set_grad_enabled(torch.is_grad_enabled() and attrs.get("grad", True)):
        return call_network(net, x, tau, cond, **named)


def _derivative(graph, node, values, inputs, draws, nets, inside):
    body, *rest = graph[node]["args"]
    variables, (t, xt, one, flow) = rest[:2], (values[a] for a in rest[2:])
    members = [n for n in graph.order() if n in inside and n in graph.below(body)]

    def function(*at):
        local = {**values, **dict(zip(variables, at, strict=True))}
        for member in members:
            if member not in variables:
                local[member] = _value(graph, member, local, inputs, draws, nets, inside)
        return local[body]

    return torch.func.jvp(function, (t, xt), (one * torch.ones_like(t), flow))[1]
