"""Layers of diffusers' networks with the products that a GPU does best: one for all that is read
from one input, two where halves of one would only be taken apart again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difftrain.models.attention import attend
from difftrain.models.still import moved


class OneProduct:
    """A processor of diffusers' attention: x [B, T, D], or a picture [B, D, h, w], looks at itself
    or at text [B, S, C]. q, k and v, or k and v, come of one product with the weights side by side,
    which stay what they are in files. There are no masks. What is not `fused` has a forward-mode
    derivative."""

    def __init__(self, fused: bool = True):
        self.fused = fused

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states=None,
        attention_mask=None,
        temb=None,
    ) -> Tensor:
        picture, x = hidden_states, hidden_states
        if picture.dim() == 4:
            x = picture.flatten(2)
            x = (x if attn.group_norm is None else attn.group_norm(x)).transpose(1, 2)
        if encoder_hidden_states is None:
            q, k, v = _heads(attn, x, attn.to_q, attn.to_k, attn.to_v)
        else:
            (q,) = _heads(attn, x, attn.to_q)
            k, v = _heads(attn, encoder_hidden_states, attn.to_k, attn.to_v)
        x = attn.to_out[1](attn.to_out[0](attend(q, k, v, self.fused)))
        x = x.transpose(1, 2).unflatten(2, picture.shape[2:]) if picture.dim() == 4 else x
        x = x + picture if attn.residual_connection else x
        return x / attn.rescale_output_factor


def _heads(attn, x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """[B, heads, T, D / heads] of each layer."""
    weight = torch.cat([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers]
    bias = None if biases[0] is None else torch.cat(biases)
    made = moved(F.linear, x, weight, bias).unflatten(2, (len(layers), attn.heads, -1))
    return made.permute(0, 2, 3, 1, 4).unbind(1)


class Gated(nn.Module):
    """x [B, T, D] -> [B, T, W]: the first half of a linear layer times the GELU of its second, each
    a product of its own, so that a backward need not put two gradients side by side."""

    def __init__(self, proj: nn.Linear):
        super().__init__()
        self.proj = proj  # called so in files

    def forward(self, x: Tensor) -> Tensor:
        weight, gate = self.proj.weight.chunk(2)
        bias, shift = (None, None) if self.proj.bias is None else self.proj.bias.chunk(2)
        value = moved(F.linear, x, weight, bias)
        return value * F.gelu(moved(F.linear, x, gate, shift))


def arrange_products(module: nn.Module, fused: bool = True) -> None:
    """Lets every attention that looks at one thing at a time, plainly, make one product of it, and
    every gated layer two. Without `fused` all of them have a forward-mode derivative."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention_processor import Attention

    for child in list(module.modules()):
        if isinstance(child, Attention) and _plain(child):
            child.set_processor(OneProduct(fused))
        for name, layer in child.named_children():
            if isinstance(layer, GEGLU):
                setattr(child, name, Gated(layer.proj))


def _plain(attn) -> bool:
    further = (attn.norm_q, attn.norm_k, attn.spatial_norm, attn.added_kv_proj_dim, attn.norm_cross)
    return not any(further) and attn.to_k.out_features == attn.to_v.out_features == (
        attn.to_q.out_features
    )
