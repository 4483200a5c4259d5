"""The state of a run, one flat buffer each for weights, moments and average; its checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from difftrain.compiler.layout import Layout

AVERAGE = "average"
BUFFERS = ("weights", "first", "second", AVERAGE)
FROZEN = "frozen/"  # weights that are not trained, and that nothing else holds
COUNTERS = ("turn", "updates", "calm")
NOTHING: Mapping[str, Tensor] = MappingProxyType({})
SCALE = 2.0**16  # first fp16 loss scale
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FORWARDS = {"fp32": torch.float32, **HALVES}


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message says which, why, and what to do."""


def fresh(
    weights: Tensor, seed: int, steps: int, averages: Iterable[str] = (), precision: str = "fp32"
) -> dict[str, Tensor]:
    """The state before the first step of a run of `steps`, around the weights [P]; `averages` are
    the buffers of further averaged copies. Forward passes below fp32 have a copy of the weights
    in their `precision`, which is in no checkpoint."""
    device = weights.device
    state = {
        "weights": weights,
        "first": torch.zeros_like(weights),
        "second": torch.zeros_like(weights),
        **{name: weights.clone() for name in (AVERAGE, *averages)},
        "scale": torch.tensor(SCALE, device=device),
        "steps": torch.tensor(steps, dtype=torch.int64, device=device),
        "seed": torch.tensor(seed, dtype=torch.int64, device=device),
    }
    state |= {"half": weights.to(HALVES[precision])} if precision in HALVES else {}
    return state | {n: torch.zeros((), dtype=torch.int64, device=device) for n in COUNTERS}


# ---- writing


def save(
    path: Path,
    state: Mapping[str, Tensor],
    plan: Layout,
    facts: Mapping[str, object],
    kept: Mapping[str, Tensor] = NOTHING,
) -> None:
    """Writes a checkpoint under the modules' names, with frozen weights that are `kept`; it appears
    whole or not at all."""
    tensors = {
        f"{buffer}/{name}": value.cpu().contiguous()
        for buffer in buffers(state)
        for name, value in plan.named(state[buffer]).items()
    }
    tensors |= {n: state[n].cpu() for n in (*COUNTERS, "scale", "seed")}
    tensors |= {FROZEN + n: value.cpu().contiguous() for n, value in kept.items()}
    write(path, tensors, facts)


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
    """Writes tensors and what is to be said of them into a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(
        tensors, partial, {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
    )
    shared(partial)
    os.replace(partial, path)


def shared(file: Path) -> None:
    """Lets those read a file, and its group write it, who may do so with its folder: safetensors
    writes for the owner alone."""
    file.chmod(file.parent.stat().st_mode & 0o664)


def buffers(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The names of the buffers [P] of a state."""
    further = (name for name in state if name.startswith(f"{AVERAGE}."))
    return (*BUFFERS, *further)


def forget(folder: Path, keep: int) -> None:
    """Removes all but the newest checkpoints."""
    for old in _all(folder)[:-keep]:
        old.unlink()


# ---- reading


def newest(folder: Path) -> Path | None:
    """The last checkpoint of a run folder, if it has one."""
    return next(reversed(_all(folder)), None)


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoints/*.safetensors"), key=lambda p: p.stem)


def facts(path: Path, graph_hash: str) -> dict[str, str]:
    """What a checkpoint of this graph says of itself. Raises CheckpointError."""
    with opened(path, graph_hash) as file:
        return file.metadata()


def apart(path: Path, manifest: Mapping) -> tuple[str, str, str] | None:
    """The first option in which the network that a checkpoint is of is not that of a manifest, with
    the checkpoint's value and the manifest's; files of older versions do not say."""
    ours = manifest.get("network", {})
    theirs = json.loads(facts(path, manifest["graph"]).get("network", "{}"))
    found = (n for n in ours if n in theirs and theirs[n] != ours[n])
    return next(((n, theirs[n], ours[n]) for n in found), None)


def load(
    path: Path,
    state: dict[str, Tensor],
    plan: Layout,
    graph_hash: str,
    kept: Mapping[str, Tensor] = NOTHING,
) -> None:
    """Fills the state, and frozen weights that are `kept`, from a checkpoint of the same graph.
    Raises CheckpointError."""
    with opened(path, graph_hash) as file:
        if not held(file, "weights/"):
            raise CheckpointError(
                f"`{path}` holds an average, and training goes on from all of its state: resume"
                " from a checkpoint"
            )
        for buffer in buffers(state):
            _fill(file, buffer, state[buffer], plan)
        _restore(file, kept)
        for name in (*COUNTERS, "scale", "seed"):
            state[name].copy_(file.get_tensor(name))
    if "half" in state:
        state["half"].copy_(state["weights"])


def load_average(
    path: Path,
    weights: Tensor,
    plan: Layout,
    graph_hash: str,
    kept: Mapping[str, Tensor] = NOTHING,
) -> None:
    """Fills weights [P] with the averaged ones of a checkpoint, and those that are `kept`. Raises
    CheckpointError."""
    with opened(path, graph_hash) as file:
        _fill(file, AVERAGE, weights, plan)
        _restore(file, kept)


def averaged(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The averaged and the frozen weights of any checkpoint by `module.parameter`, and what it says
    of itself. Raises CheckpointError."""
    with opened(path) as file:
        groups = (f"{AVERAGE}/", FROZEN)
        named = {n: file.get_tensor(start + n) for start in groups for n in held(file, start)}
        return named, file.metadata() or {}


@contextmanager
def opened(path: Path, graph_hash: str | None = None) -> Iterator[safe_open]:
    """A checkpoint, of this graph if one is given, open; whatever is wrong with it is a
    CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            if graph_hash is not None:
                _same_graph(path, (file.metadata() or {}).get("graph", "unknown"), graph_hash)
            yield file
    except FileNotFoundError:  # safetensors says so of every file that it may not open
        if path.exists():
            raise CheckpointError(
                f"the checkpoint `{path}` cannot be read (permission denied): give one that can be"
            ) from None
        raise CheckpointError(f"there is no checkpoint `{path}`: give a file, or `auto`") from None
    except (SafetensorError, OSError) as problem:
        raise CheckpointError(
            f"the checkpoint `{path}` cannot be read ({problem}): it was cut short or is no"
            " checkpoint; give an older one"
        ) from None
    except ValueError as problem:
        raise CheckpointError(
            f"the checkpoint `{path}` does not fit this spec: {problem}"
        ) from None


def _same_graph(path: Path, theirs: str, ours: str) -> None:
    if theirs != ours:
        raise CheckpointError(
            f"the checkpoint `{path}` belongs to another objective (graph {theirs}, and this spec"
            f" is {ours}): use the spec it was made with"
        )


def _fill(file: safe_open, buffer: str, flat: Tensor, plan: Layout) -> None:
    """Reads one buffer [P]. Raises ValueError for a weight that is missing or of another shape."""
    start = f"{buffer}/"
    names = held(file, start)
    lost = next((slot.key for slot in plan.slots if slot.key not in names), None)
    if lost:
        raise ValueError(f"it has no `{lost}`")
    plan.load(flat, {slot.key: file.get_tensor(start + slot.key) for slot in plan.slots})


def held(file: safe_open, start: str) -> set[str]:
    """The names in a file that begin so, without their beginning."""
    return {n.removeprefix(start) for n in list(file.keys()) if n.startswith(start)}


def _restore(file: safe_open, kept: Mapping[str, Tensor]) -> None:
    """Reads frozen weights. Raises ValueError for one that is missing."""
    if lost := sorted(kept.keys() - held(file, FROZEN)):
        raise ValueError(f"it has no `{lost[0]}`")
    for name, value in kept.items():
        value.copy_(file.get_tensor(FROZEN + name))
