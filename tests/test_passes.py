"""Every pass keeps every value; what each ensures; forwards; printing."""

import pytest
import torch
from objectives import ALL, Tiny, batch, declared, draws

from difftrain.compiler.interpret import interpret
from difftrain.graph.build import build
from difftrain.graph.passes import PASSES

WANTED = ("loss", "xt", "target", "pred")


def near(before: dict, after: dict, tolerance: float = 1e-12):
    """The same numbers, to rounding: cancelling a product changes the order of its factors."""
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ALL)
def test_every_pass_keeps_every_value(name):
    graph = build(declared(ALL[name]), WANTED)
    given, net = batch(), {"student": Tiny()}
    before = interpret(graph, given, draws(), net)
    for change in PASSES:
        graph = change(graph)
        after = interpret(graph, given, draws(), net)
        assert after.keys() >= set(WANTED), change.__name__
        near(before, after)
