"""The flat state: every trained number in one buffer, and modules that see views of it.

One buffer each for weights, moments and the average makes the update a handful of kernels and keeps
the compiled step small. Names of modules and parameters survive in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the buffer."""

    module: str
    name: str
    shape: torch.Size
    start: int
    size: int

    @property
    def key(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Layout:
    """The slots of all trained parameters, in order."""

    slots: tuple[Slot, ...]

    @property
    def size(self) -> int:
        return sum(s.size for s in self.slots)

    def views(self, flat: Tensor) -> dict[str, dict[str, Tensor]]:
        """The parameters of each module as views of the buffer [P]."""
        parts: dict[str, dict[str, Tensor]] = {}
        pieces = flat.split([s.size for s in self.slots])
        for slot, piece in zip(self.slots, pieces, strict=True):
            parts.setdefault(slot.module, {})[slot.name] = piece.view(slot.shape)
        return parts

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """The buffer by `module.parameter`, for checkpoints."""
        pieces = flat.split([s.size for s in self.slots])
        return {s.key: p.view(s.shape) for s, p in zip(self.slots, pieces, strict=True)}

    def load(self, flat: Tensor, named: Mapping[str, Tensor]) -> None:
        """Fills the buffer from a checkpoint. Raises KeyError for a missing name, ValueError for
        another shape."""
        for slot, piece in zip(self.slots, flat.split([s.size for s in self.slots]), strict=True):
            value = named[slot.key]
            if value.shape != slot.shape:
                raise ValueError(
                    f"`{slot.key}` is {list(value.shape)} in the checkpoint,"
                    f" and {list(slot.shape)} here"
                )
            piece.view(slot.shape).copy_(value)

    def copy(self, modules: Mapping[str, nn.Module], flat: Tensor) -> Callable:
        """The student as a function of its inputs, with the parameters of another buffer."""
        return bound(modules["student"], self.views(flat)["student"])

    def bind(self, modules: Mapping[str, nn.Module], flat: Tensor) -> dict[str, Callable]:
        """The modules as functions whose trained parameters are views of the buffer."""
        views = self.views(flat)
        return {name: bound(module, views.get(name, {})) for name, module in modules.items()}


def bound(module: nn.Module, parameters: Mapping[str, Tensor]) -> Callable:
    """The module with these parameters, as a function of its inputs."""
    if not parameters:
        return module

    def call(*args, **named):
        return functional_call(module, parameters, args, named)

    return call


def layout(modules: Mapping[str, nn.Module]) -> Layout:
    """The layout of every parameter of the modules that wants a gradient."""
    slots: list[Slot] = []
    start = 0
    for module, parts in modules.items():
        for name, parameter in parts.named_parameters():
            if parameter.requires_grad:
                slots.append(Slot(module, name, parameter.shape, start, parameter.numel()))
                start += parameter.numel()
    return Layout(tuple(slots))


def gather(modules: Mapping[str, nn.Module], plan: Layout, device) -> Tensor:
    """The buffer [P] in fp32 with the modules' own numbers, which then are views of it."""
    flat = torch.empty(plan.size, dtype=torch.float32, device=device)
    own = {f"{m}.{n}": p for m, parts in modules.items() for n, p in parts.named_parameters()}
    plan.load(flat, {s.key: own[s.key].detach() for s in plan.slots})
    for slot, view in plan.named(flat).items():
        own[slot].data = view
    return flat
