"""Tensors kept in a folder from one start to the next, and read only as they were written."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from difftrain.training.state import shared

Say = Callable[[str], object]
warn: Say = logging.getLogger("difftrain").warning


def remembered(
    name: str, key: str, cache: str | Path, make: Callable[[], Tensor], say: Say = warn
) -> Tensor:
    """The tensor of a key out of the folder `cache`, or made and put there. `name` says in a word
    what it holds; a kept file that is not exactly what was written is said and made again."""
    path = Path(cache, f"{name}-{key[:32]}.safetensors")
    found = _kept(path, key, name, say)
    if found is None:
        found = make()
        _keep(path, key, name, found, say)
    return found


def _kept(path: Path, key: str, name: str, say: Say) -> Tensor | None:
    """What a cache file holds, or None where it is not exactly what was written."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            labels, value = file.metadata() or {}, file.get_tensor(name)
    except (SafetensorError, OSError) as cause:
        say(f"the kept {name} `{path}` are damaged ({cause}), encoding again")
        return None
    if labels == {"key": key, "sha256": _digest(value)}:
        return value
    say(f"the kept {name} `{path}` are not what was written there, encoding again")
    return None


def _keep(path: Path, key: str, name: str, value: Tensor, say: Say) -> None:
    """Writes the whole file or none; what cannot be kept can still be trained on."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value}, part, {"key": key, "sha256": _digest(value)})
        shared(part)
        part.replace(path)
    except (SafetensorError, OSError) as cause:
        why = (getattr(cause, "strerror", None) or str(cause)).lower()
        say(f"the {name} cannot be kept in `{path.parent}` ({why}), each start encodes again")
        if part.is_file():
            part.unlink()


def _digest(value: Tensor) -> str:
    return sha256(value.flatten().view(torch.uint8).numpy()).hexdigest()
