"""Stand-ins: small closed forms for every module that an objective may read, in float64.

They answer as the real ones must (row by row, no draws of their own), every input changes what
they return, and they are smooth, so that derivatives can be compared with differences.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

TOKEN_WIDTH = 5  # of what `vision` returns


def _weights(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def _bounded(value: Tensor, like: Tensor) -> Tensor:
    """A time, a scale or an estimate as a number below 1, spread over `like` [B, ...]."""
    value = value.to(like.dtype)
    value = value.reshape(-1, *(1,) * (like.dim() - 1)) if value.dim() == 1 else value
    return torch.tanh(value / 4)


def _tokens(data: Tensor) -> Tensor:
    """Data [B, C, ...] as tokens [B, T, C]."""
    return data.flatten(2).transpose(1, 2)


class Network(nn.Module):
    """A network of any further times and inputs; with `tap` it also returns tokens."""

    def __init__(self, tap: bool = False, shift: float = 0.0):
        super().__init__()
        self.tap = tap
        self.weight = _weights(0.3 + shift, 0.1 - shift, 0.2 + shift, 0.15)

    def forward(self, x: Tensor, t: Tensor, cond=None, masks=None, **further):
        """x [B, C, ...], t [B], cond [B, T, D] or None, further ones [B] or [B, C, ...]."""
        own, time, shown, more = self.weight
        out = torch.tanh(own * x) + time * _bounded(t, x)
        for place, name in enumerate(sorted(further), 1):
            out = out + more / place * _bounded(further[name], x)
        if cond is not None:
            out = out + shown * _bounded(cond.flatten(1).mean(1), x)
        return (out, torch.tanh(_tokens(out))) if self.tap else out


class Features(nn.Module):
    """A frozen view of pictures [B, C, ...]: tokens [B, T, TOKEN_WIDTH], one for each place."""

    def __init__(self):
        super().__init__()
        self.weight = _weights(*(0.3 * k - 0.7 for k in range(TOKEN_WIDTH)))

    def forward(self, image: Tensor) -> Tensor:
        return torch.sin(_tokens(image).mean(-1, keepdim=True) * self.weight + self.weight)


class Head(nn.Module):
    """A trained head on tokens [B, T, D]: tokens [B, T, TOKEN_WIDTH]."""

    def __init__(self):
        super().__init__()
        self.weight = _weights(*(0.5 - 0.2 * k for k in range(TOKEN_WIDTH)))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(tokens.mean(-1, keepdim=True) * self.weight + self.weight.flip(0))


class Level(nn.Module):
    """A trained number for each time value [B]: [B]."""

    def __init__(self):
        super().__init__()
        self.weight = _weights(0.2, -0.1)

    def forward(self, tau: Tensor) -> Tensor:
        return self.weight[0] * torch.tanh(tau.double() / 4) + self.weight[1]


SPECIAL = {"vision": Features, "project": Head, "logvar": Level}


def missing(names: Iterable[str], have: Iterable[str]) -> dict[str, nn.Module]:
    """A stand-in for each module that is read and not there; unknown names are networks."""
    absent = sorted(set(names) - {*have, "student"})
    made = {}
    for place, name in enumerate(absent, 1):
        made[name] = SPECIAL[name]() if name in SPECIAL else Network(shift=0.03 * place)
    return made


class Offset(nn.Module):
    """A plain function as a network with one parameter, which starts at no offset."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.offset = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, *args, **further):
        answer = self.function(*args, **further)
        if isinstance(answer, tuple):
            return (answer[0] + self.offset, *answer[1:])
        return answer + self.offset


def condition() -> tuple[Tensor, Tensor]:
    """A condition and the empty one, [1, T, D] each."""
    cond = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(1, 2, 3)
    return cond, torch.zeros_like(cond)


def in_float64(network, modules: dict) -> tuple[nn.Module, dict]:
    """The modules in float64 and evaluation mode; a plain function becomes a module."""
    network = network if isinstance(network, nn.Module) else Offset(network)
    for module in (network, *modules.values()):
        if isinstance(module, nn.Module):
            module.double().eval()
    return network, modules
