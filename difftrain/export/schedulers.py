"""The scheduler of diffusers that goes through the times and levels of a solver of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import signature

import torch
from torch import Tensor

from difftrain.export.continuous import growing, preconditioned, straight
from difftrain.export.errors import ExportError
from difftrain.export.opened import Opened
from difftrain.language.part import Part
from difftrain.language.spec import Objective
from difftrain.models.pretrained import PREDICTIONS
from difftrain.sampling import grids

DPM = "DPMSolverMultistepScheduler"
THEIRS = {ours: theirs for theirs, ours in PREDICTIONS.items()}
SPACINGS = {"trailing": "trailing", "leading": "leading", "uniform": "linspace"}
TRAINED = "original_inference_steps"  # how many of the times were trained
PLAIN = {"clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1}
CLOSE = {"rtol": 1e-4, "atol": 2e-6}  # of alpha^2: diffusers keeps it in float32
POWERS = {"linear": 1, "scaled_linear": 2}  # betas are even in their root of this order
HALVINGS = 60
NOTHING = 1e-12


def scheduler(run: Opened, scale: int = 1):
    """The scheduler with the levels of the process, that walks as the solver does. What it tells of
    continuous times is `scale` times as large. Raises ExportError."""
    if run.indexed:
        return _of_steps(run)
    data = preconditioned(run)
    return straight(run, scale) if data is None else growing(run, data)


# ---- tables of steps


def _of_steps(run: Opened):
    import diffusers

    solver, grid = run.sampling["solver"], run.grid.tolist()
    config = {**PLAIN, **_process(run), "prediction_type": _prediction(run.objective)}
    config["timestep_spacing"] = SPACINGS[grids.chosen(run.bundle.manifest["time"], solver.options)]
    for name, more in _moves(solver, config):
        kind, whole = getattr(diffusers, name), {**config, **more}
        made = kind(**{k: v for k, v in whole.items() if k in signature(kind).parameters})
        if _times(made, len(grid) - 1) == grid:
            return made
    raise ExportError(
        f"no scheduler of diffusers goes through the times of `{solver.module}` in"
        f" {len(grid) - 1} steps: use `grid = trailing`, and a number of steps that divides"
        f" {config['num_train_timesteps']}"
    )


def _moves(solver: Part, config: Mapping) -> Iterator[tuple[str, dict[str, object]]]:
    """The schedulers that make the moves of a solver, if they go through its times."""
    count, options = config["num_train_timesteps"], solver.options
    match solver.module, options.get("eta", options.get("scale", options.get("variance"))):
        case "ddim", eta:
            yield "DDIMScheduler", {}
            yield from {0: [(DPM, {"solver_order": 1})], 1: [("DDPMScheduler", {})]}.get(eta, [])
        case "ancestral", "small":
            yield "DDPMScheduler", {}
        case "dpm_solver_pp", 0 | 1 | None as scale:
            if config["rescale_betas_zero_snr"]:
                raise ExportError(
                    "diffusers has no second order step from a last level without signal, which"
                    " `dpm_solver_pp` takes here: use `ddim`"
                )
            yield DPM, {"solver_order": 2, "algorithm_type": "sde-" * bool(scale) + "dpmsolver++"}
        case "multistep", _:
            parts = (n for n in range(count, 0, -1) if count % n == 0)
            yield from (("LCMScheduler", {TRAINED: n}) for n in parts)
        case name, _:
            raise ExportError(
                f"no scheduler of diffusers makes the moves of `{name}` as it is asked for here:"
                " use `ddim`, `dpm_solver_pp` or `multistep`"
            )


def _times(scheduler, steps: int) -> list[int]:
    """The times of a scheduler and those that it moves to, the clean end being -1."""
    try:
        scheduler.set_timesteps(steps)
    except ValueError:  # more steps than it has times
        return []
    times = scheduler.timesteps.tolist()
    if type(scheduler).__name__ != "DDIMScheduler":  # that one moves by whole strides
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


def _process(run: Opened) -> dict[str, object]:
    """How a scheduler is told the levels of the process."""
    index = torch.arange(int(run.bundle.manifest["time"][2]))
    kept, noise = run.levels.alpha(index) ** 2, run.levels.sigma(index) ** 2
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
