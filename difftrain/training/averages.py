"""Snapshots of the averages of a run, and averages of other widths that are made from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from difftrain.compiler.layout import Layout
from difftrain.compiler.step import Recipe
from difftrain.training import state
from difftrain.training.folder import MADE, FolderError, free
from difftrain.training.parts import copy_of
from difftrain.training.profiles import FAR, Profile, reach, shares, width
from difftrain.training.state import AVERAGE, FROZEN, CheckpointError

SNAPSHOTS = "snapshots"
Widths = Mapping[str, float | None]


class AverageError(CheckpointError):
    """An average that cannot be made; the message says why, and what to do."""


def tracked(recipe: Recipe) -> dict[str, float | None]:
    """The width of every average of a run by its buffer; None where it is no power function."""
    buffers = (AVERAGE, *map(copy_of, recipe.further))
    return dict(zip(buffers, map(width, recipe.averages), strict=True))


# ---- writing


def keep(
    folder: Path,
    current: Mapping[str, Tensor],
    plan: Layout,
    facts: Mapping[str, object],
    kept: Mapping[str, Tensor],
    widths: Widths,
) -> Path:
    """Writes a snapshot of every average of a state into a run's folder, for good.

    In fp16, as arXiv:2312.02696 does: an average that is made of snapshots is a sum with factors of
    the order of 1, so it has about as many digits, and hardly a network computes with more.
    """
    tensors = {
        f"{buffer}/{name}": _short(value.cpu())
        for buffer in widths
        for name, value in plan.named(current[buffer]).items()
    }
    tensors |= {FROZEN + name: value.cpu().contiguous() for name, value in kept.items()}
    about = {"updates": str(int(current["updates"])), "widths": widths}
    path = folder / SNAPSHOTS / f"step-{int(facts['step']):09d}.safetensors"
    state.write(path, tensors, {**facts, **about})
    return path


def _short(value: Tensor) -> Tensor:
    """The tensor in fp16, or as it is where a number is too large for that."""
    short = value.contiguous().half()
    return short if short.isfinite().all() else value.contiguous()


# ---- reading


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One snapshot, and what it says of itself."""

    path: Path
    facts: Mapping[str, str]

    @property
    def step(self) -> int:
        return int(self.facts["step"])

    @property
    def updates(self) -> int:
        return int(self.facts["updates"])

    @property
    def profiles(self) -> dict[Profile, tuple[Snapshot, str]]:
        """Where the average of each profile lies, of those that are power functions."""
        widths = json.loads(self.facts["widths"]).items()
        return {Profile(self.updates, std): (self, name) for name, std in widths if std}


def snapshots(run: Path) -> list[Snapshot]:
    """The snapshots of a run by step, those with at least one update. Raises CheckpointError."""
    found = []
    for path in sorted(run.glob(f"{SNAPSHOTS}/*.safetensors"), key=lambda p: p.stem):
        with state.opened(path) as file:
            found.append(Snapshot(path, file.metadata()))
    return [snapshot for snapshot in found if snapshot.updates]


# ---- other widths


def reconstruct(
    run: str,
    std: float,
    say: Callable[[str], object],
    step: int | None = None,
    out: str | None = None,
) -> Path:
    """A file with the average of a run that has this width after `step` steps, or at its newest
    snapshot. Raises FolderError and CheckpointError."""
    last, given = _given(run, step)
    profiles, wanted = list(given), Profile(last.updates, std)
    factors, off = shares(profiles, wanted)
    if off > FAR:
        low, high = reach(profiles, last.updates)
        raise AverageError(
            f"the snapshots of `{run}` cannot be put together to an average of width {std:g} (what"
            f" comes nearest is {off:.0%} off): choose one between {low:.2g} and {high:.2g}"
        )
    name = f"std-{std:g}-step-{last.step:09d}.safetensors"
    path = Path(out) if out else Path(run) / MADE / name
    free(path, _made, "is no average that `difftrain ema` wrote")
    facts = {n: v for n, v in last.facts.items() if n not in ("widths", "updates")}
    facts |= {"width": f"{std:g}"}
    state.write(path, _sum(last, list(given.values()), factors.tolist()), facts)
    say(f"width {std:g} at step {last.step} of {len(given)} averages, {off:.2%} off its profile")
    return path


def _made(path: Path) -> bool:
    """Whether a file is an average that was made here, by what it says of itself."""
    try:
        with state.opened(path) as file:
            return "width" in (file.metadata() or {})
    except CheckpointError:
        return False


def _given(run: str, step: int | None) -> tuple[Snapshot, dict[Profile, tuple[Snapshot, str]]]:
    """The snapshot of a step, and where every average up to there lies."""
    if not Path(run).is_dir():
        raise FolderError(f"there is no run `{run}`: give a folder that training wrote")
    found = snapshots(Path(run))
    if not found:
        raise AverageError(
            f"`{run}` has no snapshots: train with `snapshots_every` in `train`, such as"
            " `snapshots_every = 1000`"
        )
    last = _at(found, step, run)
    given: dict[Profile, tuple[Snapshot, str]] = {}
    for snapshot in found[: found.index(last) + 1]:
        given |= snapshot.profiles
    if not any(profile.updates == last.updates for profile in given):
        raise AverageError(
            f"the averages of `{run}` are no power functions of the step, and only those can be put"
            " together: train with `ema = [ema_power(0.05), ema_power(0.10)]`"
        )
    return last, given


def _at(found: list[Snapshot], step: int | None, run: str) -> Snapshot:
    if step is None:
        return found[-1]
    for snapshot in found:
        if snapshot.step == step:
            return snapshot
    steps = [str(snapshot.step) for snapshot in found]
    listed = ", ".join(steps if len(steps) <= 6 else [*steps[:3], "…", *steps[-2:]])
    raise AverageError(f"`{run}` has no snapshot of step {step}: choose one of {listed}")


def _sum(
    last: Snapshot, places: Sequence[tuple[Snapshot, str]], factors: Sequence[float]
) -> dict[str, Tensor]:
    """The tensors of a checkpoint that holds one average, summed in float64 tensor by tensor, and
    the frozen weights."""
    with ExitStack() as stack:
        paths = {snapshot.path for snapshot, _ in places}
        files = {path: stack.enter_context(state.opened(path)) for path in paths}

        def total(name: str) -> Tensor:
            parts = (
                factor * files[snapshot.path].get_tensor(f"{buffer}/{name}").double()
                for factor, (snapshot, buffer) in zip(factors, places, strict=True)
            )
            return sum(parts, torch.zeros((), dtype=torch.float64)).float()

        newest = files[last.path]
        frozen = {FROZEN + n: newest.get_tensor(FROZEN + n) for n in state.held(newest, FROZEN)}
        return frozen | {f"{AVERAGE}/{n}": total(n) for n in state.held(newest, f"{AVERAGE}/")}
