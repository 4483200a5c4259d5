"""Graphs around the backbone's: a solver is traced with the backbone as one operator, and the
backbone's own nodes, made once, are put in wherever it stands. Its weights are held once."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from difftrain.export.modules import Piece
from difftrain.sampling.solvers import Pair

OPERATOR = ("difftrain", "Backbone")  # domain and name
SIZED = ("x", "t", "r", "guess")  # inputs with a batch that are others in every place
WEIGHT = "backbone.{}"  # what its weights are called outside


class Closed(nn.Module):
    """The backbone as one operator, given `inputs` as the backbone's own graph takes them."""

    def __init__(self, inputs: tuple[str, ...]):
        super().__init__()
        self.inputs = inputs

    def forward(self, x: Tensor, t: Tensor, cond, null, r, guess) -> Pair:
        every = {"x": x, "t": t, "cond": cond, "null": null, "r": t if r is None else r}
        every["guess"] = torch.zeros_like(x) if guess is None else guess
        given = [every[name] for name in self.inputs]
        shaped = {"dtypes": [x.dtype] * 2, "shapes": [x.shape] * 2}
        found = torch.onnx.ops.symbolic_multi_out("::".join(OPERATOR), given, **shaped)
        return tuple(value.to(x.device) for value in found)  # they come on the CPU


def closed(piece: Piece, backbone: Piece) -> Piece:
    """A sampler or its step, whose backbone is one operator."""
    return replace(piece, module=piece.module.around(Closed(tuple(backbone.inputs))).eval())


def fill(model, body) -> None:
    """Puts the nodes of `body` in the place of every operator; `body` is used up. What is the same
    in several of them, such as what follows from the condition alone, is computed once."""
    import onnx_ir as ir
    from onnx_ir.passes import common

    _counts_conditions(body.graph)
    weights = _moved(body.graph, model.graph)
    for node in [n for n in model.graph if (n.domain, n.op_type) == OPERATOR]:
        own = len(node.inputs)
        node.resize_inputs(own + len(weights))
        for place, weight in enumerate(weights, own):
            node.replace_input_with(place, weight)
    function = ir.Function(*OPERATOR, graph=body.graph, attributes=[])
    model.functions[function.identifier()] = function
    model.opset_imports.pop(OPERATOR[0], None)
    passes = common.InlinePass(), common.CommonSubexpressionEliminationPass()
    ir.passes.Sequential(*passes, common.RemoveUnusedNodesPass())(model)


def without_sources(model) -> None:
    """Takes out of a graph where its sources lay, which is most of a small file."""
    from onnx_ir.passes import common

    common.ClearMetadataAndDocStringPass()(model)


def _counts_conditions(graph) -> None:
    """Reads the size of the batch off the condition alone: what is made of that and the size is
    then the same in every place."""
    import onnx_ir as ir

    cond = next((value for value in graph.inputs if value.name == "cond"), None)
    asked = [value for value in graph.inputs if cond and value.name in SIZED]
    for node in [n for value in asked for n in value.consumers() if _counts(n, value)]:
        node.replace_input_with(0, cond)
        node.attributes["end"] = ir.AttrInt64("end", 1)


def _counts(node, asked) -> bool:
    """Whether a node gives the first dimension of what it is asked, alone."""
    start, end = (node.attributes.get_int(name, None) for name in ("start", "end"))
    return node.op_type == "Shape" and not start and (end == 1 or len(asked.shape) == 1)


def _moved(source, target) -> list:
    """The weights of a graph as those of another; they become inputs of the first."""
    import onnx_ir as ir

    held = list(source.initializers.values())
    source.initializers.clear()
    source.inputs.extend(held)
    moved = [
        ir.Value(name=WEIGHT.format(v.name), type=v.type, shape=v.shape, const_value=v.const_value)
        for v in held
    ]
    for value in moved:
        target.register_initializer(value)
    return moved
