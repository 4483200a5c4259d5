"""The schedulers of diffusers for processes with continuous times."""

from __future__ import annotations

import torch
from torch import Tensor

from difftrain.export.errors import ExportError
from difftrain.export.opened import Opened
from difftrain.language.forms import clock
from difftrain.language.numbers import values
from difftrain.language.part import Part

STRAIGHT = ("euler", "ddim")  # which are the same steps there
NEAR = {"rtol": 0, "atol": 1e-8}  # of times and levels that are the same
NEAR_NOISE = {"rtol": 1e-5, "atol": 0}  # of noise: diffusers keeps it in float32
FACTORS = ("c_in", "c_out", "c_skip", "c_noise")
RHO = 7  # arXiv:2206.00364 eq. 5


# ---- the straight path


def straight(run: Opened, scale: int):
    """Euler steps along x0 + t (eps - x0), at times that are even before they are shifted."""
    from diffusers import FlowMapEulerDiscreteScheduler

    grid, solver = run.grid, run.sampling["solver"]
    steps = len(grid) - 1
    _is_straight(run)
    if solver.module not in STRAIGHT or solver.options.get("eta"):
        raise ExportError(
            f"`{solver.module}`: the schedulers of diffusers that make more than Euler steps on"
            " continuous times begin beside the end of the process, and tell networks other times"
            " than they stand at: use `euler`"
        )
    made = FlowMapEulerDiscreteScheduler(num_train_timesteps=scale, shift=_shift(grid))
    made.set_timesteps(steps)
    if not torch.allclose(made.sigmas, grid, **NEAR):
        raise ExportError(_other_times(solver, "`grid = even`"))
    return made


def _is_straight(run: Opened) -> None:
    """Refuses what no scheduler of continuous times samples."""
    name = run.objective.slots["prediction_type"][0].definition.name
    if not _levels_are(run, 1 - run.grid, run.grid):
        raise ExportError(
            "diffusers samples a bare network on continuous times along the straight path alone,"
            " alpha = 1 - t and sigma = t: train on `linear`, or on a process that is a table of"
            " steps"
        )
    if name != "flow":
        raise ExportError(
            f"diffusers has no prediction type `{name}` on continuous times: it samples networks"
            " that return `flow`"
        )


def _shift(grid: Tensor) -> float:
    """k of times k u / (1 + (k - 1) u) [N + 1] for even u from 1 to 0."""
    u = 1 - 1 / (len(grid) - 1)
    second = grid[1].item()
    return float(f"{second * (1 - u) / (u * (1 - second)):.9g}") if 0 < second < 1 else 1.0


# ---- noise that is added to data


def preconditioned(run: Opened) -> float | None:
    """The deviation of the data that schedulers precondition a network for, as this one is: on
    x0 + t eps, by arXiv:2206.00364 table 1. None for other processes and networks."""
    noise, derivation = run.grid[:-1].double(), run.objective.derivation()
    if run.indexed or not _levels_are(run, torch.ones_like(run.grid), run.grid):
        return None
    terms = [derivation.read(name) for name in FACTORS]
    time = derivation.read(clock(run.objective.equations))
    found = torch.tensor(values(terms, [{time: t} for t in noise.tolist()]), dtype=noise.dtype)
    square = found[-1, 0] ** -2 - noise[-1] ** 2
    if not square > 0:
        return None
    both, data = noise**2 + square, square.sqrt()
    wanted = (both**-0.5, noise * data * both**-0.5, square / both, noise.log() / 4)
    same = torch.allclose(found, torch.stack(wanted, dim=1), rtol=1e-6)
    return float(f"{data.item():.7g}") if same else None


def growing(run: Opened, data: float):
    """Steps from noise to noise of x0 + t eps, for a network that is preconditioned."""
    import diffusers

    grid, solver = run.grid, run.sampling["solver"]
    if (name := run.objective.slots["prediction_type"][0].definition.name) != "sample":
        raise ExportError(
            f"diffusers preconditions networks of the prediction type `sample`, not `{name}`:"
            " export to another target, such as `onnx`"
        )
    kind, more = _adding(solver)
    ends = {"sigma_max": grid[0].item(), "sigma_min": grid[-2].item()}
    told = {**ends, "sigma_data": data, "rho": float(solver.options.get("rho", RHO))}
    made = getattr(diffusers, kind)(**told, **more)
    made.set_timesteps(len(grid) - 1)
    if not torch.allclose(made.sigmas.double(), grid, **NEAR_NOISE):
        raise ExportError(_other_times(solver, "`grid = power`"))
    return made


def _adding(solver: Part) -> tuple[str, dict[str, object]]:
    """The scheduler with the moves of a solver."""
    match solver.module, solver.options.get("eta", solver.options.get("scale")):
        case ("euler", _) | ("ddim", 0 | None):
            return "EDMEulerScheduler", {}
        case "dpm_solver_pp", 0 | 1 | None as scale:
            kind = "sde-" * bool(scale) + "dpmsolver++"
            return "EDMDPMSolverMultistepScheduler", {"algorithm_type": kind}
    raise ExportError(
        f"no scheduler of diffusers makes the moves of `{solver.module}` for a preconditioned"
        " network: use `euler` or `dpm_solver_pp`"
    )


# ---- both


def _other_times(solver: Part, instead: str) -> str:
    return (
        f"no scheduler of diffusers goes through the times of `{solver.module}` here: use"
        f" {instead}, and leave `times` out"
    )


def _levels_are(run: Opened, alpha: Tensor, sigma: Tensor) -> bool:
    """Whether the process has these levels at the times of the solver."""
    found = torch.stack([run.levels.alpha(run.grid), run.levels.sigma(run.grid)]).double()
    return torch.allclose(found, torch.stack([alpha, sigma]), **NEAR)
