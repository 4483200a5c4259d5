"""The schedulers of diffusers for processes with continuous times."""

from __future__ import annotations

import torch
from torch import Tensor

from difftrain.export.errors import ExportError
from difftrain.export.opened import Opened
from difftrain.language.forms import clock
from difftrain.language.numbers import values
from difftrain.language.part import Part
from difftrain.sampling.grids import shifted

SAME = {"rtol": 0, "atol": 1e-8}  # levels
NEAR = {"rtol": 1e-5, "atol": 0}  # times: some schedulers keep them in float32
FACTORS = ("c_in", "c_out", "c_skip", "c_noise")
RHO = 7  # arXiv:2206.00364 eq. 5


# ---- the straight path


def straight(run: Opened, scale: int):
    """Steps along x0 + t (eps - x0): Euler's, or to x0 and back to noise."""
    import diffusers

    _is_straight(run)
    solver, told = run.sampling["solver"], {"num_train_timesteps": scale}
    match solver.module, _drawn(run):
        case ("euler", _) | ("ddim", 0 | None):  # the same steps, on this path
            return diffusers.FlowMapEulerDiscreteScheduler(**told, shift=_shift(run.grid))
        case "multistep", _:
            return diffusers.FlowMatchEulerDiscreteScheduler(**told, stochastic_sampling=True)
    raise ExportError(
        f"no scheduler of diffusers makes the moves of `{solver.module}` as it is asked for here,"
        " at the times of this process: use `euler`"
    )


def stepped(run: Opened, scheduler) -> dict[str, object]:
    """How a pipeline is told the times of the solver: their number, or what they are."""
    steps = {"num_inference_steps": len(run.grid) - 1}
    if run.indexed:  # whose times were chosen with the scheduler
        return steps
    scheduler.set_timesteps(**steps)
    if torch.allclose(scheduler.sigmas.double(), run.grid, **NEAR):
        return steps
    return {"sigmas": run.grid[:-1].tolist()}


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
    """k of times k u / (1 + (k - 1) u) [N + 1] for even u from 1 to 0; 1 for other times."""
    u = 1 - 1 / (len(grid) - 1)
    second = grid[1].item()
    k = float(f"{second * (1 - u) / (u * (1 - second)):.9g}") if 0 < second < 1 else 1.0
    return k if torch.allclose(shifted(len(grid) - 1, k), grid, **NEAR) else 1.0


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
    kind, more = _adding(solver, _drawn(run))
    ends = {"sigma_max": grid[0].item(), "sigma_min": grid[-2].item()}
    told = {**ends, "sigma_data": data, "rho": float(solver.options.get("rho", RHO))}
    made = getattr(diffusers, kind)(**told, **more)
    made.set_timesteps(len(grid) - 1)
    if not torch.allclose(made.sigmas.double(), grid, **NEAR):
        raise ExportError(other_times(solver, "`grid = power`"))
    return made


def _adding(solver: Part, drawn: object) -> tuple[str, dict[str, object]]:
    """The scheduler with the moves of a solver."""
    match solver.module, drawn:
        case ("euler", _) | ("ddim", 0 | None):
            return "EDMEulerScheduler", {}
        case "dpm_solver_pp", 0 | 1 | None as scale:
            kind = "sde-" * bool(scale) + "dpmsolver++"
            return "EDMDPMSolverMultistepScheduler", {"algorithm_type": kind}
    raise ExportError(
        f"no scheduler of diffusers makes the moves of `{solver.module}` as it is asked for here,"
        " for a preconditioned network: use `euler` or `dpm_solver_pp`"
    )


# ---- both


def _drawn(run: Opened) -> object:
    """How much noise the solver draws between two steps; of one step, none."""
    options = run.sampling["solver"].options
    return options.get("eta", options.get("scale")) if len(run.grid) > 2 else 0


def other_times(solver: Part, instead: str) -> str:
    """The sentence for times that no scheduler goes through."""
    return (
        f"no scheduler of diffusers goes through the times of `{solver.module}` here: use"
        f" {instead}, and leave `times` out"
    )


def _levels_are(run: Opened, alpha: Tensor, sigma: Tensor) -> bool:
    """Whether the process has these levels at the times of the solver."""
    found = torch.stack([run.levels.alpha(run.grid), run.levels.sigma(run.grid)]).double()
    return torch.allclose(found, torch.stack([alpha, sigma]), **SAME)
