"""Solvers as tables: what each evaluation reads, and that nothing else was lost."""

import math
from functools import partial

import pytest
import torch

from difftrain.export.errors import ExportError
from difftrain.export.table import replay, table
from difftrain.sampling import grids, solvers
from difftrain.sampling.model import Levels, Sampler
from difftrain.training.bundle import compile_text

STRAIGHT = "process = linear\nprediction_type = flow"
INDEXED = "process = ddpm(terminal_snr = zero)\nprediction_type = v_prediction"
OPEN = "process = edm\nprediction_type = sample\nstrategy = edm_precondition"
EVERYWHERE = {
    "ddim": {},
    "ddim with noise": {"eta": 0.7},
    "ancestral": {"variance": "large"},
    "dpm_solver_pp": {},
    "dpm_solver_pp with noise": {"scale": 1.0},
    "multistep": {},
}
SMOOTH = {
    "euler": {},
    "heun": {},
    "heun with noise": {"s_churn": 5.0},
    "euler_maruyama": {"scale": 0.5},
    "jump": {},
}


def walked(body: str, name: str, options: dict, steps: int):
    """A solver on the process of an objective: (walk, levels, grid)."""
    bundle = compile_text("o", f"diff 1\nobjective o {{\n{body}\nbackbone = custom\n}}\n")
    module = bundle.module("levels.py")
    levels, law = Levels(module.compute, module.tables()), tuple(bundle.manifest["time"])
    grid = grids.grid(law, {"steps": steps, **grids.DEFAULTS}, levels)
    return partial(getattr(solvers, name.split()[0]), **options), levels, grid


def estimates(x, t, r):
    """What no network is: linear in nothing."""
    t, r = (v.double().reshape(-1, 1).atan() for v in (t, r))
    return torch.tanh(x - t), torch.sin(2 * torch.tanh(x) + r)


class Draws:
    def noise(self, step, like):
        made = torch.Generator().manual_seed(step)
        return torch.randn(like.shape, generator=made, dtype=torch.float64)


CASES = [
    (body, name, options)
    for body in (STRAIGHT, INDEXED, OPEN)
    for name, options in (EVERYWHERE | (SMOOTH if body != INDEXED else {})).items()
]


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize(("body", "name", "options"), CASES)
def test_a_table_is_its_solver(body, name, options, steps):
    walk, levels, grid = walked(body, name, options, steps)
    made, like, draws = table(walk, levels, grid, name), torch.zeros(3, 4).double(), Draws()

    def answer(inputs, *_):
        x0_hat, eps_hat = estimates(inputs["xt"], inputs["t"], inputs["r"])
        return {"x0_hat": x0_hat, "eps_hat": eps_hat}

    def ask(x, row):
        return estimates(x, *(torch.full((3,), v).double() for v in (row.t, row.r)))

    model = Sampler(levels.level, levels.tables, answer, {}, {}, torch.arange(3))
    theirs = walk(model, solvers.start(model, like, grid, draws), grid, draws)
    ours = replay(made, ask, lambda draw: draws.noise(draw, like))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_row_holds_what_its_step_reads():
    made = table(*walked(STRAIGHT, "ddim", {}, 4), "ddim")
    assert made.kept == (0, 0) and made.draws == () and not made.whole
    assert [n.weight for n in made.start] == [1.0]
    assert [row.t for row in made.rows] == [1.0, 0.75, 0.5, 0.25]
    assert made.rows[1].x == 0
    assert made.rows[1].x0_hat == pytest.approx((0.5,)) and made.rows[1].eps_hat == (0.5,)
    assert made.columns() == ("x", "x0_hat", "eps_hat", "noise")
    torch.testing.assert_close(made.tensor()[1], torch.tensor([0.0, 0.5, 0.5, 0.0]))


def test_what_is_kept_is_what_a_step_looks_back_to():
    assert table(*walked(INDEXED, "dpm_solver_pp", {}, 6), "").kept == (1, 0)
    assert table(*walked(OPEN, "heun", {}, 6), "").kept == (0, 1)
    assert table(*walked(STRAIGHT, "heun", {}, 6), "").kept == (1, 1)
    shown = table(*walked(STRAIGHT, "euler", {}, 6), "", guess=True)
    assert shown.kept == (1, 0) and shown.tensor().shape == (6, 5)


def test_a_jump_knows_where_it_lands():
    rows = table(*walked(STRAIGHT, "jump", {}, 2), "jump").rows
    assert [(row.t, row.r) for row in rows] == [(1.0, 0.5), (0.5, 0.0)]


def test_noise_has_its_number():
    made = table(*walked(INDEXED, "multistep", {}, 4), "multistep")
    assert made.whole and made.draws == (1, 2, 3)
    assert [row.noise and row.noise.draw for row in made.rows] == [1, 2, 3, None]


def clipped(model, x, grid, draws):
    for t in grid[:-1]:
        x = model.estimates(x, t.expand(len(x)))[0].clamp(-1, 1)
    return x


def remembering(model, x, grid, draws):
    seen = [model.estimates(x * t, t.expand(len(x)))[0] for t in grid[:-1]]
    return sum(s * math.pi**-i for i, s in enumerate(seen))


@pytest.mark.parametrize("walk", [clipped, remembering])
def test_other_solvers_are_refused(walk):
    _, levels, grid = walked(STRAIGHT, "euler", {}, 8)
    with pytest.raises(ExportError, match="the solver `own` is not linear .* or looks back"):
        table(walk, levels, grid, "own")
