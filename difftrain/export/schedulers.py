"""The scheduler of diffusers that goes through the times and levels of a solver of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import signature

import torch
from torch import Tensor

from difftrain.export.errors import ExportError
from difftrain.language.part import Part
from difftrain.language.spec import Objective
from difftrain.models.pretrained import PREDICTIONS
from difftrain.sampling import grids
from difftrain.sampling.model import Levels
from difftrain.training.bundle import Bundle

THEIRS = {ours: theirs for theirs, ours in PREDICTIONS.items()}
SPACINGS = {"trailing": "trailing", "leading": "leading", "uniform": "linspace"}
# A solver, and what makes the same moves: the first that goes through the same times is taken.
# DDIM's own scheduler moves by whole strides; of order 1 the other one is the same without noise.
MOVES = {
    "ddim": (("DDIMScheduler", {}), ("DPMSolverMultistepScheduler", {"solver_order": 1})),
    "dpm_solver_pp": (("DPMSolverMultistepScheduler", {"solver_order": 2}),),
    "multistep": (("LCMScheduler", {}),),
}
PLAIN = {"clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1}
CLOSE = {"rtol": 1e-4, "atol": 2e-6}  # of alpha^2: diffusers keeps it in float32
POWERS = {"linear": 1, "scaled_linear": 2}  # betas are even in their root of this order
HALVINGS = 60
NOTHING = 1e-12


def scheduler(bundle: Bundle, objective: Objective, solver: Part):
    """The scheduler with the levels of the process, that walks as the solver does. Raises
    ExportError."""
    if solver.module not in MOVES:
        known = ", ".join(f"`{name}`" for name in MOVES)
        raise ExportError(
            f"no scheduler of diffusers makes the moves of `{solver.module}`: use one of {known}"
        )
    made = bundle.module("levels.py")
    levels = Levels(made.compute, made.tables())
    config = {**PLAIN, **_process(bundle, levels), "prediction_type": _prediction(objective)}
    grid = grids.grid(tuple(bundle.manifest["time"]), solver.options, levels).tolist()
    config["timestep_spacing"] = SPACINGS[grids.chosen(bundle.manifest["time"], solver.options)]
    for found in _candidates(config, solver):
        if _times(found, len(grid) - 1) == grid:
            return found
    count = config["num_train_timesteps"]
    raise ExportError(
        f"no scheduler of diffusers goes through the times of `{solver.module}` in"
        f" {len(grid) - 1} steps: use `grid = trailing`, and a number of steps that divides {count}"
    )


def _candidates(config: Mapping, solver: Part) -> Iterator:
    import diffusers

    noisy, zero = solver.options.get("eta", 0) > 0, config["rescale_betas_zero_snr"]
    for name, more in MOVES[solver.module]:
        order = more.get("solver_order", 0)
        if order == 2 and zero:
            raise ExportError(
                "diffusers has no second order step from a last level without signal, which"
                f" `{solver.module}` takes here: use `ddim`"
            )
        if not (noisy and order):
            whole = {**config, **more, "original_inference_steps": config["num_train_timesteps"]}
            kind = getattr(diffusers, name)
            yield kind(**{k: v for k, v in whole.items() if k in signature(kind).parameters})


def _times(scheduler, steps: int) -> list[int]:
    """The times of a scheduler and those that it moves to, the clean end being -1."""
    try:
        scheduler.set_timesteps(steps)
    except ValueError:  # more steps than it has times
        return []
    times = scheduler.timesteps.tolist()
    if type(scheduler).__name__ != "DDIMScheduler":
        return [*times, -1]
    stride = scheduler.config.num_train_timesteps // steps
    moved = [max(-1, t - stride) for t in times]
    return [times[0], *moved] if times[1:] == moved[:-1] else []


# ---- what is declared


def _prediction(objective: Objective) -> str:
    """What diffusers calls the prediction type."""
    name = objective.slots["prediction_type"][0].definition.name
    if name not in THEIRS:
        known = ", ".join(f"`{ours}`" for ours in THEIRS)
        raise ExportError(
            f"diffusers has no prediction type `{name}`: it samples networks that return {known}"
        )
    return THEIRS[name]


def _process(bundle: Bundle, levels: Levels) -> dict[str, object]:
    """How a scheduler is told the levels of the process."""
    kind, _, count = bundle.manifest["time"]
    if kind != "index":
        raise ExportError(
            "the process has continuous times, and the pipelines of diffusers for this network go"
            " through whole steps: train on a process that is a table of steps"
        )
    index = torch.arange(int(count))
    kept, noise = levels.alpha(index) ** 2, levels.sigma(index) ** 2
    if not torch.allclose(kept + noise, torch.ones_like(kept)):
        raise ExportError(
            "the schedulers of diffusers keep alpha^2 + sigma^2 at 1, and this process does not:"
            " sample it with `difftrain sample`"
        )
    return _named(kept)


def _named(kept: Tensor) -> dict[str, object]:
    """The levels alpha^2 [T] by the name of their betas where they have one, else beta by beta."""
    from diffusers import DDIMScheduler

    zero = bool(kept[-1] < NOTHING)
    told = {"num_train_timesteps": len(kept), "rescale_betas_zero_snr": zero}
    before = torch.cat([torch.ones_like(kept[:1]), kept[:-1]])
    listed = {"trained_betas": (1 - kept / before).tolist()}
    cosine = {"beta_schedule": "squaredcos_cap_v2"}
    for named in (*(_even(name, kept, zero) for name in POWERS), cosine, listed):
        theirs = DDIMScheduler(**told, **named).alphas_cumprod.double()
        if torch.allclose(theirs, kept, **CLOSE):
            return {**told, **named}
    raise ExportError("the levels of the process differ from those of every list of betas")


def _even(name: str, kept: Tensor, zero: bool) -> dict[str, object]:
    """The betas of this name that have the first and the middle one of the levels."""
    middle = len(kept) // 2
    low = below = 1 - kept[0].item()
    above = 1.0
    for _ in range(HALVINGS):
        high = (below + above) / 2
        quieter = _kept(name, low, high, len(kept), zero)[middle] > kept[middle]
        below, above = (high, above) if quieter else (below, high)
    low, high = (float(f"{end:.9g}") for end in (low, above))
    return {"beta_schedule": name, "beta_start": low, "beta_end": high}


def _kept(name: str, low: float, high: float, count: int, zero: bool) -> Tensor:
    """alpha^2 [T] of betas between two ends, moved to end in nothing if `zero`."""
    power = POWERS[name]
    ends = (end ** (1 / power) for end in (low, high))
    root = (1 - torch.linspace(*ends, count, dtype=torch.float64) ** power).cumprod(0).sqrt()
    moved = (root - root[-1]) * root[0] / (root[0] - root[-1])  # arXiv:2305.08891 algorithm 1
    return (moved if zero else root) ** 2
