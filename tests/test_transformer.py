import itertools

import pytest
import torch
from torch import nn

from difftrain.compiler.draws import Draws
from difftrain.language.check import check
from difftrain.language.spec import Source
from difftrain.models import build
from difftrain.models.attention import attend
from difftrain.models.embedding import Patches, picture, positions
from difftrain.models.errors import PartError
from difftrain.models.transformer import Transformer, transformer

SIZES = {"depth": 2, "width": 32, "heads": 4, "patch": 2, "size": 64}
LIGHT = {"norm": "rms", "mlp": "swiglu", "rotary": True, "qk_norm": True}
EXTRAS = {"times": ("t", "r"), "inputs": ("lcm.w", "guess"), "tap": 1, "dropout": 0.25}


class Labels:
    classes, width = 10, 0


class Text:
    width = 12


CONDITIONS = {"classes": Labels(), "text": Text(), "none": None}


def alive(network: Transformer) -> Transformer:
    """Itself, with no weight at 0."""
    for p in network.parameters():
        nn.init.normal_(p, std=0.2)
    return network


def tiny(**options) -> Transformer:
    torch.manual_seed(0)
    return alive(transformer(**{**SIZES, "text": Labels(), **options}))


def condition(of: str, batch: int = 3):
    return {
        "classes": torch.tensor([[1], [7], [10]])[:batch],
        "text": torch.randn(batch, 5, 12),
        "none": None,
    }[of]


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(3, 4, 8, 8)


@pytest.fixture
def t():
    return torch.tensor([0.1, 0.5, 0.9])


# ---- pieces


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_are_a_convolution(x, patch):
    made = Patches(4, 6, patch)
    torch.testing.assert_close(made(x), made.proj(x).flatten(2).transpose(1, 2))


def test_patches_and_pictures_are_inverse():
    x = torch.randn(2, 3, 4, 6)
    made = Patches(3, 12, 2)
    with torch.no_grad():  # every patch as it is, with the channel fastest
        made.proj.weight.copy_(torch.eye(12).view(2, 2, 3, 12).permute(3, 2, 0, 1))
        made.proj.bias.zero_()
    torch.testing.assert_close(picture(made(x), (2, 3), 2), x)


@pytest.mark.parametrize("shapes", [(9, 9), (9, 5)], ids=str)
def test_plain_attention_is_the_fused_one(shapes):
    q, k, v = (torch.randn(2, 3, n, 8) for n in (shapes[0], shapes[1], shapes[1]))
    torch.testing.assert_close(attend(q, k, v, fused=False), attend(q, k, v, fused=True))


def test_positions_tell_rows_from_columns():
    made = positions((2, 3), 8, "cpu", torch.float32).unflatten(0, (2, 3))
    across, down = made[..., :4], made[..., 4:]
    assert torch.equal(across[0], across[1]) and not torch.equal(across[:, 0], across[:, 1])
    assert torch.equal(down[:, 0], down[:, 2]) and not torch.equal(down[0], down[1])


# ---- the contract


@pytest.mark.parametrize("of, switches", list(itertools.product(CONDITIONS, [{}, LIGHT])), ids=str)
def test_it_answers_in_the_shape_of_x(x, t, of, switches):
    network = tiny(text=CONDITIONS[of], **switches)
    assert network(x, t, condition(of)).shape == x.shape
    wide = torch.randn(3, 4, 4, 12)  # another size than it was made for
    assert network(wide, t, condition(of)).shape == wide.shape


@pytest.mark.parametrize("tap", [1, 2])
def test_a_tap_is_the_tokens_after_a_block(x, t, tap):
    network = tiny(tap=tap)
    seen = {}
    network.blocks[tap - 1].register_forward_hook(lambda m, args, out: seen.update(tokens=out))
    output, tokens = network(x, t, condition("classes"))
    assert torch.equal(tokens, seen["tokens"]) and output.shape == x.shape
    assert tokens.shape == (3, 16, network.tap_width) and network.tap_grid == (4, 4)


def test_it_takes_the_channels_and_the_side_of_its_codec(x, t):
    class Codec:
        def shape(self, size):
            return 7, size // 16, size // 16

    network = tiny(codec=Codec(), size=128, tap=1)
    output, _ = network(torch.randn(3, 7, 8, 8), t, condition("classes"))
    assert output.shape[1] == 7 and network.tap_grid == (4, 4)


@pytest.mark.parametrize("of", CONDITIONS)
def test_it_begins_by_saying_nothing(x, t, of):
    torch.manual_seed(0)
    network = transformer(**SIZES, text=CONDITIONS[of])
    assert not network(x, t, condition(of)).any()


def test_random_weights_depend_on_the_seed_alone():
    first, second = (tiny().state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_its_beginning_is_finite_and_of_the_published_size():
    torch.manual_seed(0)
    network = transformer(**{**SIZES, "width": 256}, text=Labels(), **LIGHT)
    weights = network.state_dict()
    assert all(value.isfinite().all() for value in weights.values())
    assert weights["t_embedder.mlp.0.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert weights["y_embedder.embedding_table.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    qkv = weights["blocks.0.attn.qkv.weight"]  # uniform to sqrt(6 / (in + out))
    assert qkv.abs().max().item() == pytest.approx((6 / 1024) ** 0.5, rel=0.01)
    assert (weights["blocks.1.norm1.weight"] == 1).all()


@pytest.mark.parametrize("of", CONDITIONS)
def test_every_weight_gets_a_gradient(x, t, of):
    network = tiny(text=CONDITIONS[of], **EXTRAS, **LIGHT)
    output, tokens = network(x, t, condition(of), r=t / 2, w=t, guess=x)
    (output.square().mean() + tokens.square().mean()).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


# ---- what it is told


def changes(network, x, t, cond, /, **other) -> bool:
    """Whether the output is another with another value of an input."""
    plain = {k: v for k, v in {"r": t / 2, "w": t, "guess": x}.items() if k in needs(network)}
    given = {"t": t, "cond": cond, **plain}
    first, second = ({**given, **more} for more in ({}, other))
    return not torch.allclose(network(x, **first), network(x, **second), atol=1e-4)


def needs(network) -> set[str]:
    return {*network.form.times[1:], *network.form.inputs}


@pytest.mark.parametrize("name", ["t", "r", "w", "guess", "cond"])
def test_every_input_matters(x, t, name):
    network = tiny(times=("t", "r"), inputs=("w", "guess"))
    other = {"t": t / 3, "r": t / 3, "w": t + 1, "guess": x + 1}
    other["cond"] = torch.tensor([[2], [2], [2]])
    assert changes(network, x, t, condition("classes"), **{name: other[name]})


def test_each_text_token_matters(x, t):
    text = condition("text")
    swapped = text[:, [1, 0, 2, 3, 4]] + torch.tensor([[[0.0], [0.0], [0.0], [0.0], [1.0]]])
    assert changes(tiny(text=Text()), x, t, text, cond=swapped)
    mute = tiny(text=Text())
    for block in mute.blocks:
        nn.init.zeros_(block.cross.proj.weight)
    other = text + torch.tensor([1.0, -1, 0, 0, 0])[:, None]  # of equal mean before the projection
    mute.y_embedder.mlp = nn.Linear(12, 32)
    assert not changes(mute, x, t, text, cond=other)  # then only the pooled text is seen


def test_r_enters_as_t_minus_r(x, t):
    network, cond = tiny(times=("t", "r")), condition("classes")
    embedded = []
    network.further["r"].register_forward_pre_hook(lambda m, args: embedded.append(args[0]))
    network(x, t, cond, r=t / 4)
    torch.testing.assert_close(embedded[0], 0.75 * t)


def test_a_guidance_scale_says_nothing_at_first(x, t):
    torch.manual_seed(0)
    network = transformer(**SIZES, inputs=("w",))
    for p in (network.final_layer.linear.weight, network.final_layer.adaLN_modulation[1].weight):
        nn.init.normal_(p)
    assert torch.equal(network(x, t, w=t), network(x, t, w=t + 5))


def test_times_are_scaled(x, t):
    options = {"times": ("t", "r"), "text": None}
    plain, scaled = tiny(**options), tiny(**options, time_scale=1000)
    torch.testing.assert_close(scaled(x, t, r=t / 2), plain(x, t * 1000, r=t * 500))


@pytest.mark.parametrize("scale", [1, 1000])
def test_the_clock_from_noise_to_data(x, t, scale):
    options = {"times": ("t", "r"), "text": None, "time_scale": scale}
    plain, other = tiny(**options).double(), tiny(**options, clock="data").double()
    x, t = x.double(), t.double()
    # t - r is the length of the same step, seen from the other end
    torch.testing.assert_close(other(x, t, r=t / 2), -plain(x, 1 - t, r=1 - t - t / 2))


def test_an_index_is_a_time(x):
    network, cond = tiny(), condition("classes")
    index = torch.tensor([0, 500, 999])
    torch.testing.assert_close(network(x, index, cond), network(x, index.float(), cond))


def test_times_keep_their_precision(x):
    network = tiny(time_scale=1000).bfloat16()
    embedded = []
    network.t_embedder.mlp.register_forward_pre_hook(lambda m, args: embedded.append(args[0]))
    network(x.bfloat16(), torch.tensor([0.999, 0.998, 0.5]), condition("classes"))
    assert not torch.equal(embedded[0][0], embedded[0][1])


# ---- dropout


def test_dropout_is_shared_by_forwards_with_equal_masks(x, t):
    network, cond = tiny(dropout=0.5), condition("classes")
    draws = [Draws(0, step, torch.arange(3)) for step in (1, 1, 2)]
    first, second, third = (network(x, t, cond, masks=d) for d in draws)
    assert torch.equal(first, second) and not torch.allclose(first, third)
    none = tiny()
    none.load_state_dict(network.state_dict())
    assert torch.equal(network(x, t, cond), none(x, t, cond))


# ---- compiling and differentiating


@pytest.mark.parametrize(
    "of, switches, backend", [("classes", {}, "eager"), ("text", LIGHT, "aot_eager")], ids=str
)
def test_it_traces_as_one_graph(x, t, of, switches, backend):
    network = tiny(text=CONDITIONS[of], **EXTRAS, **switches, depth=1)
    given = {"r": t / 2, "w": t, "guess": x, "cond": condition(of)}

    def loss(x, t, index):
        masks = Draws(0, torch.tensor(4), index)
        output, tokens = network(x, t, masks=masks, **given)
        return output.square().mean() + tokens.square().mean()

    whole, index = torch.compile(loss, fullgraph=True, backend=backend), torch.arange(3)
    torch.testing.assert_close(whole(x, t, index), loss(x, t, index))
    whole(x, t, index).backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("of, switches", [("classes", {}), ("text", LIGHT)], ids=str)
def test_its_tangent_is_its_derivative(x, t, of, switches):
    network = tiny(text=CONDITIONS[of], times=("t", "r"), forward_mode=True, **switches).double()
    cond = condition(of)
    cond = cond.double() if of == "text" else cond
    at = (x.double(), t.double(), t.double() / 2)
    along = (torch.randn(x.shape, dtype=torch.float64), torch.ones(3).double(), torch.zeros(3))

    def function(x, t, r):
        return network(x, t, cond, r=r)

    along = (*along[:2], along[2].double())
    _, tangent = torch.func.jvp(function, at, along)
    ahead, behind = (
        function(*(a + h * v for a, v in zip(at, along, strict=True))) for h in (1e-5, -1e-5)
    )
    torch.testing.assert_close(tangent, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-6)


def test_a_gradient_of_what_stands_beside_a_tangent_compiles(x, t):
    network = tiny(text=None, times=("t", "r"), forward_mode=True, depth=1)
    weights = dict(network.named_parameters())

    def loss(weights, x, t):
        def function(x, t):
            return torch.func.functional_call(network, weights, (x, t), {"r": t / 2})

        value, tangent = torch.func.jvp(function, (x, t), (x, torch.ones_like(t)))
        return (value - tangent.detach()).square().mean()

    gradient = torch.func.grad(loss)
    whole = torch.compile(gradient, fullgraph=True, backend="aot_eager")(weights, x, t)
    for name, value in gradient(weights, x, t).items():
        torch.testing.assert_close(whole[name], value)


# ---- the library


class Latents:
    """A codec of Stable Diffusion's shape."""

    def shape(self, size):
        return 4, size // 8, size // 8


PUBLISHED = {"s2": 33, "b2": 130, "l2": 458, "xl2": 675}  # millions (arXiv:2212.09748 table 4)


def part(backbone: str):
    source = f"""diff 1
import std.dit
import std.sit
import std.lightning
import std.sd
objective a {{ process = linear, prediction_type = flow, backbone = {backbone} }}
"""
    spec, found = check(Source("a.diff", source))
    assert not [f for f in found if f.severity == "error"], found
    return spec.objectives["a"].backbone.part


@pytest.mark.parametrize("space, name", list(itertools.product(("dit", "sit"), PUBLISHED)))
def test_the_library_has_the_published_sizes(space, name):
    with torch.device("meta"):
        network = build(part(f"{space}.{name}"), codec=Latents())
    count = sum(p.numel() for p in network.parameters()) / 1e6
    assert count == pytest.approx(PUBLISHED[name], abs=0.6)
    assert network.form.clock == ("index" if space == "dit" else "data")


def test_the_library_has_the_other_network():
    with torch.device("meta"):
        form = build(part("lightning.xl1"), codec=Latents()).form
    assert (form.norm, form.mlp, form.rotary, form.clock) == ("rms", "swiglu", True, "data")
    assert (form.depth, form.width, form.heads, form.patch) == (28, 1152, 16, 1)


def test_options_reach_the_network():
    text = "sd.clip(layers = 1, width = 16, heads = 2)"
    spec = f"sit.transformer(depth = 2, width = 32, heads = 4, tap = 2, text = {text})"
    network = build(part(spec), size=64)
    assert (network.form.tap, network.form.states, network.tap_grid) == (2, 16, (4, 4))
    assert build(part("sit.transformer(text = [], depth = 1)"), size=64).form.states == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"depth": 0, "heads": 0}, "a transformer needs `depth`, `heads` of 1 at least"),
        ({"heads": 5}, "a width of 32 cannot be split over 5 heads: use a multiple of 5"),
        ({"width": 6, "heads": 2}, "positions of two sides: use a multiple of 4"),
        ({"width": 24, "rotary": True}, "heads of 6 numbers cannot be turned by two sides"),
        ({"tap": 3}, "there is no block 3 to tap: the blocks are 1 to 2"),
        ({"patch": 3}, "latents of 8 x 8 cannot be cut into patches of 3: choose another `size`"),
        ({"inputs": ("lcm.s",)}, "cannot be given `s`: it takes `w` and `guess`"),
        ({"norm": "batch"}, "`norm` cannot be `batch`: it is one of layer, rms"),
        ({"attention": "fused", "forward_mode": True}, "no forward-mode derivative"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_what_does_not_go_together_is_told(options, message):
    with pytest.raises(PartError, match=message):
        transformer(**{**SIZES, **options})


def test_data_that_are_no_pictures():
    class Codec:
        def shape(self, size):
            return 1, size

    with pytest.raises(PartError, match=r"and these data are \[1, 64\]"):
        transformer(**SIZES, codec=Codec())


def test_extras_that_are_not_declared(x, t):
    with pytest.raises(PartError, match="needs `r`: name it in `times` or `inputs`"):
        tiny(times=("t", "r"))(x, t, condition("classes"))
    with pytest.raises(PartError, match="was not made for `w`"):
        tiny()(x, t, condition("classes"), w=t)
