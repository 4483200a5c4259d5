"""Matrix products of eight bits for the blocks of transformers.

Numbers are e4m3 (arXiv:2209.05433) with a scale for each row, and sums are fp32. What a layer
answers and the gradient of its input are such products; that of its weight, a sum over all tokens,
stays one of bf16, so x and the gradient of the answer are made small once, along their rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._functorch.utils import enable_single_level_autograd_function

from difftrain.models import still
from difftrain.models.errors import PartError

EIGHT = torch.float8_e4m3fn
LARGEST = torch.finfo(EIGHT).max
LEAST = 1e-30  # greatest number of a row that is 0
ABLE = (8, 9)  # compute capability
BYTES = 16  # what addresses are a multiple of, for the kernels; ours are, others' may not be
SIDES = 16  # both sides of a weight are a multiple of it: what the kernels take


class Linear(still.Linear):
    """A linear layer; with `eight`, weights in bf16 are multiplied in eight bits. Other weights,
    such as averages in fp32, are multiplied as ever."""

    eight = False

    @property
    def fits(self) -> bool:
        return not (self.in_features % SIDES or self.out_features % SIDES)

    def forward(self, x: Tensor) -> Tensor:
        if not self.eight or self.weight.dtype != torch.bfloat16:
            return super().forward(x)
        flat = x.to(torch.bfloat16).flatten(0, -2)
        return torch.ops.difftrain.eight(flat, self.weight, self.bias).unflatten(0, x.shape[:-1])


def turned(network: nn.Module) -> nn.Module:
    """The network, its blocks' products turned to eight bits. Raises PartError for one that has
    none which can be, and on a GPU that cannot take them."""
    _able(next(network.parameters()).device)
    fitting = [m for m in network.modules() if isinstance(m, Linear) and m.fits]
    if not fitting:
        raise PartError(
            "`products = fp8` is for the blocks of our transformers, of widths that are multiples"
            f" of {SIDES}, and this backbone has none: leave it out"
        )
    for layer in fitting:
        layer.eight = True
    return network


def _able(device: torch.device) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= ABLE:
        return
    has, needs = (
        ".".join(map(str, numbers)) for numbers in (torch.cuda.get_device_capability(device), ABLE)
    )
    raise PartError(
        f"`products = fp8` needs a GPU of compute capability {needs}, and this one has {has}: leave"
        " it out"
    )


def rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] in eight bits, each row divided by its scale [M, 1]: the greatest becomes 448."""
    x = x.float()
    greatest = x.abs().amax(dim=1, keepdim=True).clamp(min=LEAST)
    return (x * (LARGEST / greatest)).to(EIGHT).contiguous(), greatest / LARGEST


def product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias=None) -> Tensor:
    """a b' + bias [M, N] in bf16 of a [M, K] and b [N, K] in eight bits, with scales [M, 1] and
    [N, 1], all of them contiguous."""
    return torch.ops.difftrain.eight_product(a, b, scale_a, scale_b, bias)


def _on_gpu(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias=None) -> Tensor:
    if bias is not None and bias.data_ptr() % BYTES:
        bias = bias.clone()
    return torch._scaled_mm(a, b.t(), scale_a, scale_b.t(), bias, out_dtype=torch.bfloat16)


def _on_cpu(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias=None) -> Tensor:
    """The same numbers, multiplied in fp32."""
    with torch.autocast("cpu", enabled=False):
        exact = a.float() @ b.float().t() * scale_a * scale_b.t()
    return (exact if bias is None else exact + bias).to(torch.bfloat16)


def _like_product(a: Tensor, b: Tensor, *rest) -> Tensor:
    return a.new_empty((len(a), len(b)), dtype=torch.bfloat16)


def taken(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x w' + bias for x [M, K], w [N, K] and bias [N] in bf16, of x and w in eight bits."""
    (x, own), (weight, scale) = rows(x), rows(weight)
    return product(x, weight, own, scale, bias)


def pulled(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of w and of the bias, of the `gradient` [M, N] of what was answered."""
    (small, own), (across, scale) = rows(gradient), rows(weight.t())
    return product(small, across, own, scale), gradient.t() @ x, gradient.sum(dim=0)


# ---- as operators. One has a backward of its own and is seen through: of an autograd.Function in
# `torch.func.grad` torch compiles the derivative of its forward, and not its backward (2.11, 2.13).
# The other is the product alone, for which torch's compiler would try many kernels of its own.


class _Product(torch.autograd.function._SingleLevelFunction):
    """The product at one level of nested derivatives."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return taken(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return pulled(gradient, *ctx.saved_tensors)


def _at_level(*given: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*given)):
        return taken(*given)
    with enable_single_level_autograd_function():
        return _Product.apply(*given)


PRODUCT = "Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias"


def _register() -> torch.library.Library:
    library = torch.library.Library("difftrain", "FRAGMENT")
    library.define("eight(Tensor x, Tensor weight, Tensor bias) -> Tensor")
    library.impl("eight", taken, "CompositeExplicitAutograd")
    library.impl("eight", _at_level, "Autograd")
    exact = (torch.Tag.needs_exact_strides,)
    library.define(f"eight_product({PRODUCT}) -> Tensor", tags=exact)
    library.impl("eight_product", _on_gpu, "CUDA")
    library.impl("eight_product", _on_cpu, "CPU")
    torch.library.register_fake("difftrain::eight_product", _like_product, lib=library)
    return library


LIBRARY = _register()  # the operator is there while this is
