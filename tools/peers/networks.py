"""The networks of the peers, random, at full width: what the loop of `loop.py` trains.

FROZEN since 2026-11-22: reviewed once, so that what difftrain is measured against does not move.
`unet` is Stable Diffusion 1.5's, `dit` is DiT-XL/2, both as diffusers 0.42 builds them (its DiT has
an embedder in every block, 750 M weights); `own_dit` is difftrain's own DiT-XL/2 (675 M weights),
for the question what the compiled step is worth around an equal network.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Call = Callable[
    [nn.Module, Tensor, Tensor, Tensor], Tensor
]  # (network, x, t, cond) -> [B, C, h, w]


def unet(width: int = 320, layers: int = 2, side: int = 64) -> tuple[nn.Module, Call]:
    """UNet2DConditionModel with the configuration of Stable Diffusion 1.5, told text states
    [B, 77, 768]."""
    from diffusers import UNet2DConditionModel

    network = UNet2DConditionModel(
        sample_size=side,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        layers_per_block=layers,
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    return network, lambda net, x, t, cond: net(x, t, cond, return_dict=False)[0]


def dit(
    width: int = 1152, depth: int = 28, heads: int = 16, side: int = 32
) -> tuple[nn.Module, Call]:
    """DiTTransformer2DModel with patches of 2, told classes [B]. It predicts the noise alone: the
    variances that the published one adds are left out of both sides."""
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=4,
        out_channels=4,
        num_layers=depth,
        sample_size=side,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )

    def call(net: nn.Module, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return net(x, timestep=t, class_labels=cond, return_dict=False)[0]

    return network, call


def own_dit(
    width: int = 1152, depth: int = 28, heads: int = 16, side: int = 32
) -> tuple[nn.Module, Call]:
    """difftrain's transformer of the same size, told classes [B]."""
    from difftrain.models.labels import label
    from difftrain.models.transformer import transformer

    network = transformer(
        depth=depth, width=width, heads=heads, patch=2, text=label(count=1000), size=8 * side
    )
    return network, lambda net, x, t, cond: net(x, t, cond[:, None])


NETWORKS = {"unet": unet, "dit": dit, "own_dit": own_dit}
