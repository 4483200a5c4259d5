"""Methods against their papers' formulas, written out by hand in float64 for the networks of the
golden numbers, where no independent number is at hand."""

import pytest
import torch
from conftest import near, spec_of, student, wide

import difftrain

F64 = torch.float64
T = torch.tensor([0.3, 0.7], dtype=F64)


def teacher(x, tau):
    return 0.25 * x + 0.20 * wide(tau)


def unconditional(x, tau):
    return 0.20 * x - 0.05 * wide(tau)


def objective(process, prediction, more, network=student, backbone="custom", **modules):
    body = f"process = {process}\nprediction_type = {prediction}\n{more}"
    spec = spec_of(body) if backbone == "custom" else _declared(body, backbone)
    return difftrain.objective(spec, network, modules=modules)


def _declared(body: str, backbone: str):
    from difftrain.language.check import check
    from difftrain.language.tree import Source

    source = Source("test.diff", f"diff 1\nobjective o {{\n{body}\nbackbone = {backbone}\n}}\n")
    spec, found = check(source)
    assert not [f for f in found if f.severity == "error"], found
    return spec


def guided(x, tau, w: float):
    """In Imagen form."""
    return unconditional(x, tau) + w * (teacher(x, tau) - unconditional(x, tau))


def two_minds(x, t, cond, scale: float = 1.0):
    """The teacher of the golden numbers: conditional on 1, unconditional on 0."""
    tau = t.double() / scale
    return torch.where(wide(cond[:, 0]) > 0, teacher(x, tau), unconditional(x, tau))


CONDITIONS = {"cond": torch.ones(2, 1, dtype=F64), "null": torch.zeros(1, 1, dtype=F64)}


# ---- distillation of a table of steps (arXiv:2310.04378 algorithm 1)


def test_a_guided_step_of_the_teacher(x0, eps):
    w, index, skip = 7.0, torch.tensor([39, 759]), 20
    ours = objective(
        "ddpm(beta = scaled_linear(0.00085, 0.012))", "epsilon", "strategy = lcm",
        lambda x, t, cond: student(x, t.double() / 1000),
        teacher=lambda x, t, cond: two_minds(x, t, cond, 1000),
    )  # fmt: skip
    given = {"x0": x0, "eps": eps, "t": index, "lcm.w": torch.full((2,), w, dtype=F64)}
    values = ours.evaluate(("lcm.xs", "loss"), {**given, **CONDITIONS})
    level = ours.alphas_cumprod
    earlier = (index - skip).clamp(min=0)
    (a, s), (a2, s2) = (
        (wide(level[i].sqrt()), wide((1 - level[i]).sqrt())) for i in (index, earlier)
    )
    xt = a * x0 + s * eps
    noise = guided(xt, index.double() / 1000, 1 + w)
    xs = a2 * (xt - s * noise) / a + s2 * noise
    near(values["lcm.xs"], xs.flatten().tolist())

    def f(x, i, a, s):
        n = wide(i.double())
        clean = (x - s * student(x, i.double() / 1000)) / a
        return 0.25 / ((10 * n) ** 2 + 0.25) * x + 10 * n / ((10 * n) ** 2 + 0.25).sqrt() * clean

    gap = f(xt, index, a, s) - f(xs, earlier, a2, s2)
    near(values["loss"], ((gap**2 + 1e-6).sqrt() - 1e-3).mean((1, 2, 3)).tolist())


# ---- consistency on a grid (arXiv:2310.14189)


def boundary(x, sigma, low=0.002, data=0.5):
    s = wide(sigma)
    skip = data**2 / ((s - low) ** 2 + data**2)
    out = data * (s - low) / (s**2 + data**2).sqrt()
    return skip * x + out * student(x / (s**2 + data**2).sqrt(), sigma.log() / 4)


def levels(i, n, low=0.002, high=80.0, rho=7.0):
    return (low ** (1 / rho) + i / (n - 1) * (high ** (1 / rho) - low ** (1 / rho))) ** rho


@pytest.mark.parametrize(("step", "count"), [(0, 11), (100, 11), (200, 21), (799, 81)])
def test_improved_consistency_training(x0, eps, step, count):
    """8 stages over 800 steps, 10 to 1280 intervals."""
    ours = objective("edm", "sample", "strategy = ict(total = 800)")
    i = torch.tensor([3, 7])
    given = {"x0": x0, "eps": eps, "ict.i": i}
    values = ours.evaluate(("t", "xt", "ict.points", "loss"), given, step=step)
    near(values["ict.points"], [10 * 2 ** (step // 100) + 1.0])
    n = 10 * 2 ** (step // 100) + 1
    assert count <= n
    high, low = levels(i.double() + 1, n), levels(i.double(), n)
    near(values["t"], high.tolist())
    gap = boundary(x0 + wide(high) * eps, high) - boundary(x0 + wide(low) * eps, low)
    c = 0.00054 * 4**0.5
    wanted = ((gap**2).sum((1, 2, 3)) + c**2).sqrt() - c
    near(values["loss"], (wanted / (high - low)).tolist())


def test_levels_are_drawn_by_a_discretised_law():
    ours = objective("edm", "sample", "strategy = ict(total = 800)")
    x0 = torch.zeros(20_000, 1, 1, 1, dtype=F64)
    drawn = ours.evaluate(("ict.i", "xt"), {"x0": x0})["ict.i"]
    edges = ((levels(torch.arange(11, dtype=F64), 11).log() + 1.1) / (2 * 2**0.5)).erf()
    mass = edges.diff() / edges.diff().sum()
    counted = torch.bincount(drawn, minlength=10)[:10] / len(drawn)
    assert (counted - mass).abs().max() < 0.015 and drawn.max() < 10


# ---- average velocities with guidance inside (arXiv:2505.13447 eq. 21)


def average(x, t, cond, r):
    """0.3 x + 0.1 t + 0.05 r with the condition's share: slopes that are known."""
    return 0.30 * x + 0.10 * wide(t) + 0.05 * wide(r) + 0.2 * wide(cond[:, 0])


ORDERS = ("mean_flow({}), drop_condition", "drop_condition, mean_flow({})")


@pytest.mark.parametrize("order", ORDERS)
def test_guidance_inside_an_average_velocity(x0, eps, order):
    omega, kappa = 1.5, 0.25
    strategy = order.format(f"omega = {omega}, kappa = {kappa}, start = 0.1, end = 0.9, c = 0.001")
    ours = objective(
        "linear", "flow", f"strategy = [{strategy}]", average, "custom(times = [t, r])"
    )
    r = torch.tensor([0.1, 0.7], dtype=F64)
    dropped = torch.tensor([False, True])
    given = {"x0": x0, "eps": eps, "t": T, "r": r, "drop_condition.drop": dropped, **CONDITIONS}
    values = ours.evaluate(("flow", "pred", "target", "mean_flow.raw", "loss"), given)
    xt = (1 - wide(T)) * x0 + wide(T) * eps
    void, shown = (average(xt, T, torch.full((2, 1), v, dtype=F64), T) for v in (0.0, 1.0))
    plain = eps - x0
    inside = omega * plain + (1 - omega - kappa) * void + kappa * shown
    flow = torch.where(wide(dropped.double()) > 0, plain, inside)
    near(values["flow"], flow.flatten().tolist())
    target = flow - wide(T - r) * (0.30 * flow + 0.10)
    near(values["target"], target.flatten().tolist())
    cond = torch.where(dropped[:, None], 0.0, 1.0).double()
    square = (average(xt, T, cond, r) - target).square().sum((1, 2, 3))
    near(values["mean_flow.raw"], square.tolist())
    near(values["loss"], (square / (square + 0.001)).tolist())


def test_outside_the_interval_nothing_is_guided(x0, eps):
    ours = objective(
        "linear", "flow", "strategy = mean_flow(omega = 3, start = 0.4, end = 0.6)", average,
        "custom(times = [t, r])",
    )  # fmt: skip
    given = {"x0": x0, "eps": eps, "t": T, "r": T, **CONDITIONS}
    near(ours.evaluate(("flow",), given)["flow"], (eps - x0).flatten().tolist())


# ---- continuous-time consistency (arXiv:2410.11081 eq. 6)

ANGLE = torch.tensor([0.4, 1.2], dtype=F64)


@pytest.mark.parametrize(("step", "ramp"), [(5000, 0.5), (20000, 1.0)])
@pytest.mark.parametrize("scale", [None, 2.0])
def test_the_tangent_and_its_warm_up(x0, eps, step, ramp, scale):
    """sd = 0.5; F(x / sd, t) = 0.6 x + 0.1 t, so dF/dt = 0.6 dx/dt + 0.1 along the path."""
    more = "strategy = sct" if scale is None else f"strategy = scd(scale = {scale})"
    ours = objective("trig(data = 0.5)", "flow", more, teacher=two_minds)
    given = {"x0": x0, "eps": eps, "t": ANGLE, **CONDITIONS}
    name = "sct" if scale is None else "scd"
    names = (f"{name}.g", f"{name}.tangent", "loss")
    values = ours.evaluate(names, given, step=step)
    cos, sin = wide(ANGLE.cos()), wide(ANGLE.sin())
    xt = cos * x0 + 0.5 * sin * eps
    slope = 0.5 * cos * eps - sin * x0
    if scale is not None:
        slope = 0.5 * guided(2 * xt, ANGLE, scale)
    output = 0.6 * xt + 0.1 * wide(ANGLE)
    g = -(cos**2) * (0.5 * output - slope)
    g = g - ramp * cos * sin * (xt + 0.5 * (0.6 * slope + 0.1))
    near(values[f"{name}.g"], g.flatten().tolist())
    unit = g / (g.square().sum((1, 2, 3), keepdim=True).sqrt() + 0.1)
    near(values[f"{name}.tangent"], unit.flatten().tolist())
    near(values["loss"], unit.square().mean((1, 2, 3)).tolist())


# ---- one extra forward, for every prediction type (arXiv:2312.00210; objectives in any row)

ROWS = {
    "sample": (lambda t: 1.0 + 0 * t, lambda t: 0 * t),
    "flow": (lambda t: -1.0 + 0 * t, lambda t: 1.0 + 0 * t),
    "epsilon": (lambda t: 0 * t, lambda t: 1.0 + 0 * t),
}


@pytest.mark.parametrize("prediction", ROWS)
@pytest.mark.parametrize("p", [0, 1, 2])
def test_estimated_noise_in_every_row(x0, eps, prediction, p):
    ours = objective("linear", prediction, f"strategy = dream(p = {p})")
    values = ours.evaluate(("xt", "target", "loss"), {"x0": x0, "eps": eps, "t": T})
    alpha, sigma = wide(1 - T), wide(T)
    a, b = (wide(f(T)) for f in ROWS[prediction])
    xt = alpha * x0 + sigma * eps
    found = (alpha * student(xt, T) - a * xt) / (alpha * b - sigma * a)
    d = (sigma / (alpha**2 + sigma**2).sqrt()) ** p * (eps - found)
    near(values["xt"], (xt + sigma * d).flatten().tolist())
    near(values["target"], (a * x0 + b * (eps + d)).flatten().tolist())
    gap = student(xt + sigma * d, T) - (a * x0 + b * (eps + d))
    near(values["loss"], gap.square().mean((1, 2, 3)).tolist())


# ---- further processes and weights


def test_an_input_that_is_perturbed_keeps_its_target(x0, eps):
    ours = objective("ddpm", "epsilon", "strategy = input_perturbation(0.1)",
                     lambda x, t, cond: student(x, t.double() / 1000))  # fmt: skip
    extra = torch.arange(50, 58, dtype=F64).cos().reshape(2, 1, 2, 2)
    index = torch.tensor([200, 700])
    given = {"x0": x0, "eps": eps, "t": index, "input_perturbation.extra": extra}
    values = ours.evaluate(("xt", "target", "loss"), given)
    level = ours.alphas_cumprod[index]
    a, s = wide(level.sqrt()), wide((1 - level).sqrt())
    near(values["xt"], (a * x0 + s * (eps + 0.1 * extra)).flatten().tolist())
    near(values["target"], eps.flatten().tolist())


@pytest.mark.parametrize("process", ["subvp", "ve"])
def test_further_paths(x0, eps, process):
    ours = objective(process, "epsilon", "")
    values = ours.evaluate(("alpha", "sigma", "loss"), {"x0": x0, "eps": eps, "t": T})
    area = 0.1 * T + 19.9 * T**2 / 2
    alpha = (-area / 2).exp() if process == "subvp" else torch.ones_like(T)
    sigma = 1 - (-area).exp() if process == "subvp" else 0.01 * 5000**T
    near(values["alpha"], alpha.tolist())
    near(values["sigma"], sigma.tolist())
    gap = student(wide(alpha) * x0 + wide(sigma) * eps, T) - eps
    near(values["loss"], gap.square().mean((1, 2, 3)).tolist())


def test_a_learned_variance(x0, eps):
    """arXiv:2312.02696 eq. 21 at u = 0.2, on top of the preconditioned loss."""
    more = "strategy = edm_precondition(0.5)\nloss = uncertainty(fit)"
    ours = objective("edm", "sample", more, logvar=lambda c: 0.2 + 0 * c)
    sigma = torch.tensor([0.5, 2.0], dtype=F64)
    values = ours.evaluate(("fit", "loss"), {"x0": x0, "eps": eps, "t": sigma})
    u = torch.tensor(0.2, dtype=F64)
    near(values["loss"], (values["fit"] / u.exp() + u).tolist())
