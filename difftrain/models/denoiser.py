"""The frame of diffusers' UNets."""

from __future__ import annotations

from torch import Tensor, nn

from difftrain.models.frame import SCALE, Frame, widened
from difftrain.models.processor import arrange_products

SCALES = 256  # sinusoids of the guidance scale, arXiv:2310.04378 section 4.3


class UNet(Frame):
    """The frame of a UNet2DConditionModel, or of a UNet2DModel where there is no text; its tap is
    the middle. `side` is that of the latents."""

    own_scale = True

    def __init__(self, module: nn.Module, *, latent: int, side: int, **options):
        super().__init__(module, module.time_embedding.linear_1.out_features, **options)
        arrange_products(module, fused=not options.get("forward_mode"))
        if "w" in self.inputs:
            _see_scales(module)
        if "guess" in self.inputs and module.config.in_channels == latent:
            module.conv_in = widened(module.conv_in, latent)
            module.register_to_config(in_channels=2 * latent)
        self.tap_width, self.tap_grid = module.config.block_out_channels[-1], _middle(module, side)

    def run(self, x: Tensor, t: Tensor, cond, told, w: Tensor | None) -> tuple[Tensor, Tensor]:
        unet = self.module
        scale = None if w is None else _waves(w).to(x.dtype)
        emb = unet.time_embedding(unet.time_proj(t).to(x.dtype), scale) + told
        if unet.class_embedding is not None:
            emb = emb + unet.class_embedding(cond[:, 0])
        output, middle = levels(unet, x, emb, cond)
        return output, middle.flatten(2).transpose(1, 2)


def levels(unet: nn.Module, x: Tensor, emb: Tensor, cond) -> tuple[Tensor, Tensor]:
    """(output [B, C, h, w], middle [B, D, h', w']) of a UNet's levels, told `emb` [B, width]."""
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


def _see_scales(unet: nn.Module) -> None:
    """Let the embedding of t see a guidance scale, in the place that diffusers has for it."""
    embedding = unet.time_embedding
    if embedding.cond_proj is None:
        embedding.cond_proj = nn.Linear(SCALES, embedding.linear_1.in_features, bias=False)
        nn.init.zeros_(embedding.cond_proj.weight)
        unet.register_to_config(time_cond_proj_dim=SCALES)


def _waves(w: Tensor) -> Tensor:
    """Sinusoids [B, 256] of a guidance scale [B]."""
    from diffusers.models.embeddings import get_timestep_embedding

    return get_timestep_embedding(SCALE * w, SCALES, downscale_freq_shift=1)


def _middle(unet: nn.Module, side: int) -> tuple[int, int]:
    """The grid of the coarsest level for latents of this side."""
    for _ in unet.config.block_out_channels[1:]:
        side = (side + 1) // 2
    return side, side
