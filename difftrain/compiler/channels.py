"""The derivatives of convolutions with the channel last, as their forwards are on a GPU.

Inductor puts the channel last around a convolution, and hands the tensors of its derivative over as
they lay when the graph was traced. There a group norm leaves the channel first, so each is copied
twice: once by Inductor, once back by cuDNN. docs/performance.md has what that costs.
"""

from __future__ import annotations

import torch

OPERATOR = torch.ops.aten.convolution_backward


def last() -> None:
    """From here on torch's compiler hands them over with the channel last, where it would not do so
    by itself, as from torch 2.13 on."""
    from torch._inductor import lowering

    rule = lowering.maybe_layout_constraints(OPERATOR.default)
    if rule is lowering.constrain_to_fx_strides:
        lowering.add_layout_constraint(OPERATOR, _laid)


def _laid(node, *args, **named):
    """The arguments of a derivative that is lowered, laid as it should read them."""
    from torch._inductor.ir import ExternKernel, IRNode
    from torch._inductor.lowering import constrain_to_fx_strides
    from torch._inductor.virtualized import V

    if not V.graph.layout_opt or args[0].get_device().type != "cuda":
        return constrain_to_fx_strides(node, *args, **named)

    def laid(value):
        flat = isinstance(value, IRNode) and len(value.get_size()) == 4
        return ExternKernel.require_channels_last(value) if flat else value

    return tuple(map(laid, args)), named
