"""Published files of weights, against the published networks as their formulas have them."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from difftrain.models.checkpoints import converted, published
from difftrain.models.errors import PartError
from difftrain.models.form import Form
from difftrain.models.transformer import transformer

LIGHT = {"norm": "rms", "mlp": "swiglu", "rotary": True}
TINY = {"depth": 2, "width": 32, "heads": 4, "patch": 2, "size": 64}
CLASSES = 10


class Labels:
    """What the builder asks of an encoder of classes."""

    classes, width = CLASSES, 0


def form(**options) -> Form:
    sizes = {name: TINY[name] for name in ("depth", "width", "heads", "patch")}
    return Form(**{**sizes, "classes": CLASSES, **options})


def random_file(form: Form, tokens: int = 16, outputs: int = 8) -> dict[str, torch.Tensor]:
    """Tensors of a published file, with fixed positions as their papers define them."""
    torch.manual_seed(0)
    layout = published(form, tokens, outputs)
    tensors = {n: torch.randn(s) / math.sqrt(s[-1] if len(s) > 1 else 4) for n, s in layout}
    side, head = math.isqrt(tokens), form.width // form.heads
    tensors["pos_embed"] = sines(side, form.width)[None]
    if form.rotary:
        angles = turning(side, head).repeat_interleave(2, dim=1)
        tensors |= {"feat_rope.freqs_cos": angles.cos(), "feat_rope.freqs_sin": angles.sin()}
    return tensors


def sines(side: int, width: int) -> torch.Tensor:
    """arXiv:2111.06377: of the column, then of the row, of each the sines before the cosines."""
    rows = []
    for row in range(side):
        for column in range(side):
            waves = []
            for at in (column, row):
                angles = [at / 10000 ** (k / (width // 4)) for k in range(width // 4)]
                waves += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(waves)
    return torch.tensor(rows)


def turning(side: int, head: int) -> torch.Tensor:
    """Angles [T, head / 2] of the pairs of a head: by the row first, then by the column."""
    count = head // 4
    omega = 10000.0 ** (-torch.arange(count) / count)
    rows = [[row * omega, column * omega] for row in range(side) for column in range(side)]
    return torch.stack([torch.cat(pair) for pair in rows])


def reference(w: dict, form: Form, x, t, y):
    """The output [B, outputs, h, w] of the published network, from its formulas."""
    d, heads, p = form.width, form.heads, form.patch

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x, width=d):
        if form.norm == "rms":
            return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def attention(at, x):
        b, tokens, _ = x.shape
        q, k, v = linear(f"{at}.qkv", x).view(b, tokens, 3, heads, d // heads).unbind(2)
        if form.qk_norm:
            q, k = norm(f"{at}.q_norm", q), norm(f"{at}.k_norm", k)
        if form.rotary:  # a turn of a pair is a product of complex numbers
            angle = turning(math.isqrt(tokens), d // heads).to(x.dtype)
            turns = torch.polar(torch.ones_like(angle), angle)[None, :, None]
            q, k = (
                torch.view_as_real(torch.view_as_complex(z.unflatten(-1, (-1, 2))) * turns).flatten(
                    -2
                )
                for z in (q.contiguous(), k.contiguous())
            )
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(d // heads)
        mixed = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).reshape(b, tokens, d)
        return linear(f"{at}.proj", mixed)

    def mlp(at, x):
        if form.mlp == "swiglu":
            gate, value = linear(f"{at}.w12", x).tensor_split(2, dim=-1)
            return linear(f"{at}.w3", gate * gate.sigmoid() * value)
        x = linear(f"{at}.fc1", x)
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        return linear(f"{at}.fc2", 0.5 * x * (1 + inner.tanh()))

    def silu(x):
        return x * x.sigmoid()

    patches = F.conv2d(x, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=p)
    h = patches.flatten(2).transpose(1, 2) + w["pos_embed"]
    rates = torch.tensor([math.exp(-math.log(10000) * i / 128) for i in range(128)], dtype=x.dtype)
    angle = torch.outer(t, rates)
    waves = torch.cat([angle.cos(), angle.sin()], dim=1)
    c = linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", waves)))
    c = c + w["y_embedder.embedding_table.weight"][y]
    for i in range(form.depth):
        at = f"blocks.{i}"
        parts = linear(f"{at}.adaLN_modulation.1", silu(c))[:, None].tensor_split(6, dim=-1)
        shift, scale, gate, shift2, scale2, gate2 = parts
        h = h + gate * attention(f"{at}.attn", norm(f"{at}.norm1", h) * (1 + scale) + shift)
        h = h + gate2 * mlp(f"{at}.mlp", norm(f"{at}.norm2", h) * (1 + scale2) + shift2)
    shift, scale = linear("final_layer.adaLN_modulation.1", silu(c))[:, None].tensor_split(2, -1)
    h = linear("final_layer.linear", norm("final_layer.norm_final", h) * (1 + scale) + shift)
    side = math.isqrt(h.shape[1])
    squares = h.view(len(x), side, side, p, p, -1)
    return torch.einsum("nhwpqc->nchpwq", squares).reshape(len(x), -1, side * p, side * p)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    return x, torch.tensor([0.2, 0.9], dtype=torch.float64), torch.tensor([3, CLASSES])


def loaded(tmp_path, tensors, **options):
    save_file(tensors, tmp_path / "net.safetensors")
    return transformer(weights=str(tmp_path / "net.safetensors"), text=Labels(), **TINY, **options)


# ---- layouts

DIT = Form(classes=1000)
LIGHTNING = replace(DIT, patch=1, channels=32, **LIGHT)


def test_the_published_count():
    count = sum(math.prod(shape) for _, shape in published(DIT, tokens=256, outputs=8))
    assert count == 675_129_632  # as the published training logs


@pytest.mark.parametrize("form, outputs", [(DIT, 8), (LIGHTNING, 32)], ids=["dit", "lightning"])
def test_the_largest_networks_have_the_published_layout(form, outputs):
    class Codec:
        def shape(self, size):
            return form.channels, 16 * form.patch, 16 * form.patch

    class Thousand:
        classes, width = 1000, 0

    options = {name: getattr(form, name) for name in ("patch", "norm", "mlp", "rotary")}
    with torch.device("meta"):
        network = transformer(codec=Codec(), text=Thousand(), **options)
        tensors = {n: torch.empty(s) for n, s in published(form, 256, outputs)}
    fixed = {"pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"}
    theirs = {n: tuple(v.shape) for n, v in tensors.items() if n not in fixed}
    rows = ("final_layer.linear.weight", "final_layer.linear.bias")
    ours = {n: tuple(v.shape) for n, v in network.state_dict().items()}
    assert theirs.keys() == ours.keys()
    assert {n for n in ours if ours[n] != theirs[n]} == (set(rows) if outputs == 8 else set())


def test_names_of_the_published_files():
    """Some of them, as they stand in the files, so that the generator cannot drift."""
    dit, light = (dict(published(f, 256, 8)) for f in (DIT, replace(LIGHTNING, qk_norm=True)))
    assert dit["blocks.27.adaLN_modulation.1.weight"] == (6912, 1152)
    assert dit["blocks.0.attn.qkv.bias"] == (3456,)
    assert dit["x_embedder.proj.weight"] == (1152, 4, 2, 2)
    assert dit["y_embedder.embedding_table.weight"] == (1001, 1152)
    assert dit["final_layer.linear.weight"] == (32, 1152)
    assert light["blocks.0.mlp.w12.weight"] == (6144, 1152)
    assert light["blocks.0.norm1.weight"] == light["final_layer.norm_final.weight"] == (1152,)
    assert light["blocks.0.attn.q_norm.weight"] == (72,)
    assert light["feat_rope.freqs_cos"] == (256, 72)
    assert (len(dit), len(light)) == (1 + 2 + 4 + 1 + 28 * 10 + 4, 3 + 2 + 4 + 1 + 28 * 14 + 5)


# ---- numbers


@pytest.mark.parametrize("switches", [{}, LIGHT, {**LIGHT, "qk_norm": True}], ids=str)
@pytest.mark.parametrize("outputs", [4, 8])
def test_a_published_file_computes_what_it_did(tmp_path, batch, switches, outputs):
    x, t, y = batch
    tensors = random_file(form(**switches), outputs=outputs)
    network = loaded(tmp_path, tensors, **switches).double()
    double = {name: value.double() for name, value in tensors.items()}
    expected = reference(double, form(**switches), x, t, y)[:, :4]  # the rest tells variances
    torch.testing.assert_close(network(x, t, y[:, None]), expected, rtol=1e-5, atol=1e-5)


def test_the_other_clock_gives_the_opposite_flow(tmp_path, batch):
    """SiT and LightningDiT learn x0 - eps at 1 - t (arXiv:2401.08740 eq. 4, their time from noise
    to data); our flow is eps - x0 at t."""
    x, t, y = batch
    network = loaded(tmp_path, random_file(form()), clock="data").double()
    plain = loaded(tmp_path, random_file(form()), clock="noise").double()
    torch.testing.assert_close(network(x, t, y[:, None]), -plain(x, 1 - t, y[:, None]))


def test_another_size_than_the_file_was_trained_for(tmp_path):
    tensors = random_file(form(), tokens=64)  # of pictures twice the side
    assert loaded(tmp_path, tensors).tap_grid == (4, 4)


def test_half_precision_comes_as_float32(tmp_path):
    halves = {n: v.bfloat16() for n, v in random_file(form(**LIGHT)).items()}
    network = loaded(tmp_path, halves, **LIGHT)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    name = "blocks.1.attn.qkv.weight"
    assert torch.equal(network.state_dict()[name], halves[name].float())


def test_what_the_file_does_not_know_says_nothing_at_first(tmp_path, batch):
    x, t, y = batch
    tensors = random_file(form())
    plain = loaded(tmp_path, tensors).double()(x, t, y[:, None])
    more = loaded(tmp_path, tensors, times=("t", "r"), inputs=("lcm.w", "guess")).double()
    got = more(x, t, y[:, None], r=t / 2, w=t + 7, guess=x + 1)
    torch.testing.assert_close(got, plain)


def test_our_own_weights_come_back(tmp_path, batch):
    x, t, y = batch
    options = {"times": ("t", "r"), "inputs": ("w",)}
    network = transformer(text=Labels(), **TINY, **options)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    again = loaded(tmp_path, network.state_dict(), **options)
    extra = {"r": t / 2, "w": t}
    assert torch.equal(
        again.double()(x, t, y[:, None], **extra), network.double()(x, t, y[:, None], **extra)
    )


# ---- refusals


def without(tensors, name):
    return {n: v for n, v in tensors.items() if n != name}


CASES = {
    "lack `blocks.0.attn.qkv.bias`: give the network the options": lambda f: without(
        f, "blocks.0.attn.qkv.bias"
    ),
    "no place for `blocks.2.mlp.fc1.bias` in": lambda f: {
        **f,
        "blocks.2.mlp.fc1.bias": torch.zeros(1),
    },
    r"`y_embedder.embedding_table.weight` is \[5, 32\] in .*, but \[11, 32\] in this": lambda f: {
        **f,
        "y_embedder.embedding_table.weight": torch.zeros(5, 32),
    },
    "`pos_embed` in .* is not what this network computes": lambda f: {
        **f,
        "pos_embed": f["pos_embed"] + 1,
    },
    r"`final_layer.linear.weight` is \[32, 32\] in .*, but \[16, 32\] in": lambda f: {
        **f,
        "final_layer.linear.bias": torch.zeros(48),
    },
}


@pytest.mark.parametrize("message", CASES)
def test_a_file_that_does_not_fit_is_refused_whole(tmp_path, message):
    with pytest.raises(PartError, match=message):
        loaded(tmp_path, CASES[message](random_file(form())))


def test_a_grid_that_is_not_square(tmp_path):
    tensors = {**random_file(form()), "pos_embed": torch.zeros(1, 15, 32)}
    with pytest.raises(PartError, match="`pos_embed` in .* is not what this network computes"):
        loaded(tmp_path, tensors)


def test_other_switches_than_the_file_has(tmp_path):
    with pytest.raises(PartError, match=r"lack 13 tensors \(such as `blocks.0.mlp.w12.bias`\)"):
        loaded(tmp_path, random_file(form()), **{**LIGHT, "rotary": False})


def test_a_class_conditional_file_without_classes():
    with pytest.raises(PartError, match="told a class: give the network `text = label.classes"):
        converted(form(classes=0), random_file(form()), "net.safetensors")


def test_files_that_cannot_be_read(tmp_path):
    def read(name):
        transformer(weights=str(tmp_path / name), text=Labels(), **TINY)

    with pytest.raises(PartError, match="there is no file `.*a.safetensors`: give a .safetensors"):
        read("a.safetensors")
    (tmp_path / "b.pt").write_bytes(b"\x80")
    with pytest.raises(PartError, match="is a pickle, which can run code"):
        read("b.pt")
    (tmp_path / "c.safetensors").write_bytes(b"nothing")
    with pytest.raises(PartError, match=r"is not a safetensors file \(.*\): save the state dict"):
        read("c.safetensors")
