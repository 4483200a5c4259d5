"""The frame around diffusers' UNets."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from difftrain.compiler.draws import Draws
from difftrain.models.codec import pixels
from difftrain.models.errors import PartError
from difftrain.models.labels import label
from difftrain.models.text import clip
from difftrain.models.unet import sd_unet

SMALL = {"channels": (8, 16), "layers": 1, "heads": 2, "groups": 4, "size": 64}
X, T, R = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([0.1, 0.8])
STATES = torch.randn(2, 8, 16)


@pytest.fixture(scope="module")
def text():
    return clip(layers=1, width=16, heads=2, length=8, vocabulary=[320])


def made(text, seed: int = 0, **options):
    torch.manual_seed(seed)
    return sd_unet(**{**SMALL, **options}, text=text)


def trained(module):
    """The module with every weight drawn: what starts as zero hides what depends on it."""
    torch.manual_seed(1)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return module


# ---- further times and inputs


def test_a_second_time_adds_nothing_at_first_and_counts_once_trained(text):
    one, two = made(text), made(text, times=("t", "r"))
    torch.testing.assert_close(two(X, T, STATES, r=R), one(X, T, STATES))
    trained(two)
    assert not torch.equal(two(X, T, STATES, r=R), two(X, T, STATES, r=R / 2))


def test_a_second_time_is_embedded_as_its_distance(text):
    net = trained(made(text, times=("t", "r"), time_scale=10))
    net.module.time_embedding.linear_1.weight.data.zero_()  # t itself is not seen
    moved = net(X, T + 0.1, STATES, r=R + 0.1)
    torch.testing.assert_close(net(X, T, STATES, r=R), moved, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "inputs, extra",
    [(("w",), {"w": torch.tensor([1.0, 7.5])}), (("lcm.guess",), {"guess": X + 1})],
)
def test_further_inputs_add_nothing_at_first_and_count_once_trained(text, inputs, extra):
    one, two = made(text), made(text, inputs=inputs)
    torch.testing.assert_close(two(X, T, STATES, **extra), one(X, T, STATES))
    trained(two)
    other = {name: value / 2 for name, value in extra.items()}
    assert not torch.equal(two(X, T, STATES, **extra), two(X, T, STATES, **other))


def test_a_scale_is_seen_as_in_diffusers(text):
    net = trained(made(text, inputs=("w",)))
    w, waves = torch.tensor([1.0, 7.5]), torch.arange(128) / 127
    turns = 1000 * w[:, None] * 1e4**-waves
    told = torch.cat([turns.sin(), turns.cos()], 1)
    expected = net.module(X, T, STATES, timestep_cond=told).sample
    torch.testing.assert_close(net(X, T, STATES, w=w), expected)


@pytest.mark.parametrize("saved", [("w", "guess"), ()])
def test_a_saved_network_gets_what_it_lacks_and_keeps_what_it_has(tmp_path, text, saved):
    first = trained(made(text, inputs=saved))
    first.module.save_pretrained(tmp_path)
    loaded = sd_unet(weights=str(tmp_path), text=text, inputs=("w", "guess"))
    given = {"w": T, "guess": X}
    asked = given if saved else {}
    torch.testing.assert_close(loaded(X, T, STATES, **given), first(X, T, STATES, **asked))


def test_other_inputs_are_refused(text):
    with pytest.raises(PartError, match="cannot be given `mask`: its `inputs` may be"):
        made(text, inputs=("mask",))


# ---- taps


@pytest.mark.parametrize("side", [8, 7])
def test_a_tap_gives_the_middle_as_tokens(text, side):
    net = made(text, tap=1, size=8 * side)
    output, tokens = net(X[..., :side, :side], T, STATES)
    assert output.shape == (2, 4, side, side)
    assert tokens.shape == (2, 16, net.tap_width) and net.tap_grid == (4, 4)
    tokens.mean().backward()
    assert net.module.conv_in.weight.grad is not None


# ---- other conditions


def test_labels_are_embedded(tmp_path):
    classes = label(count=3)
    net = trained(sd_unet(**SMALL, text=classes))
    one, none = classes.ids(["1", "2"]), classes.ids(["", ""])
    assert isinstance(net.module, UNet2DModel) and not torch.equal(net(X, T, one), net(X, T, none))
    torch.testing.assert_close(net(X, T, one), net.module(X, T, one[:, 0]).sample)
    net.module.save_pretrained(tmp_path)
    again = sd_unet(weights=str(tmp_path), text=classes)
    torch.testing.assert_close(again(X, T, one), net(X, T, one))
    with pytest.raises(PartError, match="knows 4 classes, the null class counted in, and here it"):
        sd_unet(weights=str(tmp_path), text=())


def test_no_encoder_makes_a_network_without_condition(tmp_path):
    net = sd_unet(**SMALL, text=(), codec=pixels())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net(x, T), net.module(x, T).sample)
    net(x, T).square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.module.save_pretrained(tmp_path)
    torch.testing.assert_close(sd_unet(weights=str(tmp_path), text=())(x, T), net(x, T))


def test_networks_that_need_more_are_refused(tmp_path, text):
    shape = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    levels = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    UNet2DConditionModel(
        **shape, **levels, cross_attention_dim=16, center_input_sample=True
    ).save_pretrained(tmp_path)
    with pytest.raises(PartError, match=r"needs more than x, t and a condition \(`center_input_s"):
        sd_unet(weights=str(tmp_path), text=text)


# ---- dropout, forward mode, compilation


def draws(step: int) -> Draws:
    return Draws(0, step, torch.arange(2))


def test_equal_masks_give_equal_outputs(text):
    net = made(text, dropout=0.5)
    first = net(X, T, STATES, masks=draws(0))
    assert torch.equal(first, net(X, T, STATES, masks=draws(0)))
    assert not torch.equal(first, net(X, T, STATES, masks=draws(1)))
    torch.testing.assert_close(net(X, T, STATES), made(text)(X, T, STATES))


def test_plain_attention_is_the_same_function(text):
    fused, plain = made(text), made(text, forward_mode=True)
    torch.testing.assert_close(plain(X, T, STATES), fused(X, T, STATES))


ONE_LEVEL = {"channels": (8,), "attention": (0,)}  # tracing takes its time
EVERYTHING = {"times": ("t", "r"), "inputs": ("w", "guess"), "tap": 1, "dropout": 0.3}


def test_everything_traces_as_one_graph_with_its_derivative(text):
    net = trained(made(text, **EVERYTHING, **ONE_LEVEL, forward_mode=True))

    def moving(x, t, masks):
        def at(x, t):
            return net(x, t, STATES, r=R, w=T, guess=X, masks=masks)[0]

        return torch.func.jvp(at, (x, t), (torch.ones_like(x), torch.ones_like(t)))

    whole = torch.compile(moving, fullgraph=True, backend="eager")
    for theirs, ours in zip(whole(X, T, draws(0)), moving(X, T, draws(0)), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    value, slope = moving(X, T, draws(0))
    near = [net(X + h, T + h, STATES, r=R, w=T, guess=X, masks=draws(0))[0] for h in (1e-2, -1e-2)]
    torch.testing.assert_close(slope, (near[0] - near[1]) / 2e-2, rtol=0.05, atol=0.05)
    (value.square().mean() + slope.square().mean()).backward()


CONDITIONS = {
    "text": (STATES, None),
    "labels": (torch.tensor([[0], [3]]), label(count=3)),
    "none": (None, ()),
}


@pytest.mark.parametrize("kind", CONDITIONS)
def test_the_backward_pass_traces(text, kind):
    cond, encoder = CONDITIONS[kind]
    options = {**EVERYTHING, **ONE_LEVEL, "dropout": 0.0}
    net = made(text if encoder is None else encoder, **options)

    def called(x, t):
        return net(x, t, cond, r=R, w=T, guess=X)

    whole = torch.compile(called, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(called(X, T), whole(X, T), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    whole(X, T)[0].square().mean().backward()
    assert all(p.grad is not None for p in net.parameters())
