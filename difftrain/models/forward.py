"""Foreign networks made ready for forward-mode differentiation (`torch.func.jvp`, compiled)."""

from __future__ import annotations

from torch import Tensor, nn


class GroupNorm(nn.GroupNorm):
    """Group normalisation in plain arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(len(x), self.num_groups, -1)
        unit = _unit(groups, self.eps).reshape(x.shape)
        shape = (1, -1, *(1,) * (x.dim() - 2))
        return unit * self.weight.view(shape) + self.bias.view(shape)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation in plain arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
        x = _unit(x, self.eps)
        x = x if self.weight is None else x * self.weight
        return x if self.bias is None else x + self.bias


def _unit(x: Tensor, eps: float) -> Tensor:
    """x with mean 0 and variance 1 along the last axis."""
    apart = x - x.mean(-1, keepdim=True)
    return apart * (apart.square().mean(-1, keepdim=True) + eps).rsqrt()


PLAIN = {nn.GroupNorm: GroupNorm, nn.LayerNorm: LayerNorm}


def differentiable(module: nn.Module) -> None:
    """Replaces what has no forward derivative when it is compiled: fused attention and fused
    normalisation. Weights and their names stay."""
    from diffusers.models.attention_processor import Attention, AttnProcessor

    for child in module.modules():
        if isinstance(child, Attention):
            child.set_processor(AttnProcessor())
        elif type(child) in PLAIN:
            child.__class__ = PLAIN[type(child)]  # the same weights, called in another way
