"""What a run shows of itself: samples, and losses on data that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from difftrain.compiler.draws import Draws
from difftrain.compiler.lowering import exact
from difftrain.language.horizon import own_shift
from difftrain.language.options import Run
from difftrain.language.part import Part
from difftrain.sampling import grids, solvers
from difftrain.sampling.model import Levels, Sampler
from difftrain.sampling.walks import Walk, walk
from difftrain.training.bundle import Bundle
from difftrain.training.latents import Prepared, signed
from difftrain.training.own import importable
from difftrain.training.parts import Parts, visiting
from difftrain.training.state import AVERAGE

ROUNDS = 8  # times and noises each held-out picture is seen at
SEED = 20_231  # of the fixed draws of every validation
TOGETHER = 64  # pictures drawn at a time, at most
AT_ONCE = 256  # pictures whose losses are computed at a time, at most


@dataclass(frozen=True, eq=False)
class Programs:
    """The emitted modules of a bundle with their tables on a device."""

    step: object
    estimates: object
    levels: object
    tables: Mapping[str, Mapping[str, Tensor]]
    dropping: tuple[str, ...]  # the draws that decide who loses the condition
    forward: bool  # whether the step differentiates the network forward
    baseline: bool  # whether a network that returns the mean of its target can be written down
    noise: object = None  # the noise's own law, where it is not standard normal


def programs(bundle: Bundle, device) -> Programs:
    """Loads the emitted sources; tables are computed in float64 and kept in fp32."""
    names = ("step", "estimates", "levels", *["noise"] * ("noise.py" in bundle.texts))
    modules = {n: bundle.module(f"{n}.py") for n in names}
    tables = {
        name: {k: v.to(device, torch.float32) for k, v in module.tables().items()}
        for name, module in modules.items()
    }
    facts = {name: bundle.manifest[name] for name in ("forward", "baseline")}
    return Programs(**modules, tables=tables, dropping=tuple(bundle.manifest["dropping"]), **facts)


# ---- samples


@dataclass(frozen=True, eq=False)
class Model:
    """What samples are made with: weights [P] of a bundle's modules after `step` steps."""

    bundle: Bundle
    programs: Programs
    parts: Parts
    weights: Tensor
    step: int
    width: str = ""  # the width of an average that was made after training


def sample(
    model: Model, options: Run, prompts: list[str], size: int, guide: Model | None = None
) -> Tensor:
    """Pictures [N, 3, size, size] of the prompts; no state is touched."""
    return torch.cat([*batches(model, options, prompts, size, guide)])


@torch.no_grad()
def batches(
    model: Model, options: Run, prompts: list[str], size: int, guide: Model | None = None
) -> Iterator[Tensor]:
    """Pictures [B, 3, size, size] of the prompts, at most TOGETHER at a time as they are drawn.

    The n-th picture is the same in whichever company it is drawn.
    """
    made, parts, device = model.programs, model.parts, model.weights.device
    solver, shape = options["solver"], tuple(parts.codec.shape(size))
    levels = Levels(made.levels.compute, made.tables["levels"])
    grid = times(model.bundle, solver, levels, shape)
    go = walking(model.bundle, solver)
    law = made.noise and partial(own_noise, made.noise.compute)
    for index in torch.arange(len(prompts), device=device).split(TOGETHER):
        texts = [prompts[i] for i in index.tolist()]
        draws = solvers.Draws(options["seed"], index, law)
        like = torch.zeros(len(index), *shape, device=device)
        with exact():
            asked = sampler(model, options, index, texts, guide)
            x = go(asked, solvers.start(asked, like, grid, draws), grid, draws)
            with visiting(parts.codec, device):
                drawn = parts.codec.decode(x).cpu()
        yield drawn


def sampler(
    model: Model, options: Run, index: Tensor, prompts: list[str], guide: Model | None = None
) -> Sampler:
    """What a solver asks for the samples of `index` [B] and their prompts, guided as the options
    of `sample` say."""
    scale, inside = own_guidance(model.bundle, options["guidance"])
    weaker = guide and _sampler(guide, index, prompts, given=own_guidance(guide.bundle, 1.0)[1])
    ways = {"interval": options["guidance_interval"], "rescale": options["guidance_rescale"]}
    return _sampler(model, index, prompts, guidance=scale, given=inside, guide=weaker, **ways)


def _sampler(model: Model, index: Tensor, prompts: list[str], **guidance) -> Sampler:
    made, parts = model.programs, model.parts
    nets = parts.plan.bind(parts.modules, parts.plan.views(model.weights))
    levels = made.levels.compute, made.tables["levels"]
    estimate = made.estimates.compute, made.tables["estimates"], nets
    return Sampler(*levels, *estimate, index, *conditions(parts, nets, prompts), **guidance)


def walking(bundle: Bundle, solver: Part) -> Walk:
    """The solver `(model, x, grid, draws) -> x` that a spec asks for. Raises PartError."""
    with importable(bundle.texts):
        return walk(solver)


def times(bundle: Bundle, solver: Part, levels: Levels, shape: tuple[int, ...]) -> Tensor:
    """The times [N + 1] that a solver walks on the process of a bundle, for latents of this shape;
    shifted as they were trained, unless the solver says otherwise."""
    law = tuple(bundle.manifest["time"])
    auto = grids.chosen(law, solver.options) == "even" and solver.options["shift"] == "auto"
    shift = own_shift(bundle.read().objective(), math.prod(shape)) if auto else 1.0
    return grids.grid(law, solver.options, levels, shift)


def own_noise(compute: Callable, like: Tensor, draws: Draws) -> Tensor:
    """Noise [B, ...] of the objective's own law."""
    return compute({"x0": like}, draws, {}, {})["eps@0"]


def own_guidance(bundle: Bundle, scale: float) -> tuple[float, dict[str, float]]:
    """The guidance that a solver applies, and the inputs of a network that has it inside."""
    inside = {n: a * scale + b for n, (a, b) in bundle.manifest["guidance"].items()}
    return (1.0 if inside else scale), inside


def conditions(
    parts: Parts, nets: Mapping, prompts: list[str]
) -> tuple[Tensor | None, Tensor | None]:
    """The conditions of prompts [B, ...] and the empty one; None and None without an encoder."""
    return (None, None) if parts.text is None else _read(parts, nets, parts.text.ids(prompts))


def _read(parts: Parts, nets: Mapping, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The conditions of ids [B, T], and the empty one; the encoder may wait elsewhere."""
    device = parts.weights.device
    with visiting(parts.text, device):
        return nets["text"](ids.to(device)), nets["text"](parts.null_ids(device))


# ---- losses


@dataclass(frozen=True)
class Validation:
    """Mean losses on held-out pictures at fixed draws, nothing dropped: with their own captions,
    with another picture's, and of a network that always returns the mean of its target (nan where
    a preconditioned network has none)."""

    loss: float
    shuffled: float
    mean: float

    def __str__(self) -> str:
        share = f", predicting the mean {self.mean:.4f} ({self.loss / self.mean:.1%} of it)"
        lines = [f"validation loss {self.loss:.4f}" + share * (self.mean == self.mean)]
        if self.shuffled == self.shuffled:
            margin = (self.shuffled - self.loss) / self.loss
            lines.append(
                f"with another picture's caption {self.shuffled:.4f}: the right caption lowers the"
                f" loss by {margin:.1%}"
            )
        return "\n".join(lines)


@torch.no_grad()
@exact()
def validate(
    made: Programs, parts: Parts, state: Mapping[str, Tensor], unseen: Prepared
) -> Validation:
    """The losses of the averaged weights on what training has not seen."""
    nets, device = parts.nets(state[AVERAGE], state), parts.weights.device
    inputs = {"x0": unseen.latents.to(device)}
    if unseen.images is not None:
        inputs["image"] = signed(unseen.images.to(device))
    cond = null = None
    if unseen.tokens is not None:
        captions = [record.caption for record in unseen.pictures.records]
        cond, null = _read(parts, nets, unseen.tokens(captions))
    other = None if cond is None else cond.roll(len(cond) // 2 or 1, 0)

    def loss(network: Callable, cond: Tensor | None) -> float:
        known = {"cond": cond, "null": null, "step": state["updates"]}
        return _mean_loss(made, {**nets, "student": network}, inputs, known)

    always = _mean_network(made, parts, nets["student"], inputs["x0"].mean(0, keepdim=True))
    return Validation(
        loss(nets["student"], cond),
        float("nan") if cond is None else loss(nets["student"], other),
        loss(always, cond) if made.baseline else float("nan"),
    )


def _mean_loss(made: Programs, nets: Mapping, inputs: Mapping, known: Mapping) -> float:
    """The mean loss over all rows and ROUNDS of fixed draws."""
    count, total = len(inputs["x0"]), 0.0
    device = inputs["x0"].device
    for k in range(ROUNDS):
        for rows in torch.arange(count, device=device).split(AT_ONCE):
            given = {n: v[rows] for n, v in inputs.items()}
            given |= {n: v[rows] if _by_row(v, count) else v for n, v in known.items()}
            draw = Draws(SEED, k, rows, dropout=False, never=made.dropping)
            values = made.step.compute(given, draw, nets, made.tables["step"])
            total += values["loss"].float().mean().item() * len(rows)
    return total / count / ROUNDS


def _by_row(value: Tensor | None, count: int) -> bool:
    return value is not None and value.dim() > 0 and len(value) == count


def _mean_network(made: Programs, parts: Parts, student: Callable, mean: Tensor) -> Callable:
    """A network that returns the mean of its target at each time, row_a(t) / c_out times that of
    x0, beside whatever else the student returns."""
    tapped = hasattr(parts.modules["student"], "tap_width")

    def network(x: Tensor, t: Tensor, cond=None, **extra):
        inputs = {"t": t, "time": t, "step": torch.zeros((), device=x.device)}
        values = made.levels.compute(inputs, None, {}, made.tables["levels"])
        share = torch.as_tensor(values["row_a"] / values["c_out"], device=x.device).expand(len(x))
        guess = share.reshape(-1, *(1,) * (x.dim() - 1)) * mean + torch.zeros_like(x)
        return (guess, *student(x, t, cond, **extra)[1:]) if tapped else guess

    return network
