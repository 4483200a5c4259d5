"""diffusers' transformers as networks."""

import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel

from difftrain.compiler.draws import Draws
from difftrain.language.part import Part
from difftrain.models import build
from difftrain.models.adapters import adapted
from difftrain.models.codec import autoencoder_kl, pixels
from difftrain.models.encoders import t5
from difftrain.models.errors import PartError
from difftrain.models.forward import differentiable
from difftrain.models.labels import label

KINDS = {"pixart": PixArtTransformer2DModel, "sd3": SD3Transformer2DModel}
SMALL = {"depth": 2, "width": 16, "heads": 2, "size": 64}
T, R = torch.tensor([0.3, 0.8]), torch.tensor([0.1, 0.8])
every = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def text():
    return t5(layers=1, width=12, heads=2, length=6, vocabulary=[320])


@pytest.fixture(scope="module")
def codec():
    return autoencoder_kl(weights="", channels=(4, 4, 4, 4), groups=2, layers=1)


def made(kind, text, codec, **options):
    torch.manual_seed(0)
    return adapted(kind=kind, **{**SMALL, **options}, text=text, codec=codec)


def trained(module):
    """The module with every weight drawn: what starts as zero hides what depends on it."""
    torch.manual_seed(1)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return module


X, STATES = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 12)


# ---- the module


def theirs(net, x, t, cond, mask):
    """The answer of diffusers' own forward."""
    if isinstance(net.module, PixArtTransformer2DModel):
        return net.module(x, cond, t, encoder_attention_mask=mask).sample
    mean = (cond * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return net.module(x, cond, net.pool(mean), t).sample


@every
def test_it_answers_as_diffusers_does(kind, text, codec):
    net = trained(made(kind, text, codec, time_scale=10))
    mask = torch.tensor([[1.0] * 6, [1.0] * 3 + [0.0] * 3])
    states = STATES * mask[..., None]
    torch.testing.assert_close(net(X, T, states), theirs(net, X, 10 * T, states, mask))


@every
def test_saved_weights_come_back(tmp_path, kind, text, codec):
    first = trained(made(kind, text, codec))
    first.module.save_pretrained(tmp_path / "transformer")
    loaded = made(kind, text, codec, weights=str(tmp_path))
    assert isinstance(loaded.module, KINDS[kind])
    if kind == "sd3":
        assert loaded.pool.weight.abs().sum() == 0  # what was saved has not seen it
        loaded.pool.load_state_dict(first.pool.state_dict())
    torch.testing.assert_close(loaded(X, T, STATES), first(X, T, STATES))


@every
def test_pretrained_parts_must_fit_each_other(tmp_path, kind, text, codec):
    made(kind, text, codec).module.save_pretrained(tmp_path)
    wide = t5(layers=1, width=20, heads=2, vocabulary=[320])
    with pytest.raises(PartError, match="reads text of width 12, but the text encoder gives 20"):
        made(kind, wide, codec, weights=str(tmp_path))
    with pytest.raises(PartError, match="takes 4 latent channels, but the codec makes 3"):
        made(kind, text, pixels(), weights=str(tmp_path))


def test_learned_variances_are_left_out_and_sizes_are_told(tmp_path, text, codec):
    PixArtTransformer2DModel(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=12,
        sample_size=8,
        out_channels=8,
        use_additional_conditions=True,
    ).save_pretrained(tmp_path)
    net = made("pixart", text, codec, weights=str(tmp_path))
    sizes = {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
    expected = net.module(X, STATES, T, added_cond_kwargs=sizes).sample[:, :4]
    torch.testing.assert_close(net(X, T, STATES), expected)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"heads": 3}, "a width of 16 cannot be split over 3 heads"),
        ({"width": 18, "heads": 3}, "a width of 18 holds no positions of two axes"),
        ({"patch": 3}, "latents of 8 x 8 cannot be cut into patches of 3"),
        ({"tap": 3}, "there is no block 3 to tap: the blocks are 1 to 2"),
        ({"inputs": ("mask",)}, "cannot be given `mask`: its `inputs` may be"),
        ({"text": label(count=3)}, "this network reads text: give it a text encoder"),
        ({"kind": "other"}, "there is no network `other` here: use one of pixart, sd3"),
    ],
)
def test_what_does_not_fit_is_told(text, codec, options, said):
    with pytest.raises(PartError, match=said):
        adapted(**{"kind": "pixart", **SMALL, "text": text, "codec": codec, **options})


@every
def test_a_part_is_built_with_what_is_around_it(kind, text, codec):
    options = {**SMALL, "kind": kind, "times": ("t",), "inputs": ()}
    net = build(Part("backbone", "adapted", options), text=text, codec=codec, size=32)
    assert net.tap_grid == (2, 2) and net.tap_width == 16


# ---- the frame


@every
def test_further_times_and_inputs_add_nothing_at_first_and_count_once_trained(kind, text, codec):
    one = made(kind, text, codec)
    two = made(kind, text, codec, times=("t", "r"), inputs=("w", "guess"))
    given = {"r": R, "w": torch.tensor([1.0, 7.5]), "guess": X + 1}
    two.load_state_dict({**two.state_dict(), **_fitting(one, two)})
    torch.testing.assert_close(two(X, T, STATES, **given), one(X, T, STATES))
    trained(two)
    for name in given:
        other = {**given, name: given[name] / 2}
        assert not torch.equal(two(X, T, STATES, **given), two(X, T, STATES, **other)), name


def _fitting(one, two) -> dict:
    """The weights of one that two has too, filled up with zeros where it has more channels."""
    wide = two.state_dict()
    state = {name: value.clone() for name, value in one.state_dict().items()}
    for name, value in state.items():
        if value.shape != wide[name].shape:
            state[name] = torch.cat([value, torch.zeros_like(value)], dim=1)
    return state


@every
def test_a_tap_gives_the_tokens_after_a_block(kind, text, codec):
    output, tokens = made(kind, text, codec, tap=1)(X, T, STATES)
    assert output.shape == X.shape and tokens.shape == (2, 16, 16)
    last = made(kind, text, codec, tap=2)(X, T, STATES)[1]
    assert not torch.equal(tokens, last)


@every
def test_equal_masks_give_equal_outputs(kind, text, codec):
    net = made(kind, text, codec, dropout=0.5)
    outputs = [net(X, T, STATES, masks=Draws(0, step, torch.arange(2))) for step in (0, 0, 1)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_plain_attention_is_the_same_function_with_a_second_attention():
    shape = {"num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2, "sample_size": 8}
    widths = {"joint_attention_dim": 12, "caption_projection_dim": 8, "pooled_projection_dim": 8}
    net = SD3Transformer2DModel(
        **shape, **widths, in_channels=4, qk_norm="rms_norm", dual_attention_layers=(0,)
    )
    trained(net)
    given = (X, STATES, torch.randn(2, 8), T)
    expected = net(*given).sample
    differentiable(net)
    torch.testing.assert_close(net(*given).sample, expected)


EVERYTHING = {"times": ("t", "r"), "inputs": ("w", "guess"), "tap": 1, "forward_mode": True}


@every
def test_everything_traces_as_one_graph_with_its_derivative(kind, text, codec):
    net = trained(made(kind, text, codec, **EVERYTHING))

    def moving(x, t):
        def at(x, t):
            return net(x, t, STATES, r=R, w=T, guess=X)[0]

        return torch.func.jvp(at, (x, t), (torch.ones_like(x), torch.ones_like(t)))

    whole = torch.compile(moving, fullgraph=True, backend="eager")
    for ours, traced in zip(moving(X, T), whole(X, T), strict=True):
        torch.testing.assert_close(traced, ours, rtol=1e-4, atol=1e-4)
    slope = moving(X, T)[1]
    near = [net(X + h, T + h, STATES, r=R, w=T, guess=X)[0] for h in (1e-2, -1e-2)]
    torch.testing.assert_close(slope, (near[0] - near[1]) / 2e-2, rtol=0.05, atol=0.05)


@every
def test_the_backward_pass_traces(kind, text, codec):
    net = made(kind, text, codec, **{**EVERYTHING, "forward_mode": False})

    def called(x, t):
        return net(x, t, STATES, r=R, w=T, guess=X)

    whole = torch.compile(called, fullgraph=True, backend="aot_eager")
    for ours, traced in zip(called(X, T), whole(X, T), strict=True):
        torch.testing.assert_close(traced, ours, rtol=1e-4, atol=1e-5)
    sum(part.square().mean() for part in whole(X, T)).backward()
    assert all(p.grad is not None for p in net.parameters())
