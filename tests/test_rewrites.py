"""What graphs are rewritten to, and that they compute what they did."""

from collections import Counter

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from difftrain.export.modules import Piece
from difftrain.export.onnx import _program
from difftrain.export.rewrites import SECOND

PARTS, HEADS, WIDTH = 3, 2, 8


class Packed(nn.Module):
    """Tokens [B, T, WIDTH] whose q, k and v are parts of one product, parted on `axis`."""

    def __init__(self, order: tuple[int, ...], whole: bool = False):
        super().__init__()
        self.order, self.whole, self.product = order, whole, nn.Linear(WIDTH, PARTS * WIDTH)

    def forward(self, x):
        packed = self.product(x).unflatten(2, (PARTS, HEADS, -1)).permute(*self.order)
        q, k, v = packed.unbind(self.order.index(2))
        made = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return made + packed.sum() if self.whole else made


def graph(module: nn.Module, tmp_path):
    """(model, its answer under onnxruntime, that of the module)."""
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    program = _program("packed", Piece(module.eval(), {"x": x}, {"x": 0}, ("y",)), (1, 4))
    program.save(tmp_path / "a.onnx")
    (ours,) = onnxruntime.InferenceSession(tmp_path / "a.onnx").run(None, {"x": x.numpy()})
    return program.model, ours, module(x).detach().numpy()


@pytest.mark.parametrize("rewritten", [True, False])
def test_what_is_parted_before_the_batch_is_parted_behind_it(tmp_path, rewritten):
    first = (2, 0, 3, 1, 4)
    model, ours, theirs = graph(Packed(first, whole=not rewritten), tmp_path)
    orders = [
        tuple(n.attributes["perm"].as_ints()) for n in model.graph if n.op_type == "Transpose"
    ]
    assert orders[0] == ((0, 2, 3, 1, 4) if rewritten else first)
    assert (SECOND in model.graph.initializers) == rewritten
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_is_parted_behind_the_batch_stays(tmp_path):
    model, ours, theirs = graph(Packed((0, 2, 3, 1, 4)), tmp_path)
    kinds = Counter(node.op_type for node in model.graph)
    assert kinds["Slice"] == kinds["Squeeze"] == PARTS and SECOND not in model.graph.initializers
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
