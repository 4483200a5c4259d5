"""Attention that carries a forward-mode tangent through fused kernels.

The values are a fused kernel of torch's; the tangent is an operator of its own, on a GPU a Triton
kernel (`tangent_kernel`), which needs of the values no more than their log-sum-exp.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.nn import functional as F

from difftrain.models.still import LEVEL

WIDEST = 128  # numbers of a head, what the kernel keeps in registers
SPACE, NAME = "difftrain", "attention_tangent"  # of the operator


def plain_because(q: Tensor, v: Tensor) -> str:
    """Why attention that is differentiated forward is plain matrix products; empty where it is not.

    q, v [B, H, T, d] as they arrive: the one place that decides.
    """
    if q.device.type != "cuda":
        return "the kernel needs a CUDA GPU"
    if v.dtype not in (torch.bfloat16, torch.float16):
        return "the kernel computes in bf16 and fp16"
    if q.shape[-1] % 8 or q.shape[-1] > WIDEST:
        return f"the kernel takes heads of a multiple of 8 numbers, {WIDEST} at most"
    if eager_transforms.JVP_NESTING > 1:
        return "a derivative of a derivative is taken"
    return "" if _able() else "the kernel needs Triton and a GPU of compute capability 8.0"


def _able() -> bool:
    return find_spec("triton") is not None and torch.cuda.get_device_capability() >= (8, 0)


# what torch.compiler.assume_constant_result does, which loads all of the compiler to do it
_able._dynamo_marked_constant = True


def fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The values [B, H, T, d] of attention, and the log-sum-exp [B, H, T] of its scores, by the
    kernel of torch's that was the fastest for such heads (`tools/bench_attention.py`)."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return (cudnn if q.shape[-1] % 64 == 0 else flash)(q, k, v)


def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What `fused` gives, by flash attention."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What `fused` gives, by cuDNN."""
    o, logsumexp = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    return o, logsumexp.reshape(o.shape[:3])


def carried(q: Tensor, k: Tensor, v: Tensor, values=fused) -> Tensor:
    """softmax(q k / sqrt(d)) v with the tangent that follows from those of q [B, H, T, d] and
    k, v [B, H, S, d]: [B, H, T, d] in the precision of v. `values` is a kernel without tangent."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    pairs = [forward_ad.unpack_dual(x, level=LEVEL) for x in (q, k, v)]
    if all(pair.tangent is None for pair in pairs):
        return F.scaled_dot_product_attention(q, k, v)
    primals = [pair.primal for pair in pairs]
    tangents = [torch.zeros_like(p) if t is None else t for p, t in pairs]
    o, logsumexp = values(*primals)
    return forward_ad.make_dual(o, _operator()(*primals, *tangents, o, logsumexp), level=LEVEL)


# ---- the tangent, as arithmetic


def tangent(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor) -> Tensor:
    """The tangent [B, H, T, d] of attention along (tq, tk, tv)."""
    p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
    return _along(p, p @ v, q, k, v, tq, tk, tv)


def from_logsumexp(q, k, v, tq, tk, tv, o: Tensor, logsumexp: Tensor) -> Tensor:
    """The same from attention's values o and the log-sum-exp [B, H, T] of its scores."""
    p = (q @ k.mT * q.shape[-1] ** -0.5 - logsumexp[..., None]).exp().to(q.dtype)
    return torch.empty_like(o).copy_(_along(p, o, q, k, v, tq, tk, tv))


def _along(p: Tensor, o: Tensor, q, k, v, tq, tk, tv) -> Tensor:
    """Of o = p v with p = softmax(s): h v - sum(h) o + p tv, where h = p * ts."""
    h = p * ((tq @ k.mT + q @ tk.mT) * q.shape[-1] ** -0.5)
    return h @ v - h.sum(dim=-1, keepdim=True) * o + p @ tv


def _on_gpu(*tensors: Tensor) -> Tensor:
    from difftrain.models.tangent_kernel import launch

    with torch.cuda.device_of(tensors[0]):
        return launch(*tensors, _like_values(*tensors))


# ---- the tangent, as an operator that functorch and torch.compile take as one


def _operator():
    return torch.ops.difftrain.attention_tangent.default


class _Tangent(torch.autograd.function._SingleLevelFunction):
    """The operator at one level of nested derivatives.

    What `torch.library` would write for us refuses to work inside `torch.func`, and a whole
    autograd.Function inside `torch.func.jvp` loses its backward when it is compiled.
    """

    @staticmethod
    def forward(keyset, *tensors: Tensor) -> Tensor:
        return _below(keyset, tensors)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[1:7])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        """Seldom wanted, since targets stop it, and then in plain arithmetic."""
        _, pull = torch.func.vjp(tangent, *ctx.saved_tensors)
        return None, *pull(gradient), None, None


def _below(keyset, tensors: tuple[Tensor, ...]) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return _operator().redispatch(keyset & torch._C._after_autograd_keyset, *tensors)


def _like_values(*tensors: Tensor) -> Tensor:
    """Room for the tangent, laid out as o, beside which it will stand."""
    return torch.empty_like(tensors[6])


def _at_level(keyset, *tensors: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)):
        return _below(keyset, tensors)
    with enable_single_level_autograd_function():
        return _Tangent.apply(keyset, *tensors)


def _register() -> torch.library.Library:
    library = torch.library.Library(SPACE, "FRAGMENT")
    names = ("q", "k", "v", "tq", "tk", "tv", "o", "logsumexp")
    library.define(f"{NAME}({', '.join(f'Tensor {name}' for name in names)}) -> Tensor")
    library.impl(NAME, from_logsumexp, "CPU")
    library.impl(NAME, _on_gpu, "CUDA")
    library.impl(NAME, _at_level, "Autograd", with_keyset=True)
    torch.library.register_fake(f"{SPACE}::{NAME}", _like_values, lib=library)
    return library


LIBRARY = _register()  # the operator is there while this is
