"""Modules around one buffer of weights."""

import torch
from torch import nn

from difftrain.compiler.layout import gather, layout


class Tied(nn.Module):
    """Two layers with one weight, `x W^T W^T`."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Linear(3, 3, bias=False) for _ in range(2))
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def test_a_weight_under_two_names_is_one_weight():
    modules = {"student": Tied(), "text": nn.Linear(3, 3)}
    plan = layout(modules)
    flat = gather(modules, plan, "cpu")
    assert plan.size == 9 + 12 and plan.tied == {"student"}
    other, x = torch.randn_like(flat), torch.randn(2, 3)
    weight = plan.named(other)["student.first.weight"]
    assert plan.bind(modules, plan.views(other))["student"](x).allclose(x @ weight.T @ weight.T)
    wanted = torch.func.grad(lambda w: (x @ w.T @ w.T).sum())(weight)
    found = torch.func.grad(lambda f: plan.bind(modules, plan.views(f))["student"](x).sum())(other)
    assert plan.named(found)["student.first.weight"].allclose(wanted, atol=1e-5)
