import copy

import pytest
import torch
from torch import nn

from difftrain.compiler.draws import Draws
from difftrain.models.dropout import WORD, Dropout, hashed, install

INDEX = torch.arange(6)


class Foreign(nn.Module):
    """A network as others write them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 8))
        self.last = nn.Dropout(0.1)

    def forward(self, x):
        return self.last(self.layers(x))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Foreign()


def draws(step: int = 3) -> Draws:
    return Draws(7, step, INDEX)


def called(network, masks, x, given):
    with masks.handed(given):
        return network(x)


def test_every_dropout_is_replaced_and_named(network):
    install(network, 0.2)
    made = {name: m for name, m in network.named_modules() if isinstance(m, Dropout)}
    assert {m.stream for m in made.values()} == {"dropout.layers.1", "dropout.last"}
    assert not any(isinstance(m, nn.Dropout) for m in network.modules())


def test_equal_draws_are_equal_masks(network):
    masks, x = install(network, 0.5), torch.randn(6, 8)
    first, second = (called(network, masks, x, draws()) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, called(network, masks, x, draws(step=4)))
    assert not torch.equal(first, called(network, masks, x, None))


def test_masks_go_when_a_call_ends(network):
    masks, x = install(network, 0.5), torch.randn(6, 8)
    with pytest.raises(RuntimeError, match="shapes"):
        called(network, masks, torch.randn(6, 9), draws())
    assert masks.key is None
    plain = network.layers[2](network.layers[0](x))
    assert torch.equal(network(x), plain)


def test_a_sample_has_its_mask_whatever_the_batch(network):
    masks, x = install(network, 0.5), torch.randn(6, 8)
    whole = called(network, masks, x, draws())
    part = called(network, masks, x[2:4], Draws(7, 3, INDEX[2:4]))
    torch.testing.assert_close(part, whole[2:4])


def test_rate_and_mean():
    network = nn.Sequential(nn.Dropout())
    masks = install(network, 0.3)
    out = called(network, masks, torch.ones(6, 20_000), draws())
    assert (out == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert out.mean().item() == pytest.approx(1, abs=0.01)


def test_hashes_are_one_to_one_and_change_in_half_of_their_bits():
    words = torch.arange(1 << 16)
    assert len(hashed(words).unique()) == len(words) and hashed(words).max() < WORD
    bits = torch.arange(31)
    changed = (hashed(words) ^ hashed(words ^ 1))[:, None] >> bits & 1
    torch.testing.assert_close(changed.float().mean(0), torch.full((31,), 0.5), atol=0.02, rtol=0)


def test_masks_of_layers_samples_and_places_are_independent():
    network = nn.Sequential(nn.Dropout(), nn.Dropout())
    masks, ones = install(network, 0.5), torch.ones(64, 4096)
    first, second = (called(layer, masks, ones, Draws(7, 3, torch.arange(64))) for layer in network)
    pairs = [(first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])]
    for one, other in pairs:  # each a correlation of 262,000 numbers
        assert abs(((one - 1) * (other - 1)).mean().item()) < 0.01


def test_rate_0_is_no_dropout(network):
    masks, x = install(network, 0), torch.randn(6, 8)
    assert torch.equal(called(network, masks, x, draws()), network(x))
    assert not any(isinstance(m, Dropout) for m in network.modules())


def test_a_copy_has_masks_of_its_own(network):
    network.masks = install(network, 0.5)
    other = copy.deepcopy(network)
    assert other.last.masks is other.layers[1].masks is other.masks is not network.masks


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_traces_with_gradient_and_tangent(backend):
    network = nn.Sequential(nn.Linear(8, 8), nn.Dropout())
    masks, x = install(network, 0.5), torch.randn(6, 8)

    def step(x, index):
        given = Draws(7, torch.tensor(3), index)

        def loss(x):
            value, tangent = torch.func.jvp(
                lambda x: called(network, masks, x, given), (x,), (torch.ones_like(x),)
            )
            return (value * tangent).sum()

        return torch.func.grad(loss)(x)

    whole = torch.compile(step, fullgraph=True, backend=backend)
    torch.testing.assert_close(whole(x, INDEX), step(x, INDEX))
