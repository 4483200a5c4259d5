"""Linear layers of networks that are differentiated forward, where weights stand still.

torch's forward derivative of a product has a product for the tangent of each side, and takes zeros
where a side has none: one more in every layer, which torch's compiler keeps, since zero times
infinity is no number.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.nn import functional as F

LEVEL = 0  # torch has one; when it is left to look it up, torch.compile remembers there was none


def moved(layer: Callable, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """layer(x, weight, bias), affine in x, beside the tangent layer(that of x, weight)."""
    if not _once() or _moves(weight) or _moves(bias):
        return layer(x, weight, bias)
    primal, along = forward_ad.unpack_dual(x, level=LEVEL)
    if along is None:  # or one that is there when this runs, and was not when it was compiled
        return layer(x, weight, bias)
    value = layer(primal, weight, bias)
    return forward_ad.make_dual(value, layer(along, weight, None), level=LEVEL)


def _once() -> bool:
    """Whether a derivative is taken, and none of a derivative."""
    return eager_transforms.JVP_NESTING == 1


# what torch.compiler.assume_constant_result does, which loads all of the compiler to do it; torch
# counts up while it traces, and would guard what it counted
_once._dynamo_marked_constant = True


def _moves(weight: Tensor | None) -> bool:
    return weight is not None and forward_ad.unpack_dual(weight, level=LEVEL).tangent is not None


class Linear(nn.Linear):
    """torch's, with one product for the tangent."""

    def forward(self, x: Tensor) -> Tensor:
        return moved(F.linear, x, self.weight, self.bias)


class _Convolution:
    def forward(self, x: Tensor) -> Tensor:
        return moved(self._conv_forward, x, self.weight, self.bias)


class Conv1d(_Convolution, nn.Conv1d): ...


class Conv2d(_Convolution, nn.Conv2d): ...


class Conv3d(_Convolution, nn.Conv3d): ...


LAYERS = {nn.Linear: Linear, nn.Conv1d: Conv1d, nn.Conv2d: Conv2d, nn.Conv3d: Conv3d}


def stand(network: nn.Module) -> nn.Module:
    """The network, its layers of torch's turned to those here: the same weights, and values."""
    for child in network.modules():
        if type(child) in LAYERS:
            child.__class__ = LAYERS[type(child)]
    return network
