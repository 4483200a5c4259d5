"""Matrix products of eight bits: their numbers, their gradients, and where they are taken."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from difftrain.models import eight
from difftrain.models.eight import Linear, Small, columns, perceptron, product, rows, turned
from difftrain.models.errors import PartError
from difftrain.models.transformer import transformer


def random(*shape, seed=0):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(torch.bfloat16)


def layer(width=32, out=48):
    torch.manual_seed(0)
    made = Linear(width, out).to(torch.bfloat16)
    made.eight = True
    return made


def whole(x: Small) -> torch.Tensor:
    return x.numbers.double() * x.scale


def apart(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


# ---- numbers


def test_every_row_has_its_own_scale():
    x = random(4, 64) * torch.tensor([1e-20, 1.0, 1e20, 0.0])[:, None]
    small = rows(x)
    greatest = small.numbers.float().abs().amax(dim=1)
    assert greatest[3] == 0 and ((greatest[:3] >= 128) & (greatest[:3] < 256)).all()
    assert (small.scale.log2() % 1 == 0).all()
    # half of the last of three bits; below 2**-6 the last bit stays where it is
    allowed = (x.double().abs() * 2**-4).maximum(small.scale * 2**-10)
    assert (whole(small) - x.double()).abs().le(allowed).all()


def test_rows_may_look_at_something_greater():
    y = 4 * random(64, 64)
    gate, slope = eight._gate(y.float()), eight._slope(y.float())
    for x in (y.float() * gate, y.float() * slope):
        small = rows(x, within=y)
        assert small.numbers.float().abs().max() < 448
        assert apart(whole(small), x.double()) < 3e-2


def test_gelu_and_its_slope_are_those_of_torch():
    y = torch.linspace(-9, 9, 4001, dtype=torch.float64, requires_grad=True)
    expected = F.gelu(y, approximate="tanh")
    (slope,) = torch.autograd.grad(expected.sum(), y)
    assert torch.allclose(y * eight._gate(y), expected, atol=1e-12)
    assert torch.allclose(eight._slope(y), slope, atol=1e-12) and slope.abs().max() < 1.13


def test_numbers_that_are_turned_are_the_same():
    x = random(10, 64) * torch.tensor([2.0**-k for k in range(10)])[:, None]
    small, beside = rows(x), columns(rows(x))
    assert beside.numbers.shape == (64, 16) and beside.scale.shape == (1, 1)
    exact = whole(small).t()
    assert (whole(beside)[:, :10] - exact).abs().max() <= small.scale.max() * 2**-10
    assert torch.equal(whole(beside)[:, :5], exact[:, :5])
    assert not whole(beside)[:, 10:].any()


# ---- layers


def test_a_layer_answers_near_what_bf16_does():
    made, x = layer(), random(2, 5, 32)
    exact = nn.functional.linear(x.double(), made.weight.double(), made.bias.double())
    answer = made(x)
    assert answer.shape == (2, 5, 48) and answer.dtype == torch.bfloat16
    assert 1e-3 < apart(answer, exact) < 5e-2


def test_gradients_are_products_of_the_numbers_that_were_multiplied():
    made, x, along = layer(), random(10, 32, seed=1), random(10, 48, seed=2)
    x.requires_grad_()
    made(x).backward(along)
    gradient, small, weight = rows(along), rows(x.detach()), rows(made.weight.detach())
    exact = whole(gradient) @ whole(weight)
    assert apart(x.grad, exact) < 4e-3  # what an answer in bf16 is rounded by
    assert apart(made.weight.grad, whole(gradient).t() @ whole(small)) < 4e-3
    assert apart(made.bias.grad, whole(gradient).sum(dim=0)) < 4e-3


def both(width=32, hidden=128):
    return layer(width, hidden), layer(hidden, width)


def gelu(x, first, second):
    return second(F.gelu(first(x), approximate="tanh"))


@pytest.mark.parametrize("way", [perceptron, gelu])
def test_a_perceptron_and_its_gradients_are_near_those_of_float64(way):
    found, exact = (told(way, torch.bfloat16), told(gelu, torch.float64))
    errors = [apart(a, b) for a, b in zip(found, exact, strict=True)]
    assert max(errors) < 7e-2 and min(errors) > 5e-3, errors


def told(way, dtype) -> list[torch.Tensor]:
    """What a perceptron answers, and the gradients of x and of its weights."""
    layers = [made.to(dtype) for made in both()]
    x = random(50, 32, seed=3).to(dtype).requires_grad_()
    answer = way(x, *layers)
    given = (x, *(p for made in layers for p in made.parameters()))
    return [answer, *torch.autograd.grad(answer, given, random(50, 32, seed=4).to(dtype))]


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = both()

    def forward(self, x):
        return perceptron(x, self.first, self.second)


def gradients(made: nn.Module, free):
    """Of a loss, by the names of weights and of x, and what they are taken at."""
    given = {"x": random(6, 32), **{name: p.detach() for name, p in made.named_parameters()}}

    def loss(free):
        weights = {**given, **free}
        x = weights.pop("x")
        return torch.func.functional_call(made, weights, (x,)).float().square().mean()

    return torch.func.grad(loss), {n: given[n] for n in given if n in free or not free}


@pytest.mark.parametrize(
    ("make", "free"),
    [
        (layer, ("weight", "bias")),
        (layer, ("x",)),
        (layer, ()),
        (Perceptron, ("first.weight",)),
        (Perceptron, ()),
    ],
)
def test_functional_gradients_are_traced_whole(make, free):
    taken, chosen = gradients(make(), free)
    expected = taken(chosen)
    torch._dynamo.reset()
    traced = torch.compile(taken, fullgraph=True, backend="aot_eager")(chosen)
    assert all(torch.equal(traced[n], expected[n]) for n in chosen)
    assert all(expected[n].abs().sum() > 0 for n in chosen)


def test_weights_in_fp32_are_multiplied_as_ever():
    made, x = Linear(32, 48), torch.randn(3, 32)
    made.eight = True
    assert torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias))


def test_products_of_the_blocks_are_turned_and_no_others():
    network = turned(transformer(depth=1, width=32, heads=2))
    names = [n for n, m in network.named_modules() if getattr(m, "eight", False)]
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert names == [f"blocks.0.{part}" for part in parts]


class Called(TorchDispatchMode):
    """Collects the names of the operators that are called in it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_perceptron_of_a_block_is_one_operator_where_nothing_drops_out(dropout):
    network = turned(transformer(depth=1, width=32, heads=2, dropout=dropout)).bfloat16()
    with torch.no_grad(), Called() as called:
        network.blocks[0].mlp(random(1, 4, 32))
    assert called.names.count("difftrain.eight_product.default") == 2
    assert ("aten.gelu.default" in called.names) == (dropout > 0)


def test_odd_widths_stay_as_they_are():
    network = turned(transformer(depth=1, width=64, heads=2, mlp="swiglu"))
    names = [n for n, m in network.named_modules() if getattr(m, "eight", False)]
    assert names == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]


def test_a_network_without_such_products_is_refused():
    for network in (nn.Linear(16, 16), transformer(depth=1, width=24, heads=2)):
        with pytest.raises(PartError, match="for the blocks of our transformers"):
            turned(network)


def test_an_older_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(PartError, match="capability 8.9, and this one has 8.0: leave it out"):
        eight._able(torch.device("cuda"))


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("way", [rows, lambda x: columns(rows(x.t().contiguous()))])
def test_a_gpu_multiplies_the_same_numbers(way):
    a, b = way(random(96, 64)), way(random(48, 64, seed=1))
    there = product(*(Small(*(x.cuda() for x in part)) for part in (a, b))).cpu()
    assert torch.allclose(there.float(), product(a, b).float(), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [layer, Perceptron])
def test_a_gpu_compiles_the_same_gradients(make):
    made = make()
    taken, chosen = gradients(made, ())
    expected = taken(chosen)
    torch._dynamo.reset()
    there = {name: x.cuda() for name, x in chosen.items()}
    found = torch.compile(taken, fullgraph=True)(there)
    assert all(apart(found[n].cpu().float(), expected[n].float()) < 2e-2 for n in chosen)
