"""Grids and solvers: published steps, diffusers, and Gaussian data with its exact denoiser."""

import math
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from difftrain.compiler.draws import Draws
from difftrain.sampling import grids, solvers

MEAN, STD = 0.3, 0.5  # the Gaussian data, per element


@dataclass
class Gaussian:
    """The exact model of N(MEAN, STD^2) data under a process given by its coefficients."""

    alpha: object
    sigma: object
    slopes: object = None  # t -> (dot(alpha), dot(sigma))

    def estimates(self, x, t):
        a, s = column(self.alpha(t), x), column(self.sigma(t), x)
        level = (x - a * MEAN) / ((a * STD) ** 2 + s**2)
        return MEAN + a * STD**2 * level, s * level

    def flow(self, x, t):
        x0_hat, eps_hat = self.estimates(x, t)
        da, ds = (column(c, x) for c in self.slopes(t))
        return da * x0_hat + ds * eps_hat

    def average(self, x, t, r):
        return (x - self.moved(x, t, r)) / column(t - r, x)

    def moved(self, x, t, r):
        """Where the ordinary differential equation takes x from t to r."""
        (a, s), (b, q) = ([column(c(u), x) for c in (self.alpha, self.sigma)] for u in (t, r))
        spread = ((b * STD) ** 2 + q**2).sqrt() / ((a * STD) ** 2 + s**2).sqrt()
        return b * MEAN + spread * (x - a * MEAN)


def column(values, like):
    return values.reshape(-1, *[1] * (like.ndim - 1))


@dataclass
class Counted:
    """A model, and how often its network is asked."""

    model: Gaussian
    calls: int = 0

    def __getattr__(self, name):
        found = getattr(self.model, name)
        self.calls += name in ("estimates", "flow", "average")
        return found


LINEAR = Gaussian(lambda t: 1 - t, lambda t: t, lambda t: (-torch.ones_like(t), torch.ones_like(t)))
EXPLODING = Gaussian(
    torch.ones_like, lambda t: t, lambda t: (torch.zeros_like(t), torch.ones_like(t))
)
TRIG = Gaussian(torch.cos, lambda t: t.sin() / 2, lambda t: (-t.sin(), t.cos() / 2))


def ddpm(zero_terminal=False):
    """The scaled-linear table of Stable Diffusion in float64, as diffusers makes it."""
    kept = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2).cumprod(0).sqrt()
    if zero_terminal:
        kept = (kept - kept[-1]) * kept[0] / (kept[0] - kept[-1])
    return Gaussian(lambda t: kept[t], lambda t: (1 - kept[t] ** 2).sqrt())


def draws(count, seed=1, first=0):
    return solvers.Draws(seed, torch.arange(first, first + count))


def start(given, *shape):
    return given.noise(0, torch.empty(len(given.index), *shape, dtype=torch.float64))


def test_a_stochastic_step_is_the_golden_posterior():
    """Linear betas, index 700 to 699, epsilon prediction 0.3 x + 0.07."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = (1 - beta).cumprod(0)
    here, there = ((kept[i].sqrt(), (1 - kept[i]).sqrt()) for i in (700, 699))
    k = torch.arange(8, dtype=torch.float64)
    x = here[0] * k.sin() + here[1] * k.cos()
    eps_hat = 0.3 * x + 0.07
    estimates = ((x - here[1] * eps_hat) / here[0], eps_hat)
    mean = solvers.ddim_move(estimates, here, there, torch.zeros_like(x), 1.0)
    moved = solvers.ddim_move(estimates, here, there, torch.ones_like(x), 1.0)
    expected = [0.998395786892, 0.60891381387, -0.341314103555, -0.978652800304]
    expected += [-0.717136017822, 0.202798920122, 0.93536807408, 0.807050742319]
    torch.testing.assert_close(mean, torch.tensor(expected, dtype=torch.float64))
    assert ((moved - mean) ** 2).tolist() == pytest.approx([0.0140425604996] * 8)


THEIRS = {  # the same process in diffusers' schedulers
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
}


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("terminal", ["free", "zero"])
def test_ddim_follows_diffusers_step_by_step(eta, terminal):
    scheduler = DDIMScheduler(
        **THEIRS,
        clip_sample=False,
        rescale_betas_zero_snr=terminal == "zero",
    )
    scheduler.set_timesteps(20)
    model, given = ddpm(terminal == "zero"), draws(4)
    x = first = start(given, 6)
    for step, t in enumerate(scheduler.timesteps, 1):
        x0_hat, eps_hat = model.estimates(x, t.expand(4))
        v = model.alpha(t) * eps_hat - model.sigma(t) * x0_hat
        x = scheduler.step(v, t, x, eta=eta, variance_noise=given.noise(step, x)).prev_sample
    ours = solvers.ddim(model, first, grids.trailing(20, 1000), given, eta)
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-4)  # their table is float32


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestors_follow_diffusers_step_by_step(variance):
    scheduler = DDPMScheduler(
        **THEIRS,
        clip_sample=False,
        variance_type=f"fixed_{variance}",
    )
    scheduler.set_timesteps(20)
    model, given = ddpm(), draws(4)
    x = first = start(given, 6)
    for step, t in enumerate(scheduler.timesteps, 1):
        x0_hat, eps_hat = model.estimates(x, t.expand(4))
        v = model.alpha(t) * eps_hat - model.sigma(t) * x0_hat
        mean = scheduler.step(v, t, x, generator=torch.Generator().manual_seed(0)).prev_sample
        drawn = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
        noise = given.noise(step, x) if step < 20 else 0  # the paper draws nothing at the end
        x = mean + scheduler._get_variance(t).sqrt() * (noise - drawn)
    ours = solvers.ancestral(model, first, grids.trailing(20, 1000), given, variance)
    torch.testing.assert_close(ours, x, rtol=0, atol=5e-4)  # their table is float32


def test_ancestors_of_the_smaller_variance_are_ddims():
    for model, grid in ((ddpm(True), grids.trailing(20, 1000)), (EXPLODING, grids.power(20))):
        given, x = draws(3), start(draws(3), 5)
        ours = solvers.ancestral(model, x, grid, given)
        torch.testing.assert_close(ours, solvers.ddim(model, x, grid, given, eta=1.0))


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize(
    ("model", "grid"),
    [
        (LINEAR, grids.shifted(400)),
        (EXPLODING, grids.power(400)),
        (ddpm(), grids.trailing(500, 1000)),
    ],
)
def test_ancestors_keep_the_moments(model, grid, variance):
    given = draws(4000)
    noise = solvers.start(model, torch.empty(4000, 2, dtype=torch.float64), grid, given)
    x = solvers.ancestral(model, noise, grid, given, variance)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(x.std()) == pytest.approx(STD, abs=0.025)


@pytest.mark.parametrize("model", [LINEAR, EXPLODING, TRIG])
def test_the_larger_variance_is_that_of_normal_data(model):
    """One step from t to s is exact for data N(0, 1): a_s^2 + s_s^2 is what comes out."""
    t, s = (torch.tensor([u], dtype=torch.float64) for u in (0.9, 0.5))

    class Normal(Gaussian):
        def estimates(self, x, t):
            a, s = column(self.alpha(t), x), column(self.sigma(t), x)
            return a / (a**2 + s**2) * x, None

    exact, given = Normal(model.alpha, model.sigma), draws(40_000)
    here, there = (float((model.alpha(u) ** 2 + model.sigma(u) ** 2).sqrt()) for u in (t, s))
    seen = []

    def estimates(x, t):
        seen.append(float(x.std()))
        return exact.estimates(x, t)

    walker = Gaussian(model.alpha, model.sigma)
    walker.estimates = estimates
    grid = torch.cat([t, s, torch.zeros_like(s)])
    solvers.ancestral(walker, here * start(given, 1), grid, given, "large")
    assert seen == [pytest.approx(here, rel=0.01), pytest.approx(there, rel=0.01)]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_moments_of_gaussian_data(eta):
    given = draws(2000)
    x = solvers.ddim(ddpm(True), start(given, 4), grids.trailing(200, 1000), given, eta)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x.std()) == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize(
    ("model", "grid"),
    [
        (LINEAR, grids.shifted(200, start=0.999)),
        (EXPLODING, grids.power(200)),
    ],
)
def test_stochastic_ddim_is_right_for_other_processes(model, grid):
    given = draws(2000)
    noise = solvers.start(model, torch.empty(2000, 4, dtype=torch.float64), grid, given)
    x = solvers.ddim(model, noise, grid, given, eta=1.0)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(x.std()) == pytest.approx(STD, abs=0.02)


ORDERS = {solvers.euler: 1, solvers.ddim: 1, solvers.heun: 2}


def along(model, t, z):
    """Gaussian data on its path at t, with z [B, ...] fixed: a MEAN + sqrt(a^2 STD^2 + s^2) z."""
    t = torch.tensor([t], dtype=torch.float64)
    return model.moved(MEAN + STD * z, torch.zeros_like(t), t)


def orders(solver, model, walks):
    """log2 of how much smaller the error gets from one grid to the next."""
    z = start(draws(3), 5)
    errors = []
    for grid in walks:
        x = solver(model, along(model, float(grid[0]), z), grid, draws(3))
        errors.append(float((x - MEAN - STD * z).abs().max()))
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


@pytest.mark.parametrize("solver", ORDERS)
@pytest.mark.parametrize(("model", "t"), [(LINEAR, 1.0), (EXPLODING, 4.0), (TRIG, 1.5)])
def test_the_order_of_convergence(solver, model, t):
    walks = [grids.shifted(n, start=t) for n in (64, 128, 256)]
    assert orders(solver, model, walks) == pytest.approx([ORDERS[solver]] * 2, abs=0.15)


@pytest.mark.parametrize(("model", "end"), [(LINEAR, 1.0), (EXPLODING, 9.0), (TRIG, 1.57)])
def test_the_order_of_dpm_solver_pp_where_levels_are_even(model, end):
    """It is exact in the logarithm of the noise: times that are even in t are not what it wants."""
    noise = [torch.logspace(0.6, -5, n, dtype=torch.float64) for n in (64, 128, 256)]
    walks = [torch.cat([grids.at_noise(model, s, 0, end), s.new_zeros(1)]) for s in noise]
    assert orders(solvers.dpm_solver_pp, model, walks) == pytest.approx([2, 2], abs=0.1)


WALKS = [
    (LINEAR, grids.shifted(200)),
    (TRIG, grids.shifted(200, start=1.5645)),
    (EXPLODING, grids.power(400, rho=3)),
]


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("model", "grid"), WALKS)
def test_noise_between_two_estimates_keeps_the_moments(model, grid, scale):
    given = draws(4000)
    noise = solvers.start(model, torch.empty(4000, 2, dtype=torch.float64), grid, given)
    x = solvers.dpm_solver_pp(model, noise, grid, given, scale)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(x.std()) == pytest.approx(STD, abs=0.025)


# ---- churn


def published(model, x, grid, given, s_churn, s_min, s_max, s_noise):
    """arXiv:2206.00364 algorithm 2, line by line, for alpha = 1 and sigma = t."""
    count = len(grid) - 1
    for i in range(count):
        t, after = grid[i], grid[i + 1]
        gamma = min(s_churn / count, math.sqrt(2) - 1) if s_min <= t <= s_max else 0.0
        noise = s_noise * given.noise(i + 1, x)
        raised = t + gamma * t
        x = x + (raised**2 - t**2).sqrt() * noise
        slope = model.flow(x, raised.expand(len(x)))
        ahead = x + (after - raised) * slope
        if after:
            slope = (slope + model.flow(ahead, after.expand(len(x)))) / 2
        x = x + (after - raised) * slope
    return x


@pytest.mark.parametrize(("s_churn", "s_noise"), [(3.0, 1.007), (40.0, 1.0)])
def test_churn_is_the_published_one(s_churn, s_noise):
    grid, given, x = grids.power(12), draws(3), 80 * start(draws(3), 5)
    options = {"s_churn": s_churn, "s_min": 0.05, "s_max": 50.0, "s_noise": s_noise}
    ours = solvers.heun(EXPLODING, x, grid, given, **options)
    torch.testing.assert_close(ours, published(EXPLODING, x, grid, given, **options))


def test_churn_raises_sigma_over_alpha_by_one_share_on_every_process():
    for model, start_at in ((LINEAR, 1.0), (TRIG, 1.5), (EXPLODING, 9.0)):
        grid = grids.shifted(8, start=start_at)
        raised = solvers.churn(model, grid, 1.6, 0.1, 2.0)
        before, after = (model.sigma(t) / model.alpha(t) for t in (grid[:-1], raised))
        within = (before >= 0.1) & (before <= 2.0) & (1.2 * before < before[0])
        assert within.any() and not within.all()
        torch.testing.assert_close(after[within], 1.2 * before[within])
        torch.testing.assert_close(after[before > 2.0], before[before > 2.0])


def test_nothing_is_churned_above_the_start():
    grid = grids.power(6, rho=1.0)
    assert solvers.churn(EXPLODING, grid, 100.0, 0.0, 1e6).max() == grid[0]


@pytest.mark.parametrize(("model", "grid"), WALKS)
def test_churn_keeps_the_moments(model, grid):
    given = draws(4000)
    noise = solvers.start(model, torch.empty(4000, 2, dtype=torch.float64), grid, given)
    x = solvers.heun(model, noise, grid, given, s_churn=20.0, s_min=0.05, s_max=50.0)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(x.std()) == pytest.approx(STD, abs=0.015)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("model", "grid"), WALKS)
def test_noise_on_the_way_keeps_the_moments(model, grid, scale):
    given = draws(4000)
    noise = solvers.start(model, torch.empty(4000, 2, dtype=torch.float64), grid, given)
    x = solvers.euler_maruyama(model, noise, grid, given, scale)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(x.std()) == pytest.approx(STD, abs=0.015)


@pytest.mark.parametrize("model", [LINEAR, EXPLODING, TRIG])
def test_noise_on_the_way_is_alpha_times_as_strong_as_the_forward_process(model):
    """g^2 = sigma^2' - 2 sigma^2 alpha' / alpha is that of arXiv:2011.13456: any other keeps the
    moments as well."""
    grid, scale, ends = torch.tensor([0.7, 0.6, 0.0], dtype=torch.float64), 1.5, []
    for drawn in (0.0, 1.0):
        last = Gaussian(model.alpha, model.sigma, model.slopes)
        last.flow = lambda x, t: ends.append(x) or x
        given = SimpleNamespace(noise=lambda step, like, drawn=drawn: torch.full_like(like, drawn))
        solvers.euler_maruyama(last, start(draws(3), 5), grid, given, scale)
    t = grid[:1]
    (a, s), (rise, fall) = (model.alpha(t), model.sigma(t)), model.slopes(t)
    forward = 2 * s * fall - 2 * s**2 * rise / a
    wanted = (0.1 * scale * a * forward).sqrt().expand(3, 5)
    torch.testing.assert_close(ends[1] - ends[0], wanted)


def test_without_noise_on_the_way_it_is_euler():
    x, grid = start(draws(3), 5), grids.shifted(7)
    ours = solvers.euler_maruyama(LINEAR, x, grid, draws(3), 0.0)
    torch.testing.assert_close(ours, solvers.euler(LINEAR, x, grid, draws(3)))


class Consistent(Gaussian):
    """Its x0_hat is where the path through (x, t) ends."""

    def estimates(self, x, t):
        end = self.moved(x, t, torch.zeros_like(t))
        return end, (x - column(self.alpha(t), x) * end) / column(self.sigma(t), x)


@pytest.mark.parametrize("times", [[], [1.1], [1.3, 0.8, 0.2]])
def test_multistep_with_the_exact_function_keeps_the_moments(times):
    model = Consistent(TRIG.alpha, TRIG.sigma)
    grid, given = torch.tensor([1.56454, *times, 0], dtype=torch.float64), draws(4000)
    noise = solvers.start(model, torch.empty(4000, 2, dtype=torch.float64), grid, given)
    x = solvers.multistep(model, noise, grid, given)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x.std()) == pytest.approx(STD, abs=0.01)


def test_multistep_draws_fresh_noise_for_each_time():
    grid, given, x = grids.shifted(3), draws(3), start(draws(3), 5)
    model, t = Consistent(LINEAR.alpha, LINEAR.sigma), grid[:, None].expand(4, 3)
    for step in range(3):
        clean = model.estimates(x, t[step])[0]
        x = (1 - grid[step + 1]) * clean + grid[step + 1] * given.noise(step + 1, clean)
    last = solvers.multistep(model, start(draws(3), 5), grid, draws(3))
    torch.testing.assert_close(last, clean)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("model", "t"), [(LINEAR, 1.0), (EXPLODING, 80.0), (TRIG, 1.5)])
def test_jumps_by_the_exact_average_flow_are_exact(model, t, steps):
    z = start(draws(3), 5)
    x = solvers.jump(model, along(model, t, z), grids.shifted(steps, start=t), draws(3))
    torch.testing.assert_close(x, MEAN + STD * z)


@pytest.mark.parametrize(
    ("solver", "calls"),
    [
        (solvers.ddim, 5),
        (solvers.ancestral, 5),
        (solvers.euler, 5),
        (solvers.heun, 9),
        (partial(solvers.heun, s_churn=1.0), 9),
        (solvers.euler_maruyama, 5),
        (solvers.dpm_solver_pp, 5),
        (solvers.multistep, 5),
        (solvers.jump, 5),
    ],
)
def test_how_often_the_network_is_asked(solver, calls):
    model = Counted(LINEAR)
    solver(model, start(draws(2), 3), grids.shifted(5), draws(2))
    assert model.calls == calls


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("terminal", ["free", "zero"])
def test_dpm_solver_pp_follows_diffusers_step_by_step(terminal, scale):
    scheduler = DPMSolverMultistepScheduler(
        **THEIRS,
        algorithm_type="sde-dpmsolver++" if scale else "dpmsolver++",
        final_sigmas_type="zero",
        rescale_betas_zero_snr=terminal == "zero",
    )
    scheduler.set_timesteps(20)
    model, given = ddpm(terminal == "zero"), draws(4)
    x = first = start(given, 6)
    for step, t in enumerate(scheduler.timesteps, 1):
        x0_hat, eps_hat = model.estimates(x, t.expand(4))
        v = model.alpha(t) * eps_hat - model.sigma(t) * x0_hat
        x = scheduler.step(v, t, x, variance_noise=given.noise(step, x)).prev_sample
    ours = solvers.dpm_solver_pp(model, first, grids.trailing(20, 1000), given, scale)
    torch.testing.assert_close(ours, x, rtol=0, atol=5e-4)  # their table is float32


def test_euler_and_ddim_agree_where_alpha_is_one():
    x, grid = 80 * start(draws(3), 5), grids.power(18)
    by_flow, by_estimates = (f(EXPLODING, x, grid, draws(3)) for f in (solvers.euler, solvers.ddim))
    torch.testing.assert_close(by_flow, by_estimates)


NOISY = [
    partial(solvers.ddim, eta=1.0),
    solvers.ancestral,
    solvers.euler_maruyama,
    partial(solvers.dpm_solver_pp, scale=1.0),
    partial(solvers.heun, s_churn=2.0),
    solvers.multistep,
]


@pytest.mark.parametrize("solver", NOISY)
def test_samples_do_not_depend_on_the_batch_they_are_in(solver):
    grid = grids.shifted(10)
    runs = [draws(6), draws(2), draws(4, first=2)]
    whole, *parts = (solver(LINEAR, start(g, 3), grid, g) for g in runs)
    assert torch.equal(whole, torch.cat(parts))


def test_noise_of_another_law():
    def law(like, draws):
        level = draws.normal("level", 0.0, 1.0)
        return draws.noise("eps", like) + 0.1 * column(level, like)

    grid, index = grids.shifted(3), torch.arange(4)
    given = solvers.Draws(1, index, law)
    like = torch.empty(4, 3, dtype=torch.float64)
    step = Draws(1, 0, index, torch.float64)
    torch.testing.assert_close(solvers.start(LINEAR, like, grid, given), law(like, step))
    moved = solvers.multistep(LINEAR, like.zero_(), grid, given)
    assert not torch.equal(moved, solvers.multistep(LINEAR, like, grid, solvers.Draws(1, index)))


SOLVERS = (*ORDERS, *NOISY, solvers.dpm_solver_pp, solvers.jump)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_precision_of_x_is_kept(solver, dtype):
    x = torch.zeros(2, 3, 4, 4, dtype=dtype)
    assert solver(LINEAR, x, grids.shifted(3), draws(2)).dtype == dtype


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_finer_table_of_levels_does_not_change_the_precision_of_x(eta):
    table, given, grid = ddpm(), draws(2), grids.trailing(4, 1000)

    class Rounded(Gaussian):
        def estimates(self, x, t):
            return tuple(value.float() for value in super().estimates(x.double(), t))

    x = start(given, 3)
    rounded = solvers.ddim(Rounded(table.alpha, table.sigma), x.float(), grid, given, eta)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, solvers.ddim(table, x, grid, given, eta).float())
