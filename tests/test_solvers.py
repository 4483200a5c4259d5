"""Grids and solvers: published steps, diffusers, and Gaussian data with its exact denoiser."""

import math
from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler

from difftrain.sampling import grids, solvers

MEAN, STD = 0.3, 0.5  # the Gaussian data, per element


@dataclass
class Gaussian:
    """The exact model of N(MEAN, STD^2) data under a process given by its coefficients."""

    alpha: object
    sigma: object
    slopes: object = None  # t -> (dot(alpha), dot(sigma))

    def estimates(self, x, t):
        a, s = (c(t).reshape(-1, *[1] * (x.ndim - 1)) for c in (self.alpha, self.sigma))
        level = (x - a * MEAN) / ((a * STD) ** 2 + s**2)
        return MEAN + a * STD**2 * level, s * level

    def flow(self, x, t):
        x0_hat, eps_hat = self.estimates(x, t)
        da, ds = (c.reshape(-1, *[1] * (x.ndim - 1)) for c in self.slopes(t))
        return da * x0_hat + ds * eps_hat


LINEAR = Gaussian(lambda t: 1 - t, lambda t: t, lambda t: (-torch.ones_like(t), torch.ones_like(t)))
EXPLODING = Gaussian(
    torch.ones_like, lambda t: t, lambda t: (torch.zeros_like(t), torch.ones_like(t))
)


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


def test_index_grids_are_the_published_ones():
    assert grids.trailing(5, 1000).tolist() == [999, 799, 599, 399, 199, -1]
    assert grids.leading(5, 1000).tolist() == [800, 600, 400, 200, 0, -1]
    assert grids.leading(5, 1000, offset=1)[:2].tolist() == [801, 601]
    assert grids.uniform(5, 1000).tolist() == [999, 749, 500, 250, 0, -1]
    assert grids.trailing(1, 1000).tolist() == grids.uniform(1, 1000).tolist() == [999, -1]


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 20, 30, 50, 1000])
def test_index_grids_are_those_of_diffusers(spacing, steps):
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    make = {"linspace": grids.uniform}.get(spacing) or getattr(grids, spacing)
    if (spacing, steps) != (
        "linspace",
        1,
    ):  # theirs has only the index 0 then: no noise to start on
        assert make(steps, 1000)[:-1].tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, 1001])
def test_more_steps_than_the_process_has_are_refused(steps):
    with pytest.raises(ValueError, match=f"`steps = {steps}` does not fit a process of 1000 steps"):
        grids.trailing(steps, 1000)


def test_continuous_grids():
    assert grids.shifted(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert grids.shifted(4, 3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert grids.shifted(2, start=math.pi / 2).tolist() == pytest.approx([1.570796, 0.785398, 0])
    levels = grids.power(18)
    assert len(levels) == 19 and (levels.diff() < 0).all()
    assert levels[[0, 1, 17, 18]].tolist() == pytest.approx([80, 57.58598, 0.002, 0], rel=1e-5)


def test_euler_in_one_step_gives_the_golden_jump():
    class Golden:
        def flow(self, x, t):
            return 0.3 * x + 0.1 * t[:, None]

    eps = torch.cos(torch.arange(8, dtype=torch.float64)).reshape(2, 4)
    expected = [
        [0.6, 0.278211614108, -0.391302785583, -0.79299474762],
        [-0.557550534605, 0.0985635298243, 0.572119200655, 0.42773157804],
    ]
    jumped = solvers.euler(Golden(), eps, grids.shifted(1), draws(2))
    torch.testing.assert_close(jumped, torch.tensor(expected, dtype=torch.float64))


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


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("terminal", ["free", "zero"])
def test_ddim_follows_diffusers_step_by_step(eta, terminal):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
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


@pytest.mark.parametrize("solver", [solvers.euler, solvers.ddim])
@pytest.mark.parametrize(("model", "t"), [(LINEAR, 1.0), (EXPLODING, 4.0)])
def test_ode_solvers_converge_with_first_order(solver, model, t):
    """Gaussian data moves along a(t) MEAN + sqrt(a^2 STD^2 + s^2) z with z fixed."""
    a, s = model.alpha(torch.tensor([t])), model.sigma(torch.tensor([t]))
    z = start(draws(3), 5)
    x = a * MEAN + ((a * STD) ** 2 + s**2).sqrt() * z
    exact = MEAN + STD * z
    errors = [
        float((solver(model, x, grids.shifted(n, start=t), draws(3)) - exact).abs().max())
        for n in (64, 128, 256)
    ]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert coarse / fine == pytest.approx(2.0, abs=0.15)


def test_euler_and_ddim_agree_where_alpha_is_one():
    x, grid = 80 * start(draws(3), 5), grids.power(18)
    by_flow, by_estimates = (f(EXPLODING, x, grid, draws(3)) for f in (solvers.euler, solvers.ddim))
    torch.testing.assert_close(by_flow, by_estimates)


def test_samples_do_not_depend_on_the_batch_they_are_in():
    grid = grids.trailing(10, 1000)
    runs = [draws(6), draws(2), draws(4, first=2)]
    whole, *parts = (solvers.ddim(ddpm(), start(g, 3), grid, g, eta=1.0) for g in runs)
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [solvers.euler, solvers.ddim])
def test_the_precision_of_x_is_kept(solver, dtype):
    x = torch.zeros(2, 3, 4, 4, dtype=dtype)
    assert solver(LINEAR, x, grids.shifted(3), draws(2)).dtype == dtype


def affine(x, t, cond):
    return x * cond[:, None] + t[:, None], cond[:, None] - x


def test_guidance_is_one_batch_of_both_conditions():
    batches = []

    def evaluate(x, t, cond):
        batches.append(len(x))
        return affine(x, t, cond)

    x, t = torch.randn(3, 4), torch.tensor([0.1, 0.5, 0.9])
    cond, null = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0])
    given = solvers.guided(evaluate, cond, null, 7.5)(x, t)
    pairs = zip(affine(x, t, null), affine(x, t, cond), strict=True)
    for ours, (u, c) in zip(given, pairs, strict=True):
        torch.testing.assert_close(ours, u + 7.5 * (c - u))
    assert batches == [6]


def test_guidance_rests_outside_its_interval():
    x, t = torch.randn(3, 4), torch.tensor([0.1, 0.5, 0.9])
    cond, null = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
    evaluate = solvers.guided(affine, cond, null, 3.0, interval=(0.3, 0.6))
    plain, strong = affine(x, t, cond)[1], affine(x, t, 3 * cond)[1]
    torch.testing.assert_close(evaluate(x, t)[1], torch.stack([plain[0], strong[1], plain[2]]))


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
