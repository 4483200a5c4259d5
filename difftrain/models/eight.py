"""Matrix products of eight bits for the blocks of transformers.

Numbers are e4m3 (arXiv:2209.05433) with a scale for each row, a power of two, and sums are fp32.
Each tensor is made small once. What a product of a backward reads turned, the weight for the
gradient of x and both sides for that of the weight, is the same numbers with one scale for all:
what moves between powers of two keeps its digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch.utils import enable_single_level_autograd_function
from torch.nn import functional as F

from difftrain.models import still
from difftrain.models.errors import PartError

EIGHT = torch.float8_e4m3fn
LEAST = 1e-30  # greatest number of a row that is 0
EXPONENT = 0x7F800000  # its bits in a number of fp32
GREATEST = 128  # what the greatest of a row becomes at least, and less than twice that; 448 fits
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

    @property
    def small(self) -> bool:
        return self.eight and self.weight.dtype == torch.bfloat16

    def forward(self, x: Tensor) -> Tensor:
        if not self.small:
            return super().forward(x)
        return _tokens(torch.ops.difftrain.eight, x, self.weight, self.bias)


def perceptron(x: Tensor, first: Linear, second: Linear) -> Tensor:
    """second(gelu(first(x))) of two layers that are `small`: GELU is computed once for each number,
    where layers by themselves would look for the greatest of a row first."""
    weights = (first.weight, first.bias, second.weight, second.bias)
    return _tokens(torch.ops.difftrain.eight_gelu, x, *weights)


def _tokens(operator: Callable, x: Tensor, *weights: Tensor) -> Tensor:
    """What an operator of rows [M, K] in bf16 gives for tokens [..., K]."""
    flat = x.to(torch.bfloat16).flatten(0, -2)
    return operator(flat, *weights).unflatten(0, x.shape[:-1])


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


class Small(NamedTuple):
    """A matrix in eight bits: numbers [M, K], and the scales [M, 1] of its rows, or one [1, 1] for
    all. Scales are powers of two, and multiply."""

    numbers: Tensor
    scale: Tensor


def rows(x: Tensor, within: Tensor | None = None) -> Small:
    """x [M, K] in eight bits with a scale for each row. `within` [M, K] is what is quicker to look
    through, if anything is: no number of x is 1.7 times the greatest in its row."""
    greatest = (x if within is None else within).abs().amax(dim=1, keepdim=True)
    greatest = greatest.float().clamp(min=LEAST)
    power = (greatest.view(torch.int32) & EXPONENT).view(torch.float32)  # without the fraction
    numbers = (x.float() * (GREATEST / power)).to(EIGHT)
    return Small(_kept(numbers.contiguous()), power / GREATEST)


def columns(x: Small) -> Small:
    """The same numbers turned, [K, M] and filled up with 0, with one scale. Those that are less
    than a 2^13th of the greatest are rounded again."""
    scale = x.scale.amax(dim=0, keepdim=True)
    numbers = F.pad(x.numbers.float() * (x.scale / scale), (0, 0, 0, -len(x.numbers) % SIDES))
    return Small(numbers.to(EIGHT).t().contiguous(), scale)


def _kept(x: Tensor) -> Tensor:
    """The same, which torch's compiler then writes once instead of making it for every reader."""
    return x.as_strided(x.shape, x.stride())


def product(a: Small, b: Small, bias: Tensor | None = None) -> Tensor:
    """a b' + bias [M, N] in bf16 of a [M, K], b [N, K] and bias [N]: all contiguous, with a scale
    for each row of both, or one for each."""
    return torch.ops.difftrain.eight_product(a.numbers, b.numbers, a.scale, b.scale, bias)


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


# ---- what layers answer, with what their derivatives will want


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """x w' + bias for x [M, K], w [N, K] and bias [N] in bf16."""
    small = rows(x), rows(weight)
    return product(*small, bias), (*small[0], *small[1])


def _linear_pulled(gradient: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
    return _pulled(rows(gradient), *_pairs(kept))


def _pulled(gradient: Small, x: Small, weight: Small) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of w and of the bias, of the `gradient` [M, N] of x w' + bias."""
    of_weight = product(columns(gradient), columns(x))
    across, scale = columns(weight)
    of_x = product(gradient, Small(across, scale.expand(len(across), 1).contiguous()))
    of_bias = (gradient.numbers.float() * gradient.scale).sum(dim=0).to(torch.bfloat16)
    return of_x, of_weight, of_bias


def _pairs(tensors: Sequence[Tensor]) -> list[Small]:
    return [Small(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)]


RISE, BEND = math.sqrt(8 / math.pi), 0.044715  # of GELU by tanh, arXiv:1606.08415 section 2


def _gelu(
    x: Tensor, weight: Tensor, bias: Tensor, second: Tensor, last: Tensor
) -> tuple[Tensor, Sequence[Tensor]]:
    """gelu(x w' + bias) second' + last. |gelu(y)| <= |y| and |gelu'(y)| < 1.13: so y, and below the
    gradient of gelu(y), say what rows can reach."""
    y, kept = _linear(x, weight, bias)
    hidden, second = rows(y.float() * _gate(y.float()), within=y), rows(second)
    return product(hidden, second, last), (y, *kept, *hidden, *second)


def _gelu_pulled(gradient: Tensor, y: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
    x, weight, hidden, second = _pairs(kept)
    of_hidden, *of_second = _pulled(rows(gradient), hidden, second)
    of_y = rows(of_hidden.float() * _slope(y.float()), within=of_hidden)
    return *_pulled(of_y, x, weight), *of_second


def _gate(y: Tensor) -> Tensor:
    """gelu(y) / y: (1 + tanh u) / 2 is sigmoid(2 u), which is fewer instructions."""
    return torch.sigmoid(y * (RISE + RISE * BEND * y.square()))


def _slope(y: Tensor) -> Tensor:
    """gelu'(y)."""
    gate = _gate(y)
    return gate + y * gate * (1 - gate) * (RISE + 3 * RISE * BEND * y.square())


# ---- as operators. Two have backwards of their own and are seen through: of autograd.Functions in
# `torch.func.grad` torch compiles the derivative of the forward, and not its backward (2.11, 2.13).
# The third is the product alone, for which torch's compiler would try many kernels of its own.


def _plain(answered: Callable) -> Callable[..., Tensor]:
    return lambda *given: answered(*given)[0]


def _at_level(answered: Callable, pulled: Callable) -> Callable[..., Tensor]:
    """What is answered, with its backward at one level of nested derivatives."""

    class Level(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx, *given: Tensor) -> Tensor:
            answer, kept = answered(*given)
            ctx.save_for_backward(*kept)
            return answer

        @staticmethod
        def backward(ctx, gradient: Tensor):
            return pulled(gradient, *ctx.saved_tensors)

    def at_level(*given: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*given)):
            return _plain(answered)(*given)
        with enable_single_level_autograd_function():
            return Level.apply(*given)

    return at_level


LAYERS = {
    "eight(Tensor x, Tensor weight, Tensor bias) -> Tensor": (_linear, _linear_pulled),
    "eight_gelu(Tensor x, Tensor weight, Tensor bias, Tensor second, Tensor last) -> Tensor": (
        _gelu,
        _gelu_pulled,
    ),
}
PRODUCT = "Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? bias"


def _register() -> torch.library.Library:
    library = torch.library.Library("difftrain", "FRAGMENT")
    for declared, (answered, pulled) in LAYERS.items():
        name = library.define(declared)
        library.impl(name, _plain(answered), "CompositeExplicitAutograd")
        library.impl(name, _at_level(answered, pulled), "Autograd")
    exact = (torch.Tag.needs_exact_strides,)
    library.define(f"eight_product({PRODUCT}) -> Tensor", tags=exact)
    library.impl("eight_product", _on_gpu, "CUDA")
    library.impl("eight_product", _on_cpu, "CPU")
    torch.library.register_fake("difftrain::eight_product", _like_product, lib=library)
    return library


LIBRARY = _register()  # the operators are there while this is
