"""What tells modules apart that may give different answers."""

from __future__ import annotations

from hashlib import sha256

import torch
from torch import nn


def fingerprint(module: nn.Module, *further: object) -> str:
    """A hash of all weights and buffers of a module, and of what else its answers depend on."""
    digest = sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for thing in further:
        digest.update(repr(thing).encode())
    return digest.hexdigest()
