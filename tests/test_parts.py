"""Where the weights of a run's networks are drawn."""

import pytest
import torch

from difftrain.language.part import Part
from difftrain.models.tangent_attention import _able
from difftrain.training.parts import drawn

MORE = {"tap": 1, "dropout": 0.1, "times": ("t", "r"), "inputs": ("w", "guess")}
UNET = {"channels": (16, 16), "layers": 1, "heads": 2, "attention": (0,), "groups": 4}
SMALL = {"depth": 1, "width": 32, "heads": 2}
SWITCHES = {"norm": "rms", "mlp": "swiglu", "rotary": True, "qk_norm": True}
NETWORKS = {
    "unet": Part("backbone", "sd_unet", {**UNET, **MORE}),
    "transformer": Part("backbone", "transformer", {**SMALL, **SWITCHES, **MORE}),
    "pixart": Part("backbone", "adapted", {"kind": "pixart", **SMALL, **MORE}),
    "sd3": Part("backbone", "adapted", {"kind": "sd3", **SMALL, **MORE}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_random_networks_are_drawn_where_they_will_be(name):
    network = drawn("meta", NETWORKS[name], size=64)
    devices = {t.device.type for t in (*network.parameters(), *network.buffers())}
    assert devices == {"meta"}


def test_other_parts_are_moved_later():
    encoder = Part("encoder", "clip", {"layers": 1, "width": 16, "heads": 2})
    text = drawn("meta", encoder, vocabulary=[300])
    assert {p.device.type for p in text.parameters()} == {"cpu"}


def _weights(device: str) -> torch.Tensor:
    torch.manual_seed(3)
    network = drawn(device, NETWORKS["transformer"], size=64)
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_a_seed_gives_one_network():
    assert _weights("cpu").equal(_weights("cpu"))


@pytest.mark.gpu
def test_a_gpu_draws_the_same_law():
    ours, theirs = _weights("cuda"), _weights("cpu")
    assert ours.is_cuda and ours.equal(_weights("cuda"))
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.02)
    assert ours.count_nonzero().item() == pytest.approx(theirs.count_nonzero().item(), rel=1e-3)


def test_what_an_operator_needs_is_asked_once():
    marked = torch.compiler.assume_constant_result(lambda: True)
    assert vars(_able) == vars(marked)
