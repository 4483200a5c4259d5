"""Matrix products of eight bits: their numbers, their gradients, and where they are taken."""

import pytest
import torch
from torch import nn

from difftrain.models import eight
from difftrain.models.eight import Linear, product, rows, turned
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


def test_every_row_has_its_own_scale():
    x = random(4, 64) * torch.tensor([1e-20, 1.0, 1e20, 0.0])[:, None]
    small, scale = rows(x)
    assert small.float().abs().amax(dim=1).tolist() == [448, 448, 448, 0]
    back = small.float() * scale
    # half of the last of three bits; below 2**-6 of 448 the last bit stays where it is
    allowed = (x.float().abs() * 2**-4).maximum(scale * 2**-10)
    assert (back - x.float()).abs().le(allowed).all()


def test_a_layer_answers_near_what_bf16_does():
    made, x = layer(), random(2, 5, 32)
    exact = nn.functional.linear(x.double(), made.weight.double(), made.bias.double())
    answer = made(x)
    assert answer.shape == (2, 5, 48) and answer.dtype == torch.bfloat16
    assert 1e-3 < (answer - exact).norm() / exact.norm() < 5e-2


def test_gradients_are_products_too_but_that_of_the_weight():
    made, x, along = layer(), random(10, 32, seed=1), random(10, 48, seed=2)
    x.requires_grad_()
    made(x).backward(along)
    (a, scale_a), (b, scale_b) = rows(along), rows(made.weight.detach().t())
    assert torch.equal(x.grad, product(a, b, scale_a, scale_b))
    assert torch.equal(made.weight.grad, along.t() @ x.detach())
    assert torch.equal(made.bias.grad, along.sum(dim=0))


def test_a_gradient_is_near_that_of_bf16():
    made, x = layer(), random(10, 32, seed=1).requires_grad_()
    plain = x.detach().clone().requires_grad_()
    made(x).float().square().sum().backward()
    nn.functional.linear(plain, made.weight, made.bias).float().square().sum().backward()
    assert (x.grad - plain.grad).norm() < 6e-2 * plain.grad.norm()


@pytest.mark.parametrize("free", [("weight", "bias"), ("x",), ("x", "weight", "bias")])
def test_functional_gradients_are_traced_whole(free):
    made = layer()
    given = {"x": random(6, 32), **{name: p.detach() for name, p in made.named_parameters()}}

    def loss(free):
        weights = {**given, **free}
        x = weights.pop("x")
        return torch.func.functional_call(made, weights, (x,)).float().square().mean()

    chosen = {name: given[name] for name in free}
    expected = torch.func.grad(loss)(chosen)
    torch._dynamo.reset()
    traced = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")(chosen)
    assert all(torch.equal(traced[n], expected[n]) for n in free)
    assert all(expected[n].abs().sum() > 0 for n in free)


def test_weights_in_fp32_are_multiplied_as_ever():
    made, x = Linear(32, 48), torch.randn(3, 32)
    made.eight = True
    assert torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias))


def test_products_of_the_blocks_are_turned_and_no_others():
    network = turned(transformer(depth=1, width=32, heads=2))
    names = [n for n, m in network.named_modules() if getattr(m, "eight", False)]
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert names == [f"blocks.0.{part}" for part in parts]


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


@pytest.mark.gpu
def test_a_gpu_multiplies_the_same_numbers():
    (a, scale_a), (b, scale_b) = rows(random(96, 64)), rows(random(48, 64, seed=1))
    bias = random(48, seed=2)
    given = (a, b, scale_a, scale_b, bias)
    there = product(*(x.cuda() for x in given)).cpu().float()
    assert torch.allclose(there, product(*given).float(), rtol=1e-2, atol=1e-2)
