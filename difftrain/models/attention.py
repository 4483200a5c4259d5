"""Attention and the layers beside it, each in the ways that published transformers differ."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difftrain.models.eight import Linear, perceptron
from difftrain.models.tangent_attention import carried, plain_because

EPS = 1e-6


class RmsNorm(nn.RMSNorm):
    """RMS normalisation in plain arithmetic: torch's fused kernel has no forward derivative."""

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        unit = exact * (exact.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (unit * self.weight).to(x.dtype)


def norm(kind: str, width: int) -> nn.Module:
    """A normalisation over the last dimension: `layer` without weights, or `rms` with them."""
    rms = kind == "rms"
    return RmsNorm(width, eps=EPS) if rms else nn.LayerNorm(width, EPS, elementwise_affine=False)


def attend(q: Tensor, k: Tensor, v: Tensor, fused: bool, math: bool = False) -> Tensor:
    """softmax(q k / sqrt(d)) v for q [B, H, T, d] and k, v [B, H, S, d]: [B, T, H * d].

    torch's fused kernels are fast and have no forward-mode derivative. What is not to be `fused`
    has one: through our own kernel where `plain_because` says nothing against it. With `math` it
    is matrix products everywhere.
    """
    if math or not fused and plain_because(q, v):
        mixed = plain(q, k, v)
    else:
        mixed = (F.scaled_dot_product_attention if fused else carried)(q, k, v)
    return mixed.transpose(1, 2).flatten(2)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as matrix products, [B, H, T, d]: they have every derivative."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return scores.softmax(dim=-1) @ v


def turn(x: Tensor, rotation: Tensor) -> Tensor:
    """x [B, H, T, d] with each pair of neighbours turned by an angle: rotation [2, T, d]."""
    cos, sin = rotation
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    beside = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (x * cos + beside * sin).to(x.dtype)


class SelfAttention(nn.Module):
    """Tokens [B, T, width] that look at each other in a `way` of `attend`; q, k and v come of one
    matrix product."""

    def __init__(self, width: int, heads: int, *, qk_norm: str = "", **way: bool):
        super().__init__()
        self.heads, self.way = heads, way
        self.qkv = Linear(width, 3 * width)
        self.q_norm, self.k_norm = (_head_norm(qk_norm, width // heads) for _ in "qk")
        self.proj = Linear(width, width)
        self.proj_drop = nn.Dropout()

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        q, k, v = _parted(self.qkv(x), 3, self.heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = turn(q, rotation), turn(k, rotation)
        return self.proj_drop(self.proj(attend(q, k, v, **self.way)))


def _parted(product: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[B, heads, T, D] each, of one product [B, T, parts * heads * D]. They are parted behind the
    batch: engine libraries then make one product, where parts in front of it become three."""
    return product.unflatten(2, (parts, heads, -1)).permute(0, 2, 3, 1, 4).unbind(1)


def _head_norm(kind: str, width: int) -> nn.Module:
    """What q and k are normalised by (arXiv:2302.05442); unlike `norm` it always has weights."""
    match kind:
        case "":
            return nn.Identity()
        case "layer":
            return nn.LayerNorm(width)
    return norm(kind, width)


class CrossAttention(nn.Module):
    """Tokens [B, T, width] that look at text [B, S, width] (arXiv:2310.00426)."""

    def __init__(self, width: int, heads: int, **way: bool):
        super().__init__()
        self.heads, self.way = heads, way
        self.q, self.kv = Linear(width, width), Linear(width, 2 * width)
        self.proj = Linear(width, width)
        self.proj_drop = nn.Dropout()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = _parted(self.kv(text), 2, self.heads)
        return self.proj_drop(self.proj(attend(q, k, v, **self.way)))


class Gelu(nn.Module):
    """The two-layer perceptron of DiT, tokens [B, T, width] to the same."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        if self.fc1.small and self.fc2.small and isinstance(self.drop, nn.Identity):
            return perceptron(x, self.fc1, self.fc2)
        return self.fc2(self.drop(F.gelu(self.fc1(x), approximate="tanh")))


class SwiGlu(nn.Module):
    """The gated perceptron of arXiv:2002.05202, as wide as two thirds of `hidden`."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        inner = 2 * hidden // 3
        self.w12, self.w3 = Linear(width, 2 * inner), Linear(inner, width)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.drop(F.silu(gate) * value))
