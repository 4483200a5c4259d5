"""Backbones made of diffusers' UNets."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from difftrain.models.codec import Codec
from difftrain.models.denoiser import UNet
from difftrain.models.errors import PartError
from difftrain.models.frame import agree
from difftrain.models.loading import load
from difftrain.models.text import TextEncoder

# arXiv:2112.10752 as Stable Diffusion 1 has it: four levels, text in all but the coarsest
CHANNELS, LATENT, TEXT_WIDTH, FACTOR = (320, 640, 1280, 1280), 4, 768, 8
# what a pretrained network may not need beyond x, t, text or a class
ALONE = {
    "addition_embed_type": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
}


def sd_unet(
    *,
    weights: str = "",
    channels: Sequence[int] = CHANNELS,
    layers: int = 2,
    heads: int | Sequence[int] = 8,
    attention: Sequence[int] | None = None,
    groups: int = 32,
    size: int = 512,
    codec: Codec | None = None,
    text: TextEncoder | tuple | None = None,
    time_scale: float = 1.0,
    times: Sequence[str] = ("t",),
    inputs: Sequence[str] = (),
    tap: int = 0,
    dropout: float = 0.0,
    forward_mode: bool = False,
) -> UNet:
    """Stable Diffusion's UNet: a pretrained one, or a random one of any size.

    `channels` lists the widths from the finest level to the coarsest, `attention` the levels (0 is
    the finest) that look at the text: by default all but the coarsest. `heads` counts attention
    heads, one number or one for each level. `size` is the pictures' side in pixels. Latent channels
    come from the codec, the text's width from the encoder; one of class labels makes the network
    embed them, and `text = []` makes one without condition: both look at themselves alone. The last
    five options are the frame's.
    """
    latent = codec.channels if codec else LATENT
    side = codec.shape(size)[1] if codec else size // FACTOR
    if weights:
        model = _pretrained(weights, codec, text)
    else:
        shape = _shape(tuple(channels), layers, heads, attention, groups)
        model = _random(text, **shape, in_channels=latent, out_channels=latent, sample_size=side)
    return UNet(
        model,
        latent=latent,
        side=side,
        time_scale=time_scale,
        times=times,
        inputs=inputs,
        tap=tap,
        dropout=dropout,
        forward_mode=forward_mode,
    )


def _reads_text(text) -> bool:
    return text is None or bool(getattr(text, "width", 0))


def _random(text, *, attention_head_dim: tuple[int, ...], **shape) -> nn.Module:
    from diffusers import UNet2DConditionModel, UNet2DModel

    if _reads_text(text):
        width = text.width if text else TEXT_WIDTH
        heads = attention_head_dim  # diffusers reads it as the number of heads
        return UNet2DConditionModel(cross_attention_dim=width, attention_head_dim=heads, **shape)
    widths, kinds = shape["block_out_channels"], shape["down_block_types"]
    each = widths[-1] // attention_head_dim[-1]
    looking = [w for w, kind in zip(widths, kinds, strict=True) if "Attn" in kind]
    _divisible(looking, [each] * len(looking), "heads")
    for side in ("down_block_types", "up_block_types"):
        shape[side] = tuple(kind.replace("CrossAttn", "Attn") for kind in shape[side])
    return UNet2DModel(attention_head_dim=each, num_class_embeds=_classes(text), **shape)


def _classes(text) -> int | None:
    """How many classes a network embeds, the null class among them."""
    return text.classes + 1 if text else None


def _shape(channels: tuple[int, ...], layers: int, heads, attention, groups: int) -> dict:
    """The configuration of the levels, checked."""
    levels = len(channels)
    seen = range(levels - 1) if attention is None else attention
    if wrong := [level for level in seen if level not in range(levels)]:
        raise PartError(
            f"`attention` lists level {wrong[0]}, and {levels} `channels` make the levels 0 to"
            f" {levels - 1}: list some of these"
        )
    each = (heads,) * levels if isinstance(heads, int) else tuple(heads)
    if len(each) != levels:
        raise PartError(f"`heads` has {len(each)} numbers for {levels} levels: give one for each")
    _divisible(channels, (groups,) * levels, "groups")
    _divisible(channels, each, "heads")
    down = ["CrossAttnDownBlock2D" if i in seen else "DownBlock2D" for i in range(levels)]
    return {
        "block_out_channels": channels,
        "layers_per_block": layers,
        "attention_head_dim": each,
        "norm_num_groups": groups,
        "down_block_types": tuple(down),
        "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down)),
    }


def _divisible(channels: Sequence[int], parts: Sequence[int], what: str) -> None:
    for width, count in zip(channels, parts, strict=True):
        if width % count:
            raise PartError(
                f"{width} channels cannot be split into {count} {what}: use a multiple of {count}"
            )


def _pretrained(weights: str, codec: Codec | None, text) -> nn.Module:
    from diffusers import UNet2DConditionModel, UNet2DModel

    kind = UNet2DConditionModel if _reads_text(text) else UNet2DModel
    model = load(kind, weights, "unet")
    for name, plain in ALONE.items():
        if model.config.get(name, plain) != plain:
            raise PartError(
                f"the network in `{weights}` needs more than x, t and a condition (`{name}` is "
                f"{model.config[name]}): use one without"
            )
    _fits(weights, model.config, codec, text)
    return model


def _fits(weights: str, config, codec: Codec | None, text) -> None:
    """Refuse a network that was trained with another codec or another kind of condition."""
    # the channels that come in may count a guess
    reads = config.cross_attention_dim if _reads_text(text) else None
    agree(weights, config.out_channels, reads, codec, text)
    if not _reads_text(text) and config.num_class_embeds != _classes(text):
        knows = config.num_class_embeds or "no"
        raise PartError(
            f"the network in `{weights}` knows {knows} classes, the null class counted in, and "
            f"here it is given {_classes(text) or 'none'}: change `text`"
        )
