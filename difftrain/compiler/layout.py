"""The flat state: every trained number in one buffer, and modules that see views of it.

One buffer each for weights, moments and the average makes the update a handful of kernels and keeps
the compiled step small. Names of modules and parameters survive in checkpoints.

Weights of matrix products come first: forward passes below fp32 read these from a copy in their own
precision, which the update writes. Weights of convolutions lie with the channel last, as GPUs want.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Slot(NamedTuple):
    """Where one parameter lies in the buffer. Tracing reads a tuple twice as fast as an object."""

    module: str
    name: str
    shape: torch.Size
    start: int
    size: int
    last: bool = False  # whether the channel lies last

    @property
    def key(self) -> str:
        return f"{self.module}.{self.name}"

    def view(self, piece: Tensor) -> Tensor:
        """The parameter in its piece [size] of the buffer."""
        if len(self.shape) == 1:  # one operation less to compile for every bias
            return piece
        if not self.last:
            return piece.view(self.shape)
        out, channels, *sides = self.shape
        return piece.view(out, *sides, channels).movedim(-1, 1)


@dataclass(frozen=True)
class Layout:
    """The slots of all trained parameters, in order; the first `products` numbers of the buffer
    are weights of matrix products. `tied` modules have a weight under two names."""

    slots: tuple[Slot, ...]
    products: int
    tied: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        return sum(s.size for s in self.slots)

    def views(self, *buffers: Tensor) -> dict[str, dict[str, Tensor]]:
        """The parameters of each module as views of the buffer [P], or of its two parts: that of
        matrix products and the rest."""
        parts: dict[str, dict[str, Tensor]] = {}
        for slot, view in self._each(buffers):
            parts.setdefault(slot.module, {})[slot.name] = view
        return parts

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """The buffer by `module.parameter`, for checkpoints."""
        return {slot.key: view for slot, view in self._each((flat,))}

    def _each(self, buffers: Sequence[Tensor]) -> Iterator[tuple[Slot, Tensor]]:
        sizes = [s.size for s in self.slots]
        count = sum(s.start < self.products for s in self.slots) if buffers[1:] else len(sizes)
        split = zip(buffers, (sizes[:count], sizes[count:]), strict=False)
        pieces = chain.from_iterable(buffer.split(part) for buffer, part in split)
        for slot, piece in zip(self.slots, pieces, strict=True):
            yield slot, slot.view(piece)

    def load(self, flat: Tensor, named: Mapping[str, Tensor]) -> None:
        """Fills the buffer from a checkpoint. Raises KeyError for a missing name, ValueError for
        another shape."""
        for slot, view in self._each((flat,)):
            value = named[slot.key]
            if value.shape != slot.shape:
                raise ValueError(
                    f"`{slot.key}` is {list(value.shape)} in the checkpoint,"
                    f" and {list(slot.shape)} here"
                )
            view.copy_(value)

    def copy(self, modules: Mapping[str, nn.Module], flat: Tensor) -> Callable:
        """The student as a function of its inputs, with the parameters of another buffer."""
        return bound(modules["student"], self.views(flat)["student"], "student" in self.tied)

    def bind(self, modules: Mapping[str, nn.Module], *buffers: Tensor) -> dict[str, Callable]:
        """The modules as functions whose trained parameters are `views` of the buffers."""
        views = self.views(*buffers)
        return {n: bound(m, views.get(n, {}), n in self.tied) for n, m in modules.items()}


def bound(module: nn.Module, parameters: Mapping[str, Tensor], tied: bool) -> Callable:
    """The module with these parameters, as a function of its inputs. Looking for further names of
    a weight is half of the time that tracing takes, so that is done where it is `tied`."""
    if not parameters:
        return module

    def call(*args, **named):
        return functional_call(module, parameters, args, named, tie_weights=tied)

    return call


def layout(modules: Mapping[str, nn.Module]) -> Layout:
    """The layout of every parameter of the modules that wants a gradient."""
    found = sorted(
        _trained(modules), key=lambda one: not one[0]
    )  # products first, else as they are
    starts = [0, *accumulate(parameter.numel() for *_, parameter in found)]
    slots = (
        Slot(module, name, p.shape, start, p.numel(), last=product and p.dim() == 4)
        for (product, module, name, p), start in zip(found, starts, strict=False)
    )
    products = sum(p.numel() for product, *_, p in found if product)
    return Layout(tuple(slots), products, frozenset(n for n, m in modules.items() if _ties(m)))


def _ties(module: nn.Module) -> bool:
    """Whether a weight has two names."""
    names = list(module.named_parameters(remove_duplicate=False))
    return len(names) != len(list(module.parameters()))


def _trained(modules: Mapping[str, nn.Module]) -> Iterator[tuple[bool, str, str, nn.Parameter]]:
    """Each parameter that wants a gradient, by module and name, and whether it is a product's."""
    for module, parts in modules.items():
        for name, parameter in parts.named_parameters():
            owner = parts.get_submodule(name.rpartition(".")[0])
            if parameter.requires_grad:
                yield isinstance(owner, PRODUCTS), module, name, parameter


def gather(modules: Mapping[str, nn.Module], plan: Layout, device) -> Tensor:
    """The buffer [P] in fp32 with the modules' own numbers, which then are views of it."""
    flat = torch.empty(plan.size, dtype=torch.float32, device=device)
    own = {f"{m}.{n}": p for m, parts in modules.items() for n, p in parts.named_parameters()}
    plan.load(flat, {s.key: own[s.key].detach() for s in plan.slots})
    for slot, view in plan.named(flat).items():
        own[slot].data = view
    return flat
