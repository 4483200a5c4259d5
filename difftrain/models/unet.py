"""Backbones made of diffusers' conditional UNet, and the frame that calls any network alike."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from difftrain.answer import unwrap
from difftrain.models.codec import Codec
from difftrain.models.errors import PartError
from difftrain.models.loading import load
from difftrain.models.text import TextEncoder

# arXiv:2112.10752 as Stable Diffusion 1 has it: four levels, text in all but the coarsest
CHANNELS, LATENT, TEXT_WIDTH = (320, 640, 1280, 1280), 4, 768


class Network(nn.Module):
    """Calls a module as network(x, t, cond, **extra), whatever it answers with.

    x [B, C, h, w], t [B] (an index, or real: it is multiplied by `time_scale` first), cond
    [B, T, width]; gives [B, C, h, w].
    """

    def __init__(self, module: nn.Module, time_scale: float = 1.0):
        super().__init__()
        self.module, self.time_scale = module, time_scale

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, **extra) -> Tensor:
        return unwrap(self.module(x, t * self.time_scale, cond, **extra))


def sd_unet(
    *,
    weights: str = "",
    channels: Sequence[int] = CHANNELS,
    layers: int = 2,
    heads: int | Sequence[int] = 8,
    attention: Sequence[int] | None = None,
    groups: int = 32,
    size: int = 64,
    time_scale: float = 1.0,
    codec: Codec | None = None,
    text: TextEncoder | None = None,
) -> Network:
    """Stable Diffusion's UNet: a pretrained one, or a random one of any size.

    `channels` lists the widths from the finest level to the coarsest, `attention` the levels (0 is
    the finest) that look at the text: by default all but the coarsest. `heads` counts attention
    heads, one number or one for each level. `size` is the latents' side in the saved
    configuration. Latent channels come from the codec, the text's width from the encoder.
    """
    latent = codec.channels if codec else LATENT
    width = text.width if text else TEXT_WIDTH
    if weights:
        model = _pretrained(weights, codec, text)
    else:
        shape = _shape(tuple(channels), layers, heads, attention, groups)
        model = _random(latent=latent, width=width, size=size, **shape)
    return Network(model, time_scale)


def _random(*, latent: int, width: int, size: int, **shape) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        in_channels=latent,
        out_channels=latent,
        cross_attention_dim=width,
        sample_size=size,
        **shape,
    )


def _shape(channels: tuple[int, ...], layers: int, heads, attention, groups: int) -> dict:
    """The configuration of the levels, checked."""
    levels = len(channels)
    seen = range(levels - 1) if attention is None else attention
    if wrong := [level for level in seen if level not in range(levels)]:
        raise PartError(f"there is no level {wrong[0]}: the levels are 0 to {levels - 1}")
    each = (heads,) * levels if isinstance(heads, int) else tuple(heads)
    if len(each) != levels:
        raise PartError(f"`heads` has {len(each)} numbers for {levels} levels: give one for each")
    _divisible(channels, (groups,) * levels, "groups")
    _divisible(channels, each, "heads")
    down = ["CrossAttnDownBlock2D" if i in seen else "DownBlock2D" for i in range(levels)]
    return {
        "block_out_channels": channels,
        "layers_per_block": layers,
        "attention_head_dim": each,  # diffusers reads it as the number of heads
        "norm_num_groups": groups,
        "down_block_types": tuple(down),
        "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down)),
    }


def _divisible(channels: tuple[int, ...], parts: tuple[int, ...], what: str) -> None:
    for width, count in zip(channels, parts, strict=True):
        if width % count:
            raise PartError(
                f"{width} channels cannot be split into {count} {what}: use a multiple of {count}"
            )


def _pretrained(weights: str, codec: Codec | None, text: TextEncoder | None) -> nn.Module:
    from diffusers import UNet2DConditionModel

    model = load(UNet2DConditionModel, weights, "unet")
    takes, reads = model.config.in_channels, model.config.cross_attention_dim
    if codec and takes != codec.channels:
        raise PartError(
            f"the network in `{weights}` takes {takes} latent channels, but the codec makes "
            f"{codec.channels}: use the codec that it was trained with"
        )
    if text and reads != text.width:
        raise PartError(
            f"the network in `{weights}` reads text of width {reads}, but the text encoder gives "
            f"{text.width}: use the encoder that it was trained with"
        )
    return model
