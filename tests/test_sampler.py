"""Solvers on compiled objectives: golden steps, two times, guidance, batches."""

import math

import pytest
import tiny
import torch
from conftest import SHAPE, near, student

from difftrain.compiler import lowering
from difftrain.compiler.program import compile_quantities
from difftrain.language.check import check
from difftrain.language.tree import Source
from difftrain.sampling import grids, solvers
from difftrain.sampling.model import Sampler
from difftrain.training import evaluate
from difftrain.training.bundle import block, compile_text, moment
from difftrain.training.known import Known
from difftrain.training.parts import build_parts

EDM = "process = edm\nprediction_type = sample\nstrategy = edm_precondition"
TRIG = "process = trig\nprediction_type = flow\nstrategy = trig_flow"
MEAN_FLOW = "process = linear\nprediction_type = flow\nstrategy = mean_flow"


def sampler(body: str, network=student, times="[t]", inputs="[]", **parts) -> Sampler:
    """The compiled objective with this body around a network, for two samples."""
    backbone = f"custom(times = {times}, inputs = {inputs})"
    text = f"diff 1\nobjective o {{\n{body}\nbackbone = {backbone}\n}}\n"
    spec, found = check(Source("test.diff", text))
    assert not [f for f in found if f.severity == "error"], found
    objective = spec.objective()
    levels = compile_quantities(objective, ("alpha", "sigma"), fixed=("t",))
    estimates = compile_quantities(objective, ("x0_hat", "eps_hat"), fixed=moment(objective))
    return Sampler(
        levels.compute,
        levels.make_tables(),
        estimates.compute,
        estimates.make_tables(),
        {"student": network},
        torch.arange(2),
        **parts,
    )


DRAWS = solvers.Draws(0, torch.arange(2))


def column(t):
    return t.reshape(-1, 1, 1, 1)


# ---- golden steps


def test_one_jump_is_the_golden_one(golden, eps):
    x = solvers.jump(sampler(MEAN_FLOW, times="[t, r]"), eps, grids.shifted(1), DRAWS)
    near(x, golden["sampler.euler_jump_1_to_0"]["x"])


def test_two_jumps_tell_the_network_both_times(eps):
    def u(x, t, r):
        return 0.30 * x + 0.10 * t + 0.05 * r

    middle = eps - 0.5 * u(eps, 1, 0.5)
    x = solvers.jump(sampler(MEAN_FLOW, times="[t, r]"), eps, grids.shifted(2), DRAWS)
    torch.testing.assert_close(x, middle - 0.5 * u(middle, 0.5, 0))


def test_other_solvers_ask_for_the_flow_at_one_time(eps):
    model = sampler(MEAN_FLOW, times="[t, r]")
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    near(model.flow(eps, t), (0.30 * eps + 0.15 * column(t)).reshape(-1).tolist())


def test_a_consistency_function_in_one_step(eps):
    """x = -data F(x / data, pi / 2) from x = data eps (arXiv:2410.11081)."""
    grid = torch.tensor([math.pi / 2, 0], dtype=torch.float64)
    x = solvers.multistep(sampler(TRIG), 0.5 * eps, grid, DRAWS)
    near(x, (-0.5 * (0.30 * eps + 0.10 * math.pi / 2)).reshape(-1).tolist())


def denoised(x, sigma, data=0.5):
    """The denoiser of arXiv:2206.00364 eq. 7 around F(x, tau) = 0.30 x + 0.10 tau."""
    both = sigma**2 + data**2
    output = 0.30 * x / both**0.5 + 0.10 * math.log(sigma) / 4
    return data**2 / both * x + sigma * data / both**0.5 * output


@pytest.mark.parametrize("solver", [solvers.euler, solvers.heun])
def test_levels_of_noise_are_walked_as_published(solver, eps):
    """arXiv:2206.00364 algorithm 1 without churn, and without its correction."""
    law = ("open", 0.0, math.inf)
    model = sampler(EDM)
    grid = grids.grid(law, {"steps": 6, **grids.DEFAULTS}, model)
    assert grid.tolist() == pytest.approx(grids.power(6).tolist())
    x = 80 * eps
    for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        slope = (x - denoised(x, t)) / t
        ahead = x + (s - t) * slope
        if solver is solvers.heun and s:
            ahead = x + (s - t) * (slope + (ahead - denoised(ahead, s)) / s) / 2
        x = ahead
    near(solver(model, 80 * eps, grid, DRAWS), x.reshape(-1).tolist())


@pytest.mark.parametrize("walk", [solvers.heun, solvers.dpm_solver_pp, solvers.euler_maruyama])
@pytest.mark.parametrize("body", [EDM, TRIG, "process = gvp\nprediction_type = v_prediction"])
def test_every_solver_stays_finite_in_single_precision(walk, body):
    law = {EDM: ("open", 0.0, math.inf), TRIG: ("open", 0.0, math.pi / 2)}.get(body, ("real", 0, 1))
    model = sampler(body, lambda x, t, cond=None: 0.3 * x + 0.1 * column(t))
    grid = grids.grid(law, {"steps": 8, **grids.DEFAULTS}, model)
    like = torch.zeros(SHAPE)
    x = walk(model, solvers.start(model, like, grid, DRAWS), grid, DRAWS)
    assert x.dtype == torch.float32 and x.isfinite().all()


# ---- conditions


def seeing(x, t, cond, r=None):
    """A network whose answer is its condition."""
    return x + cond[:, :, None, None] + (0 if r is None else column(r))


@pytest.mark.parametrize(("body", "times"), [(MEAN_FLOW, "[t, r]"), (TRIG, "[t]")])
def test_guidance_reaches_flows_and_jumps(body, times, eps):
    cond, null = torch.tensor([[1.0], [2.0]]), torch.tensor([[-1.0]])
    given = {"network": seeing, "times": times, "null": null}
    plain, empty, guided = (
        sampler(body, cond=c, guidance=w, **given)
        for c, w in ((cond, 1.0), (null.expand(2, 1), 1.0), (cond, 3.0))
    )
    t, r = torch.tensor([0.4, 0.9]).double(), torch.tensor([0.1, 0.2]).double()
    for ask in (lambda m: m.flow(eps, t), lambda m: m.average(eps, t, r)):
        torch.testing.assert_close(ask(guided), ask(empty) + 3 * (ask(plain) - ask(empty)))


# ---- whole runs


def test_pictures_are_the_same_in_any_company(monkeypatch):
    text = tiny.spec(sample="seed = 3").replace("ddim(steps = 2)", "ddim(steps = 2, eta = 1)")
    bundle = compile_text("tiny", text)
    spec = bundle.read()
    device = lowering.device("cpu")
    parts = build_parts(spec.objective(), Known(), 0, device)
    made, options = evaluate.programs(bundle, device), block(spec, "sample")
    prompts = [f"picture {c}" for c in "abcde"]

    def drawn(together: int, texts: list[str]) -> torch.Tensor:
        monkeypatch.setattr(evaluate, "TOGETHER", together)
        return evaluate.sample(bundle, made, parts, parts.weights, options, texts, 64)

    whole = drawn(64, prompts)
    assert whole.shape == (5, 3, 64, 64)
    for together in (1, 2):
        torch.testing.assert_close(drawn(together, prompts), whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(drawn(64, prompts[:2]), whole[:2], rtol=0, atol=1e-4)


# ---- inputs of the network beside xt and t

SELF = "process = linear\nprediction_type = sample\nstrategy = self_condition(0.5)"


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_network_is_shown_its_last_answer(eps, guidance):
    """Zeros at first, then the guided x0_hat of the evaluation before, whatever was drawn."""
    shown, answers = [], []

    def network(x, t, cond=None, guess=None):
        shown.append(guess)
        out = 0.5 * x + 0.1 * guess + column(t)
        answers.append(out)
        return out

    cond = torch.ones(2, 1, dtype=torch.float64)
    parts = {"cond": cond, "null": 0 * cond[:1], "guidance": guidance}
    model = sampler(SELF, network, inputs="[guess]", **parts)
    solvers.ddim(model, eps, grids.shifted(3), DRAWS)
    assert len(shown) == 3 and shown[0].abs().max() == 0
    for before, guess in zip(answers, shown[1:], strict=False):
        assert all(torch.equal(part, before[:2]) for part in guess.split(2))


def test_a_network_that_has_its_guidance_inside_is_given_it(eps):
    given = []

    def network(x, t, cond=None, w=None):
        given.append(w)
        return 0.1 * x

    body = "process = ddpm\nprediction_type = epsilon\nstrategy = lcm"
    model = sampler(body, network, inputs="[lcm.w]", given={"lcm.w": 6.5})
    solvers.multistep(model, eps, grids.trailing(2, 1000), DRAWS)
    assert [w.tolist() for w in given] == [[6.5, 6.5], [6.5, 6.5]]
