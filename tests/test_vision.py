"""Frozen vision encoders: tokens on any grid, gradients, tracing, weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig
from transformers import Dinov2WithRegistersModel as Registers

from difftrain.commands.failure import failure
from difftrain.language.part import Part
from difftrain.models import build, vision
from difftrain.models.errors import PartError
from difftrain.models.vision import _fill, dinov2, efficientnet_lite0
from difftrain.training.sources import open_source

TINY = {"weights": "", "layers": 2, "width": 24, "heads": 2}
MAKERS = {
    "efficientnet_lite0": lambda grid: efficientnet_lite0(stage=4, grid=grid),
    "dinov2": lambda grid: dinov2(**TINY, grid=grid),
}


def pictures(count=2, side=32):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (1, 1)])
def test_there_are_as_many_tokens_as_the_grid_has(name, grid):
    encoder = MAKERS[name](grid)
    for side in (17, 64):
        tokens = encoder(pictures(2, side))
        assert tokens.shape == (2, grid[0] * grid[1], encoder.width)
        assert tokens.isfinite().all()


@pytest.mark.parametrize(("stage", "width"), [(3, 40), (4, 112), (5, 1280)])
def test_stages(stage, width):
    encoder = efficientnet_lite0(stage=stage, grid=(2, 2))
    assert (encoder.width, encoder.stride) == (width, 2**stage)
    assert encoder(pictures()).shape == (2, 4, width)


@pytest.mark.parametrize("name", MAKERS)
def test_tokens_stand_row_by_row(name):
    """What changes in one corner of a picture shows most in that corner's token."""
    encoder = MAKERS[name]((4, 4))
    plain = torch.zeros(1, 3, 64, 64)
    for row, column in ((0, 0), (0, 3), (3, 0)):
        marked = plain.clone()
        marked[..., 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 1.0
        moved = (encoder(marked) - encoder(plain)).norm(dim=2)
        assert moved.argmax() == 4 * row + column


@pytest.mark.parametrize("name", MAKERS)
def test_it_is_frozen(name):
    encoder = MAKERS[name]((2, 2)).train()
    assert not encoder.training and not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    image = pictures().requires_grad_()
    encoder(image).square().sum().backward()
    assert image.grad.abs().sum() > 0
    assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize("name", MAKERS)
def test_it_traces_whole(name):
    encoder = MAKERS[name]((2, 2))
    traced = torch.compile(encoder, fullgraph=True, backend="eager")
    assert torch.allclose(traced(pictures()), encoder(pictures()), atol=1e-5)


@pytest.mark.parametrize("name", MAKERS)
def test_it_keeps_its_precision(name):
    encoder = MAKERS[name]((2, 2))
    plain = encoder(pictures())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(pictures()), plain)
    assert encoder(pictures().double()).dtype == torch.float32
    assert torch.allclose(encoder.double()(pictures()).float(), plain, atol=1e-4)


def test_the_norms_are_folded_exactly():
    """One convolution with a batch norm behind it, against torch's own."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5, eps=1e-3).eval()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data.uniform_(0.5, 2)
    folded = nn.Sequential(nn.Conv2d(3, 5, 3))
    _fill(folded, [conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var])
    assert torch.allclose(folded(pictures()), norm(conv(pictures())), atol=1e-5)


def test_strided_layers_pad_as_tensorflow_does():
    """Total padding kernel - stride, the odd pixel behind: written out by hand for the stem."""
    stem = efficientnet_lite0(stage=3, grid=(1, 1)).model[0][:2]
    x = pictures(1, 8)
    made = F.conv2d(F.pad(x, (0, 1, 0, 1)), stem[1].weight, stem[1].bias, stride=2)
    assert torch.equal(stem(x), made)


def test_one_thing_in_two_hands_looks_alike():
    """Tokens find the same thing drawn by another team: the weights are whole and in order."""
    source = open_source("emoji64", split="all")
    rows = [i for i, r in enumerate(source.records) if r.fields["style"] in ("3d", "noto")][:120]
    images = torch.stack([source.image(i, 64) for i in rows]).float() / 127.5 - 1
    labels = [source.records[i].fields["label"] for i in rows]
    styles = [source.records[i].fields["style"] for i in rows]
    tokens = F.normalize(efficientnet_lite0(grid=(4, 4))(images), dim=2).flatten(1)
    likeness = tokens @ tokens.T
    first = [i for i, style in enumerate(styles) if style == "3d" and labels.count(labels[i]) == 2]
    others = [i for i, style in enumerate(styles) if style == "noto"]
    found = [others[likeness[i, others].argmax()] for i in first]
    hits = sum(labels[i] == labels[j] for i, j in zip(first, found, strict=True))
    assert len(first) > 40 and hits / len(first) > 0.7


def test_an_absent_package_is_told(monkeypatch):
    monkeypatch.setattr(vision, "PACKAGE", "no_such_package")
    with pytest.raises(ModuleNotFoundError) as caught:
        efficientnet_lite0(grid=(2, 2))
    told = failure(caught.value)
    assert (told.code, str(told)) == (
        3,
        "`no_such_package` is not installed here: install it and try again",
    )


# ---- transformers' own folders


def saved(folder, kind=Dinov2Model, config=Dinov2Config, **more):
    torch.manual_seed(1)
    model = kind(config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, **more))
    model.save_pretrained(folder)
    return model.eval()


def test_a_saved_encoder_gives_what_transformers_gives(tmp_path):
    model, image = saved(tmp_path), pictures(2, 56)
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    expected = model(((image + 1) / 2 - mean) / deviation).last_hidden_state[:, 1:]
    encoder = build(Part("encoder", "dinov2", {"weights": str(tmp_path)}), grid=(4, 4))
    assert encoder.width == 24 and torch.allclose(encoder(image), expected, atol=1e-5)


def test_registers_are_left_out(tmp_path):
    saved(tmp_path, Registers, Dinov2WithRegistersConfig, num_register_tokens=4)
    assert dinov2(weights=str(tmp_path), grid=(2, 3))(pictures()).shape == (2, 6, 24)


def test_another_model_is_told(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(PartError, match="holds `vit`: give a folder or a hub name of `dinov2`"):
        dinov2(weights=str(tmp_path), grid=(2, 2))
    with pytest.raises(PartError, match="a width of 24 cannot be split over 5 heads"):
        dinov2(weights="", width=24, heads=5, grid=(2, 2))
