"""Runs with parts from Python, which pipelines of diffusers may not take for ours."""

import pytest
from test_export_diffusers import PROMPTS, opened, quiet, text

from difftrain.export import diffusers
from difftrain.export.errors import ExportError

LIKE_OURS = '''
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

SMALL = {"block_out_channels": (16,), "layers_per_block": 1, "norm_num_groups": 4}


class Transformer(nn.Module):
    """A class called as one of difftrain's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, t, cond):
        return self.weight * x


class Words(nn.Module):
    """An encoder that holds CLIP's."""

    width, length, vocabulary = 16, 8, ()

    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        self.model = CLIPTextModel(CLIPTextConfig(**sizes, num_attention_heads=2))

    def ids(self, texts):
        return torch.tensor([[len(text)] * self.length for text in texts])

    def forward(self, ids):
        return self.model(ids)[0]


class Kinds(Words):
    """An encoder of classes."""

    width, length, classes = 0, 1, 3


class Same(nn.Module):
    """A codec that leaves pictures alone."""

    channels = 3

    def encode(self, x):
        return x

    def decode(self, x):
        return x

    def shape(self, size):
        return 3, size, size


def transformer():
    return Transformer()


def unet():
    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    kinds |= {"mid_block_type": "UNetMidBlock2D", "in_channels": 3, "out_channels": 3}
    return UNet2DConditionModel(**SMALL, **kinds)


def words():
    return Words()


def kinds():
    return Kinds()


def same():
    return Same()
'''
DECLARED = """import std.dit

encoder words { module = "like_ours:words" }
encoder kinds { module = "like_ours:kinds" }
codec same { module = "like_ours:same" }
backbone own(text = words, codec = sd.pixels) { module = "like_ours:transformer" }
backbone theirs(text = words, codec = sd.pixels) { module = "like_ours:unet" }
"""
SIZES = "channels = [16, 16], layers = 1, heads = 2, attention = [0], groups = 4"
CLIP = "sd.clip(layers = 1, width = 16, heads = 2, length = 8)"
NAMES = ("called as ours", "of diffusers", "an encoder", "classes", "a codec", "no codec")
REFUSED = {
    "own": "no pipeline for a network from Python: export to another target, such as `onnx`",
    "theirs": "no pipeline for a network from Python: export to another target, such as `onnx`",
    f"sd.unet(text = words, {SIZES})": "`like_ours:words` encodes the prompts of this run",
    "dit.transformer(text = kinds, depth = 1, width = 16, heads = 2)": "classes that Python tells",
    f"sd.unet(text = {CLIP}, codec = same, {SIZES})": "decode latents of an AutoencoderKL",
    f"sd.unet(text = {CLIP}, codec = raw, {SIZES})": "decode latents of an AutoencoderKL",
}


@pytest.mark.parametrize(("backbone", "message"), REFUSED.items(), ids=NAMES)
def test_parts_from_python_are_refused(tmp_path, monkeypatch, backbone, message):
    (tmp_path / "like_ours.py").write_text(LIKE_OURS)
    monkeypatch.syspath_prepend(tmp_path)
    spec = text(backbone).replace("import std.sd", f"import std.sd\n{DECLARED}")
    with pytest.raises(ExportError) as problem:
        diffusers.export(opened(spec, PROMPTS), tmp_path / "out", quiet)
    assert message in str(problem.value)
    assert not (tmp_path / "out").exists()
