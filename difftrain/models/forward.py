"""Foreign networks made ready for forward-mode differentiation (`torch.func.jvp`, compiled)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from difftrain.models.attention import attend


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


class JointAttention:
    """A processor of diffusers' attention: pictures [B, T, D] and text [B, S, D] look at each other
    and themselves (arXiv:2403.03206 section 4), or pictures alone."""

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states=None, **_):
        x, text = hidden_states, encoder_hidden_states
        own = (attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None)
        q, k, v = (_heads(attn, x, *pair) for pair in own)
        if text is None:
            return _out(attn, attend(q, k, v, fused=False))
        more = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        norms = attn.norm_added_q, attn.norm_added_k, None
        added = [_heads(attn, text, *pair) for pair in zip(more, norms, strict=True)]
        pairs = zip((q, k, v), added, strict=True)
        both = attend(*(torch.cat(pair, dim=2) for pair in pairs), fused=False)
        x, text = both[:, : x.shape[1]], both[:, x.shape[1] :]
        return _out(attn, x), text if attn.context_pre_only else attn.to_add_out(text)


def _out(attn, x: Tensor) -> Tensor:
    return attn.to_out[1](attn.to_out[0](x))


def _heads(attn, x: Tensor, project: nn.Module, norm: nn.Module | None) -> Tensor:
    """[B, heads, T, D / heads]."""
    split = project(x).unflatten(2, (attn.heads, -1)).transpose(1, 2)
    return split if norm is None else norm(split)


PLAIN = {nn.GroupNorm: GroupNorm, nn.LayerNorm: LayerNorm}


def differentiable(module: nn.Module) -> None:
    """Replaces what has no forward derivative when it is compiled: fused attention and fused
    normalisation. Weights and their names stay."""
    from diffusers.models.attention_processor import Attention, AttnProcessor

    for child in module.modules():
        if isinstance(child, Attention):
            joint = child.added_kv_proj_dim is not None or child.norm_q is not None
            child.set_processor(JointAttention() if joint else AttnProcessor())
        elif type(child) in PLAIN:
            child.__class__ = PLAIN[type(child)]  # the same weights, called in another way
