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
    levels = compile_quantities(objective, ("alpha", "sigma", "row_a", "row_b"), fixed=("t",))
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


STRAIGHT = "process = linear\nprediction_type = flow"
COND, NULL = torch.tensor([[1.0], [2.0]]), torch.tensor([[-1.0]])


class Watched:
    """A network that remembers how many rows each of its calls had."""

    def __init__(self, strength=1.0):
        self.rows, self.strength = [], strength

    def __call__(self, x, t, cond=None, r=None):
        self.rows.append(len(x))
        return self.strength * (0.3 * x + column(t) * cond[:, :, None, None])


@pytest.mark.parametrize(
    ("solver", "calls"), [(solvers.heun, 9), (solvers.euler_maruyama, 5), (solvers.ddim, 5)]
)
@pytest.mark.parametrize(("guidance", "rows"), [(1.0, 2), (3.0, 4)])
def test_each_evaluation_is_one_forward_of_both_conditions(eps, solver, calls, guidance, rows):
    """`euler_maruyama` takes flow and score from it; `heun` asks anew, with guidance, each time."""
    network = Watched()
    model = sampler(STRAIGHT, network, cond=COND, null=NULL, guidance=guidance)
    solver(model, eps, grids.shifted(5), DRAWS)
    assert network.rows == [rows] * calls


@pytest.mark.parametrize(
    ("solver", "order"),
    [(solvers.euler, 1), (solvers.ddim, 1), (solvers.heun, 2), (solvers.dpm_solver_pp, 2)],
)
def test_the_order_of_convergence_with_guidance(eps, solver, order):
    """dx / dt = 0.3 x + t g from t = 0.9 down to 0.1, whose solution is known, as g is constant."""
    model = sampler(STRAIGHT, Watched(), cond=COND, null=NULL, guidance=3.0)
    g = (NULL + 3 * (COND - NULL)).double()[:, :, None, None]

    def path(t):  # the solution through eps at t = 0.9: a particular one and exp(0.3 t)
        def particular(t):
            return -g * (t / 0.3 + 1 / 0.09)

        return particular(t) + (eps - particular(0.9)) * math.exp(0.3 * (t - 0.9))

    errors = []
    for steps in (32, 64, 128):
        ratio = torch.linspace(math.log(9), math.log(1 / 9), steps + 1, dtype=torch.float64).exp()
        times = ratio / (1 + ratio)  # even in log(sigma / alpha)
        ends = []
        Stopping(model, ends, steps).run(solver, eps, torch.cat([times, times.new_zeros(1)]))
        errors.append(float((ends[0] - path(0.1)).abs().max()))
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert slopes == pytest.approx([order] * 2, abs=0.15)


class Stopping:
    """A model that keeps what the solver has after so many steps, where it is asked last."""

    def __init__(self, model, ends, steps):
        self.model, self.ends, self.steps = model, ends, steps

    def run(self, solver, x, grid):
        self.last = grid[-2]
        solver(self, x, grid, DRAWS)

    def __getattr__(self, name):
        asked = getattr(self.model, name)
        if name not in ("estimates", "flow"):
            return asked

        def ask(x, t):
            if float(t[0]) == float(self.last):
                self.ends[:] = [x]
            return asked(x, t)

        return ask


def test_guidance_rests_outside_its_interval(eps):
    """In sigma / alpha, above the lower end up to the upper one (arXiv:2404.07724)."""
    given = {"cond": COND, "null": NULL}
    model = sampler(STRAIGHT, Watched(), guidance=3.0, interval=(0.25, 1.0), **given)
    plain, strong = (sampler(STRAIGHT, Watched(), guidance=w, **given) for w in (1.0, 3.0))
    for t, same in ((0.1, plain), (0.2, plain), (0.21, strong), (0.5, strong), (0.51, plain)):
        at = torch.full((2,), t, dtype=torch.float64)
        torch.testing.assert_close(model.flow(eps, at), same.flow(eps, at))
    pure = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(model.flow(eps, pure), plain.flow(eps, pure))


BODIES = {
    STRAIGHT: lambda a, s, x0, e: e - x0,
    "process = ddpm(steps = 10)\nprediction_type = epsilon": lambda a, s, x0, e: e,
    "process = gvp\nprediction_type = v_prediction": lambda a, s, x0, e: a * e - s * x0,
    EDM: lambda a, s, x0, e: x0,
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("rescale", [0.7, 1.0])
def test_guided_predictions_are_rescaled_as_published(eps, body, rescale):
    """arXiv:2305.08891 eq. 15-16 on what the network predicts, whatever that is."""
    given = {"cond": COND, "null": NULL}

    def louder(x, t, cond, r=None):  # a condition that adds a number leaves deviations alone
        return 0.3 * x * cond[:, :, None, None] + column(t)

    t = torch.tensor([3, 6]) if "ddpm" in body else torch.tensor([0.3, 0.6], dtype=torch.float64)
    models = [
        sampler(body, louder, guidance=w, rescale=phi, **given)
        for w, phi in ((1.0, 0.0), (5.0, 0.0), (5.0, rescale))
    ]
    alpha, sigma = (column(level(t)) for level in (models[0].alpha, models[0].sigma))
    pairs = [model.estimates(eps, t) for model in models]
    before, guided, ours = (BODIES[body](alpha, sigma, *pair) for pair in pairs)
    deviations = [column(p.flatten(1).std(dim=1)) for p in (before, guided)]
    assert (deviations[1] / deviations[0] - 1).abs().min() > 0.02
    wanted = rescale * guided * deviations[0] / deviations[1] + (1 - rescale) * guided
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(alpha * pairs[2][0] + sigma * pairs[2][1], eps)


def test_a_weaker_model_guides(eps):
    """arXiv:2406.02507: w D1 + (1 - w) D0, the same condition for both, each asked once."""
    strong, weak = Watched(), Watched(strength=0.5)
    guide = sampler(STRAIGHT, weak, cond=COND)
    model = sampler(STRAIGHT, strong, cond=COND, null=NULL, guidance=2.0, guide=guide)
    t = torch.tensor([0.3, 0.6], dtype=torch.float64)
    flow = 0.3 * eps + column(t) * COND[:, :, None, None]
    torch.testing.assert_close(model.flow(eps, t), 2 * flow - 0.5 * flow)
    assert strong.rows == weak.rows == [2]


# ---- whole runs


@pytest.mark.parametrize(
    ("kind", "allowed"), [("cpu", 1e-5), pytest.param("cuda", 2e-4, marks=pytest.mark.gpu)]
)
def test_pictures_are_the_same_in_any_company(monkeypatch, kind, allowed):
    """From weights that are all random: fresh ones have zeros in them, which hide what lies before.
    A GPU takes other kernels for other batches; TF32 would change them by 2e-2."""
    text = tiny.spec(sample="seed = 3").replace("ddim(steps = 2)", "ddim(steps = 2, eta = 1)")
    bundle = compile_text("tiny", text)
    spec = bundle.read()
    device = lowering.device(kind)
    parts = build_parts(spec.objective(), Known(), 0, device)
    noise = torch.randn(len(parts.weights), generator=torch.Generator().manual_seed(1))
    parts.weights.add_(0.02 * noise.to(device))
    model = evaluate.Model(bundle, evaluate.programs(bundle, device), parts, parts.weights, 0)
    options = block(spec, "sample")
    prompts = [f"picture {c}" for c in "abcde"]

    def drawn(together: int, texts: list[str]) -> torch.Tensor:
        monkeypatch.setattr(evaluate, "TOGETHER", together)
        return evaluate.sample(model, options, texts, 64)

    whole = drawn(64, prompts)
    assert whole.shape == (5, 3, 64, 64)
    for together in (1, 2):
        torch.testing.assert_close(drawn(together, prompts), whole, rtol=0, atol=allowed)
    torch.testing.assert_close(drawn(64, prompts[:2]), whole[:2], rtol=0, atol=allowed)


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        ("euler(steps = 4)", [1, 0.9, 0.75, 0.5, 0]),
        ("euler(steps = 4, shift = 1)", [1, 0.75, 0.5, 0.25, 0]),
    ],
)
def test_times_are_shifted_as_they_were_trained(solver, expected):
    text = tiny.spec(
        more="  t' = shift(t, 3)\n", backbone=tiny.BACKBONE[:-1] + ", time_scale = 1000)"
    )
    text = text.replace("ddpm(beta = scaled_linear(0.00085, 0.012))", "linear")
    text = text.replace("v_prediction", "flow").replace("ddim(steps = 2)", solver)
    bundle = compile_text("tiny", text)
    made = evaluate.programs(bundle, "cpu")
    levels = evaluate.Levels(made.levels.compute, made.tables["levels"])
    walked = evaluate.times(bundle, block(bundle.read(), "sample")["solver"], levels, (4, 8, 8))
    assert walked.tolist() == pytest.approx(expected)


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
