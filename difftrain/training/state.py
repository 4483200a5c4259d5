"""The state of a run: one flat buffer each for weights, moments and average, and its checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from difftrain.compiler.layout import Layout

BUFFERS = ("weights", "first", "second", "average")
COUNTERS = ("turn", "updates", "calm")
SCALE = 2.0**16  # first fp16 loss scale


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says which, why, and what to do."""


def fresh(weights: Tensor, seed: int, steps: int) -> dict[str, Tensor]:
    """The state before the first step of a run of `steps`, around the weights [P]."""
    device = weights.device
    state = {
        "weights": weights,
        "first": torch.zeros_like(weights),
        "second": torch.zeros_like(weights),
        "average": weights.clone(),
        "scale": torch.tensor(SCALE, device=device),
        "steps": torch.tensor(steps, dtype=torch.int64, device=device),
        "seed": torch.tensor(seed, dtype=torch.int64, device=device),
    }
    return state | {n: torch.zeros((), dtype=torch.int64, device=device) for n in COUNTERS}


def save(path: Path, state: Mapping[str, Tensor], plan: Layout, facts: Mapping[str, object]) -> None:
    """Writes a checkpoint under the modules' names; it appears whole or not at all."""
    tensors = {
        f"{buffer}/{name}": value.cpu().contiguous()
        for buffer in BUFFERS
        for name, value in plan.named(state[buffer]).items()
    }
    tensors |= {n: state[n].cpu() for n in (*COUNTERS, "scale", "seed")}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()})
    os.replace(partial, path)


def load(path: Path, state: dict[str, Tensor], plan: Layout, graph_hash: str) -> None:
    """Fills the state from a checkpoint of the same graph. Raises CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint `{path}`: give a file, or `auto`") from None
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(
            f"the checkpoint `{path}` cannot be read ({problem}): it was cut short or is no"
            " checkpoint; resume from an older one"
        ) from None
    if facts.get("graph") != graph_hash:
        raise CheckpointError(
            f"the checkpoint `{path}` belongs to another objective (graph {facts.get('graph', 'unknown')},"
            f" and this spec is {graph_hash}): resume with the spec it was made with"
        )
    try:
        for buffer in BUFFERS:
            part = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{buffer}/")}
            plan.load(state[buffer], part)
        for name in (*COUNTERS, "scale", "seed"):
            state[name].copy_(tensors[name])
    except (KeyError, ValueError) as problem:
        raise CheckpointError(f"the checkpoint `{path}` does not fit this spec: {problem}") from None


def newest(folder: Path) -> Path | None:
    """The last checkpoint of a run folder, if it has one."""
    found = sorted(folder.glob("checkpoints/*.safetensors"), key=lambda p: p.stem)
    return found[-1] if found else None


def forget(folder: Path, keep: int) -> None:
    """Removes all but the newest checkpoints."""
    for old in sorted(folder.glob("checkpoints/*.safetensors"), key=lambda p: p.stem)[:-keep]:
        old.unlink()
