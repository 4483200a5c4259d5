"""Modules around one buffer of weights."""

import pytest
import torch
from torch import nn

from difftrain.compiler.layout import gather, layout
from difftrain.compiler.whole import Step


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


class Odd(nn.Module):
    """Weights of products and others, some of a size that is no multiple of eight."""

    def __init__(self, sides, others):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sides, sides[1:], strict=False))
        self.others = nn.ParameterList(torch.randn(size) for size in others)


@pytest.mark.parametrize(
    ("sides", "others", "products", "parts"),
    [
        ((16, 3, 8), (5, 16), 16 * 3 + 3 * 8 + 8, 2),  # 3 biases are no product's
        ((8, 8), (), 72, 1),
        ((), (3, 8), 0, 1),
    ],
)
def test_a_buffer_is_cut_and_comes_back(sides, others, products, parts):
    modules = {"student": Odd(sides, others)}
    plan = layout(modules)
    flat = gather(modules, plan, "cpu")
    assert plan.products == products and plan.size == len(flat)
    starts = {slot.name: slot.start for slot in plan.slots}
    aligned = [start % 8 == 0 for start in starts.values()]
    assert aligned == sorted(aligned, reverse=True)
    state = {"weights": flat, "half": flat.bfloat16()}
    buffers = plan.buffers(state)
    assert len(buffers) == parts and sum(map(len, buffers)) == len(flat)
    again = plan.flat(plan.read(state)["weights"], cut=True)
    assert [a.dtype for a in again] == [b.dtype for b in buffers]
    assert all(map(torch.equal, again, buffers))
    (whole,) = plan.flat(plan.views(flat), cut=False)
    assert torch.equal(whole, flat)


def test_a_step_reads_the_state_that_it_is_given():
    modules = {"student": nn.Linear(8, 8)}
    plan = layout(modules)

    def gradient(read, state, batch, modules, plan, tables):
        return plan.flat(read["weights"], cut=False), {}

    step = Step(gradient, lambda state, parts: {"sum": parts[0].sum()})
    one, other = ({"weights": torch.full((plan.size,), value)} for value in (1.0, 2.0))
    sums = [step(state, {}, modules, plan, {})["sum"].item() for state in (one, other, one)]
    one["weights"].mul_(3)  # in place, as a checkpoint is read
    sums.append(step(one, {}, modules, plan, {})["sum"].item())
    assert sums == [72, 144, 72, 216]
