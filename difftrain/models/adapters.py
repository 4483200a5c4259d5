"""diffusers' PixArt and Stable Diffusion 3 transformers, called like any other network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from torch import Tensor, nn

from difftrain.models.codec import Codec
from difftrain.models.embedding import picture
from difftrain.models.errors import PartError
from difftrain.models.frame import Frame, agree, widened
from difftrain.models.loading import load
from difftrain.models.text import TextEncoder, divisible

FACTOR = 8  # between pictures and latents, where no codec is given
TEXT_WIDTH = 4096  # T5 XXL's
HIDDEN = -10_000.0  # what diffusers adds to the score of a token that is not looked at


class Patched(Frame):
    """The frame of a transformer over patches; tap k is what follows its k-th block.

    `side` is that of the latents, `factor` how many pixels each side of a latent is; `learned` says
    that the module was trained before.
    """

    def __init__(
        self, module: nn.Module, *, latent: int, side: int, learned: bool, factor: int, **options
    ):
        super().__init__(module, module.inner_dim, **options)
        config, depth = module.config, len(module.transformer_blocks)
        if self.tap > depth:
            raise PartError(f"there is no block {self.tap} to tap: the blocks are 1 to {depth}")
        self.learned, self.factor = learned, factor
        if "guess" in self.inputs and config.in_channels == latent:
            module.pos_embed.proj = widened(module.pos_embed.proj, latent)
            module.register_to_config(in_channels=2 * latent)
        self.patch, self.channels = config.patch_size, latent
        self.tap_width, self.tap_grid = module.inner_dim, (side // self.patch,) * 2

    def _picture(self, tokens: Tensor, x: Tensor) -> Tensor:
        """[B, C, h, w] of patches [B, T, p * p * C']; what more there is are learned variances."""
        grid = tuple(side // self.patch for side in x.shape[2:])
        return picture(tokens, grid, self.patch)[:, : self.channels]


class PixArt(Patched):
    """The frame of a PixArtTransformer2DModel (arXiv:2310.00426, arXiv:2403.04692).

    Rows of text whose states are all 0 are padding, and not looked at.
    """

    def run(self, x: Tensor, t: Tensor, cond, told, w) -> tuple[Tensor, Tensor | None]:
        net = self.module
        clock = net.adaln_single
        emb = clock.emb(t, **self._sizes(x), batch_size=len(x), hidden_dtype=x.dtype) + told
        six = clock.linear(clock.silu(emb))
        states = cond if net.caption_projection is None else net.caption_projection(cond)
        hidden = HIDDEN * _padding(cond)[:, None].to(x.dtype)
        seen = {"encoder_hidden_states": states, "encoder_attention_mask": hidden}
        tokens, kept = net.pos_embed(x), None
        for place, block in enumerate(net.transformer_blocks, 1):
            tokens = block(tokens, timestep=six, **seen)
            kept = tokens if place == self.tap else kept
        shift, scale = (net.scale_shift_table + emb[:, None]).chunk(2, dim=1)
        tokens = net.proj_out(net.norm_out(tokens) * (1 + scale) + shift)
        return self._picture(tokens, x), kept

    def _sizes(self, x: Tensor) -> dict[str, Tensor | None]:
        """The picture's sides in pixels and their ratio, for networks that are told of them."""
        if not self.module.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        h, w = x.shape[2:]
        sides = x.new_tensor([[h * self.factor, w * self.factor]]).expand(len(x), -1)
        return {"resolution": sides, "aspect_ratio": x.new_tensor([[h / w]]).expand(len(x), -1)}


class StableDiffusion3(Patched):
    """The frame of an SD3Transformer2DModel (arXiv:2403.03206).

    Its pooled text is a trained projection of the mean of the states.
    """

    def __init__(self, module: nn.Module, **options):
        super().__init__(module, **options)
        config = module.config
        self.pool = nn.Linear(config.joint_attention_dim, config.pooled_projection_dim)
        if self.learned:  # without it
            nn.init.zeros_(self.pool.weight)
            nn.init.zeros_(self.pool.bias)

    def run(self, x: Tensor, t: Tensor, cond, told, w) -> tuple[Tensor, Tensor | None]:
        net = self.module
        emb = net.time_text_embed(t, self.pool(_mean(cond))) + told
        states = net.context_embedder(cond)
        tokens, kept = net.pos_embed(x).contiguous(), None
        for place, block in enumerate(net.transformer_blocks, 1):
            states, tokens = block(hidden_states=tokens, encoder_hidden_states=states, temb=emb)
            kept = tokens if place == self.tap else kept
        return self._picture(net.proj_out(net.norm_out(tokens, emb)), x), kept


def _padding(states: Tensor) -> Tensor:
    """Which tokens [B, T] of text states [B, T, width] are padding."""
    return (states == 0).all(2)


def _mean(states: Tensor) -> Tensor:
    """The mean [B, width] of the states that are not padding."""
    count = (~_padding(states)).sum(1, keepdim=True).clamp(min=1)
    return states.sum(1) / count.to(states.dtype)


# ---- the builder


@dataclass(frozen=True)
class Kind:
    """A class of diffusers in its frame: which of its options is the text's width, which others
    are the network's own width, and its latent channels where no codec says them."""

    frame: type[Patched]
    model: str
    reads: str
    wide: tuple[str, ...]
    latent: int
    fixed: Mapping[str, object]


KINDS = {
    "pixart": Kind(
        PixArt,
        "PixArtTransformer2DModel",
        "caption_channels",
        ("cross_attention_dim",),
        latent=4,
        fixed={"use_additional_conditions": False},
    ),
    "sd3": Kind(
        StableDiffusion3,
        "SD3Transformer2DModel",
        "joint_attention_dim",
        ("caption_projection_dim", "pooled_projection_dim"),
        latent=16,
        fixed={},
    ),
}


def adapted(
    *,
    kind: str,
    weights: str = "",
    depth: int = 12,
    width: int = 384,
    heads: int = 6,
    patch: int = 2,
    size: int = 512,
    codec: Codec | None = None,
    text: TextEncoder | None = None,
    time_scale: float = 1.0,
    times: Sequence[str] = ("t",),
    inputs: Sequence[str] = (),
    tap: int = 0,
    dropout: float = 0.0,
    forward_mode: bool = False,
) -> Patched:
    """A transformer of diffusers, one of KINDS: a pretrained one, or a random one of any size.

    `size` is the pictures' side in pixels. Latent channels come from the codec, the text's width
    from the encoder. The last six options are the frame's.
    """
    if kind not in KINDS:
        raise PartError(f"there is no network `{kind}` here: use one of {', '.join(KINDS)}")
    form = KINDS[kind]
    _reads_text(text)
    latent = codec.channels if codec else form.latent
    side = codec.shape(size)[1] if codec else size // FACTOR
    if weights:
        module = _pretrained(form, weights, codec, text)
    else:
        sizes = {"num_layers": depth, "num_attention_heads": heads, "patch_size": patch}
        module = _random(form, width, latent, side, text.width if text else TEXT_WIDTH, **sizes)
    _whole_patches(side, module.config.patch_size)
    return form.frame(
        module,
        latent=latent,
        side=side,
        learned=bool(weights),
        factor=codec.factor if codec else FACTOR,
        time_scale=time_scale,
        times=times,
        inputs=inputs,
        tap=tap,
        dropout=dropout,
        forward_mode=forward_mode,
    )


def _model(form: Kind) -> type[nn.Module]:
    return getattr(import_module("diffusers"), form.model)


def _random(form: Kind, width: int, latent: int, side: int, reads: int, **sizes) -> nn.Module:
    heads = sizes["num_attention_heads"]
    divisible(width, heads)
    if width % 4:
        raise PartError(f"a width of {width} holds no positions of two axes: use a multiple of 4")
    sizes |= {"attention_head_dim": width // heads, "sample_size": side}
    sizes |= {form.reads: reads, **dict.fromkeys(form.wide, width)}
    return _model(form)(in_channels=latent, out_channels=latent, **sizes, **form.fixed)


def _pretrained(form: Kind, weights: str, codec: Codec | None, text) -> nn.Module:
    module = load(_model(form), weights, "transformer")
    config = module.config
    variances = 2 if form.frame is PixArt and config.out_channels == 2 * config.in_channels else 1
    agree(weights, config.out_channels // variances, config[form.reads], codec, text)
    return module


def _reads_text(text) -> None:
    if text is not None and not getattr(text, "width", 0):
        raise PartError("this network reads text: give it a text encoder, such as `t5.encoder`")


def _whole_patches(side: int, patch: int) -> None:
    if side % patch:
        raise PartError(
            f"latents of {side} x {side} cannot be cut into patches of {patch}: choose another "
            "`size` or another `patch`"
        )
