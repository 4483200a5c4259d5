"""The frame of diffusers' UNets: more times and inputs, taps, named dropout, forward mode."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from difftrain.models.dropout import install
from difftrain.models.errors import PartError
from difftrain.models.forward import differentiable

SCALES = 256  # sinusoids of the guidance scale, arXiv:2310.04378 section 4.3
KNOWN = ("w", "guess")


class UNet(nn.Module):
    """Calls a UNet2DConditionModel or UNet2DModel as network(x, t, cond, **extra).

    x [B, C, h, w]; t [B] (an index, or real: it is multiplied by `time_scale` first); cond
    [B, T, width] or labels [B, 1]; further times [B] by name, each of which adds an embedding of
    t minus it; `w` [B], a guidance scale; `guess` [B, C, h, w]. Gives [B, C, h, w], with `tap` also
    the tokens [B, T, D] of the middle. What a pretrained network has not seen starts as zero.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        latent: int,
        side: int,
        time_scale: float = 1.0,
        times: Sequence[str] = ("t",),
        inputs: Sequence[str] = (),
        tap: int = 0,
        dropout: float = 0.0,
        forward_mode: bool = False,
    ):
        super().__init__()
        self.module, self.time_scale, self.tap = module, time_scale, tap
        self.apart = nn.ModuleDict({name: _embedding_of(module) for name in times[1:]})
        self.inputs = _named(inputs)
        if "w" in self.inputs:
            _see_scales(module)
        if "guess" in self.inputs and module.config.in_channels == latent:
            _see_more(module, latent)
        self.masks = install(module, dropout) if dropout else None
        if forward_mode:
            differentiable(module)
        self.tap_width, self.tap_grid = module.config.block_out_channels[-1], _middle(module, side)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, *, masks=None, **extra):
        handed = self.masks.handed(masks) if self.masks else nullcontext()
        with handed:
            return self._called(x, t, cond, **extra)

    def _called(self, x, t, cond, *, w=None, guess=None, **times):
        if guess is not None:
            x = torch.cat([x, guess], dim=1)
        emb = self._embedding(x, t, w, times)
        if self.module.class_embedding is not None:
            emb = emb + self.module.class_embedding(cond[:, 0])
        output, middle = levels(self.module, x, emb, cond)
        return (output, middle.flatten(2).transpose(1, 2)) if self.tap else output

    def _embedding(self, x: Tensor, t: Tensor, w: Tensor | None, times: dict) -> Tensor:
        """What all levels are told of times and guidance, [B, D]."""
        known = None if w is None else _scale(w).to(x.dtype)
        emb = self.module.time_embedding(self._waves(x, t), known)
        for name, embedding in self.apart.items():
            emb = emb + embedding(self._waves(x, t - times[name]))
        return emb

    def _waves(self, x: Tensor, t: Tensor) -> Tensor:
        return self.module.time_proj(t * self.time_scale).to(x.dtype)


def levels(unet: nn.Module, x: Tensor, emb: Tensor, cond) -> tuple[Tensor, Tensor]:
    """(output [B, C, h, w], middle [B, D, h', w']) of a UNet's levels, told `emb` [B, D]."""
    h = unet.conv_in(x)
    skips = (h,)
    for block in unet.down_blocks:
        h, more = _run(block, h, emb, cond)
        skips += more
    middle = h = _run(unet.mid_block, h, emb, cond)
    for block in unet.up_blocks:
        skips, used = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
        size = skips[-1].shape[2:] if skips else None  # odd sides were rounded up on the way down
        h = _run(block, h, emb, cond, res_hidden_states_tuple=used, upsample_size=size)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(h))), middle


def _run(block: nn.Module, h: Tensor, emb: Tensor, cond, **more):
    reads = getattr(block, "has_cross_attention", False)
    seen = {"encoder_hidden_states": cond} if reads else {}
    return block(hidden_states=h, temb=emb, **seen, **more)


# ---- what a network is given besides x, t and cond


def _named(inputs: Sequence[str]) -> tuple[str, ...]:
    """The last names of further inputs, as they arrive."""
    names = tuple(name.rpartition(".")[2] for name in inputs)
    if wrong := [name for name in names if name not in KNOWN]:
        raise PartError(
            f"this network cannot be given `{wrong[0]}`: its `inputs` may be a guidance scale `w` "
            "and an earlier estimate `guess`"
        )
    return names


def _embedding_of(unet: nn.Module) -> nn.Module:
    """An embedding like the one of t, that adds nothing yet."""
    from diffusers.models.embeddings import TimestepEmbedding

    like = unet.time_embedding.linear_1
    made = TimestepEmbedding(like.in_features, like.out_features)
    nn.init.zeros_(made.linear_2.weight)
    nn.init.zeros_(made.linear_2.bias)
    return made


def _see_scales(unet: nn.Module) -> None:
    """Let the embedding of t see a guidance scale, in the place that diffusers has for it."""
    embedding = unet.time_embedding
    if embedding.cond_proj is None:
        embedding.cond_proj = nn.Linear(SCALES, embedding.linear_1.in_features, bias=False)
        nn.init.zeros_(embedding.cond_proj.weight)
        unet.register_to_config(time_cond_proj_dim=SCALES)


def _scale(w: Tensor) -> Tensor:
    """Sinusoids [B, 256] of 1000 w."""
    from diffusers.models.embeddings import get_timestep_embedding

    return get_timestep_embedding(1000 * w, SCALES, downscale_freq_shift=1)


def _see_more(unet: nn.Module, more: int) -> None:
    """Let the first convolution see further channels, whose weights are zero."""
    old = unet.conv_in
    conv = nn.Conv2d(old.in_channels + more, old.out_channels, old.kernel_size, padding=old.padding)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[:, : old.in_channels] = old.weight
        conv.bias.copy_(old.bias)
    unet.conv_in = conv
    unet.register_to_config(in_channels=conv.in_channels)


def _middle(unet: nn.Module, side: int) -> tuple[int, int]:
    """The grid of the coarsest level for latents of this side."""
    for _ in unet.config.block_out_channels[1:]:
        side = (side + 1) // 2
    return side, side
