"""What is written otherwise in an ONNX graph so that engine libraries see what they can fuse.

A pass keeps what a graph computes. Whether it is worth having can be read in an engine, which lists
its kernels: that is what each pass says of itself.
"""

from __future__ import annotations


def rewritten(model) -> None:
    """Runs all passes on a model of onnx_ir."""
    for run in PASSES:
        run(model)


def parted_behind_the_batch(model) -> None:
    """What is parted on an axis before the batch, as one product is into q, k and v, is parted on
    the axis behind it.

    Before the batch, TensorRT-RTX 1.4 makes a product of each part, puts those together again, and
    adds biases and copies in three kernels; behind it, there is one product with its bias and one
    copy: 7 kernels for a block of DiT where there were 9.
    """
    for node in [n for n in model.graph if n.op_type == "Transpose"]:
        order = node.attributes.get_ints("perm", ())
        if tuple(order[1:2]) == (0,) and (parts := _parts(node.outputs[0])):
            _swap(node, list(order), parts, _axis(model.graph))


def _parts(value) -> list[tuple]:
    """The slices of a value on its first axis, each with what takes that axis away; none if the
    value is read in any other way."""
    pairs = []
    for node in value.consumers():
        after = node.outputs[0].consumers()
        if not (_along(node, "Slice", 3) and len(after) == 1 and _along(after[0], "Squeeze", 1)):
            return []
        pairs.append((node, after[0]))
    return [] if value.is_graph_output() else pairs


def _along(node, kind: str, place: int) -> bool:
    """Whether a node is of a kind whose input at `place` says that it is about the first axis."""
    if node.op_type != kind or len(node.inputs) <= place or node.inputs[place] is None:
        return False
    held = node.inputs[place].const_value
    return held is not None and held.numpy().tolist() == [0]


def _swap(node, order: list[int], parts: list[tuple], axis) -> None:
    """Makes the first axis of a transposed value its second, for it and its parts."""
    import onnx_ir as ir

    node.attributes["perm"] = ir.AttrInt64s("perm", [order[1], order[0], *order[2:]])
    for value in (node.outputs[0], *(piece.outputs[0] for piece, _ in parts)):
        if value.shape is not None:
            first, second, *rest = value.shape
            value.shape = ir.Shape([second, first, *rest])
    for piece, squeeze in parts:
        piece.replace_input_with(3, axis)
        squeeze.replace_input_with(1, axis)


def _axis(graph):
    """The number of the second axis, as a weight of a graph."""
    import onnx_ir as ir

    if (held := graph.initializers.get(SECOND)) is None:
        tensor = ir.tensor([1], dtype=ir.DataType.INT64, name=SECOND)
        held = ir.Value(name=SECOND, const_value=tensor, shape=tensor.shape)
        held.type = ir.TensorType(tensor.dtype)
        graph.register_initializer(held)
    return held


SECOND = "second_axis"
PASSES = (parted_behind_the_batch,)
