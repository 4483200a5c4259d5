"""Networks that jump, on Gaussian data: at the exact jump the expected gradient vanishes.

Along the flow a point keeps its number of deviations from the mean, so the exact jump, the average
flow and the teacher are known. The condition of these networks is the mean of the data: the flow is
affine in it, so that guidance is another mean.
"""

import pytest
import torch
from analytic import PATHS, Nodes, hermite
from conftest import near, spec_of

import difftrain

STD = 0.4
SHOWN, VOID = 0.3, -0.2  # the means of the data with and without a condition
F64 = torch.float64


def column(v):
    return v.reshape(-1, 1, 1)


def wide(levels):
    alpha, sigma = levels
    return ((alpha * STD) ** 2 + sigma**2).sqrt()


def moved(x, mean, here, there):
    """Where the flow through x at the levels `here` is at the levels `there`."""
    return there[0] * mean + wide(there) / wide(here) * (x - here[0] * mean)


def estimates(x, mean, levels):
    """E[x0 | xt = x] and E[eps | xt = x]."""
    alpha, sigma = levels
    x0 = mean + alpha * STD**2 / wide(levels) ** 2 * (x - alpha * mean)
    return x0, (x - alpha * x0) / sigma


def flow(x, mean, path, t):
    """E[flow | xt = x]."""
    x0, eps = estimates(x, mean, path.levels(t))
    rise, fall = path.slopes(t)
    return rise * x0 + fall * eps


def turned(process: str, t, mean: float = SHOWN, count: int = 4) -> Nodes:
    """A quadrature over xt, and, given xt, over what the flow differs from its mean: symmetric, so
    that every weight of an error's size leaves its mean 0."""
    points, weights = hermite(count)
    one, two = torch.cartesian_prod(points, points).repeat(len(t), 1).T[..., None, None]
    place = torch.arange(len(t)).repeat_interleave(count**2)
    alpha, sigma = (column(v[place]) for v in PATHS[process].levels(t))
    size = wide((alpha, sigma))
    x0 = mean + STD * (alpha * STD * one + sigma * two) / size
    eps = (sigma * one - alpha * STD * two) / size
    return Nodes(x0, eps, torch.cartesian_prod(weights, weights).prod(1).repeat(len(t)), place)


def pull(spec, exact, nodes: Nodes, given, away: float = 0.0, teacher=None) -> torch.Tensor:
    """The gradient [2, T] of the expected loss in a line that is added to the exact network, of its
    own at each time: its slope and intercept are `away`."""
    line = torch.full((2, int(nodes.place.max()) + 1), away, dtype=F64, requires_grad=True)

    def network(x, t, cond=None, **extra):
        slope, intercept = line[:, nodes.place, None, None]
        return exact(x, t, cond, **extra) + slope * x + intercept

    modules = {"teacher": teacher} if teacher else {}
    means = {"cond": torch.full_like(nodes.x0, SHOWN), "null": torch.full_like(nodes.x0, VOID)}
    data = {"x0": nodes.x0, "eps": nodes.eps, **means, **given}
    loss = difftrain.objective(spec, network, modules=modules).evaluate(("loss",), data)["loss"]
    return torch.autograd.grad(nodes.mean(loss).sum(), line)[0]


def vanishes(*problem, **modules) -> None:
    """The gradient is 0 at the exact network, and not beside it."""
    found = pull(*problem, **modules)
    near(found, [0.0] * found.numel())
    assert pull(*problem, away=0.1, **modules).norm(dim=0).min() > 5e-4


# ---- average flows


def average_flow(mean):
    """(x - x_r) / (t - r), where x_r is on the curve of the flow through x; the flow at r = t."""
    path = PATHS["linear"]

    def network(x, t, cond=None, r=None):
        t, r = column(t), column(r)
        gap = torch.where(t == r, 1, t - r)
        mean_flow = (x - moved(x, mean(cond), path.levels(t), path.levels(r))) / gap
        return torch.where(t == r, flow(x, mean(cond), path, t), mean_flow)

    return network


def jumps(options: str, dropped: bool = False):
    """The objective, nodes and given values of one that learns the average flow."""
    strategy = f"strategy = [mean_flow({options}), drop_condition(0.5)]"
    text = f"process = linear\nprediction_type = flow\n{strategy}"
    spec = spec_of(text, backbone="custom(times = [t, r])")
    t = torch.tensor([0.3, 0.6, 0.9], dtype=F64)
    nodes = turned("linear", t, VOID if dropped else SHOWN)
    drop = torch.full((len(nodes.place),), dropped)
    given = {"t": t[nodes.place], "r": (t / 2)[nodes.place], "drop_condition.drop": drop}
    return spec, nodes, given


@pytest.mark.parametrize("p", [0, 0.5, 1])
def test_the_average_flow_is_the_optimum(p):
    """arXiv:2505.13447 eq. 6, however the error is weighted by its size."""
    spec, nodes, given = jumps(f"p = {p}")
    vanishes(spec, average_flow(lambda cond: cond), nodes, given)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("p", [0, 1])
@pytest.mark.parametrize(("omega", "kappa"), [(1.5, 0.0), (1.5, 0.25)])
def test_the_average_of_the_guided_flow_is_the_optimum(omega, kappa, p, dropped):
    """arXiv:2505.13447 eq. 20: with guidance v = omega flow + (1 - omega - kappa) v(null)
    + kappa v, and that of rows without a condition stays as it is."""
    guided = (omega * SHOWN + (1 - omega - kappa) * VOID) / (1 - kappa)
    spec, nodes, given = jumps(f"p = {p}, omega = {omega}, kappa = {kappa}", dropped)
    exact = average_flow(lambda cond: torch.where(cond == VOID, cond, guided))
    vanishes(spec, exact, nodes, given)
    if not dropped:
        assert pull(spec, average_flow(lambda cond: cond), nodes, given).abs().min() > 0.005


# ---- jumps to data, by their tangent


def to_data(mean, ramp: float):
    """cos(t) x - sin(t) pred = the end of the curve through x; the flow itself where ramp = 0. The
    network is fed xt / data, and gives pred / data."""
    path, data = PATHS["trig"], 0.5

    def network(x, t, cond=None):
        x, t = x * data, column(t)
        end = moved(x, mean(cond), path.levels(t), path.levels(torch.zeros_like(t)))
        jump = (t.cos() * x - end) / t.sin()
        return (jump if ramp else flow(x, mean(cond), path, t)) / data

    return network


def tangents(strategy: str, ramp: float):
    text = f"process = trig(data = 0.5)\nprediction_type = flow\nstrategy = {strategy}"
    t = torch.tensor(PATHS["trig"].times, dtype=F64)
    nodes = turned("trig", t)
    label = strategy.partition("(")[0]
    return spec_of(text), nodes, {"t": t[nodes.place], f"{label}.ramp": torch.tensor(ramp).double()}


@pytest.mark.parametrize("ramp", [0.0, 1.0])
def test_the_jump_to_data_is_the_optimum_of_its_tangent(ramp):
    spec, nodes, given = tangents("sct", ramp)
    vanishes(spec, to_data(lambda cond: cond, ramp), nodes, given)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("ramp", [0.0, 1.0])
def test_the_jump_along_the_teacher_s_path_is_the_optimum(ramp, scale):
    """Whatever data it is shown: here of the mean without guidance."""
    guided = VOID + scale * (SHOWN - VOID)
    spec, nodes, given = tangents(f"scd(scale = {scale})", ramp)
    exact, teacher = to_data(lambda cond: guided, ramp), to_data(lambda cond: cond, 0.0)
    vanishes(spec, exact, nodes, given, teacher=teacher)


# ---- jumps to data, by pairs of times: exact as the pairs come closer


def order(coarse, fine) -> torch.Tensor:
    """The power of the distance of a pair with which a gradient falls, [T]."""
    return torch.log2(coarse.norm(dim=0) / fine.norm(dim=0))


LOW, DATA = 0.002, 0.5  # of `consistency`


def along_levels(x, t, cond):
    """f(x, t) = the point at the lowest level of the curve through x."""
    t = column((4 * t).exp())  # c_noise = log(t) / 4
    size = (t**2 + DATA**2).sqrt()
    x, low = x * size, torch.full_like(t, LOW)
    end = moved(x, cond, PATHS["edm"].levels(t), PATHS["edm"].levels(low))
    skip = DATA**2 / ((t - LOW) ** 2 + DATA**2)
    return (end - skip * x) * size / (DATA * (t - LOW))


def paired(strategy: str, steps: int, away: float) -> torch.Tensor:
    """The gradient at a quarter, a half and three quarters of a grid of so many steps."""
    label = strategy.partition("(")[0]
    spec = spec_of(f"process = edm\nprediction_type = sample\nstrategy = {strategy}")
    later = steps * torch.arange(1, 4) // 4
    share = later.double() / steps
    ends = LOW ** (1 / 7), 80 ** (1 / 7)
    nodes = turned("edm", (ends[0] + share * (ends[1] - ends[0])) ** 7)
    given = {f"{label}.i": (later - 1)[nodes.place]}
    return pull(spec, along_levels, nodes, given, away)


@pytest.mark.parametrize(
    ("strategy", "power"),
    [
        ("ct(total = 10, start = {0}, end = {0})", 1),
        ("ict(total = 10, start = {1}, end = {1}, c = 1)", 0),
    ],
)
def test_consistency_is_exact_in_the_limit_of_many_levels(strategy, power):
    """One step is that of Euler's method: its error is one order smaller than the difference that
    any other network makes. Below c a norm is a square, and `ict` divides it by the distance."""
    steps = (128, 256)
    texts = [strategy.format(n + 1, n) for n in steps]
    exact, other = (
        [paired(*s, away) for s in zip(texts, steps, strict=True)] for away in (0.0, 0.1)
    )
    near(order(*other), [power] * 3, 0.1)
    near(order(*exact), [power + 1] * 3, 0.1)


def on_indices(mean):
    """f(x, t) = the point at index 0 of the curve through x, of a network that predicts eps."""
    path, scaling = PATHS["ddpm"], 10

    def network(x, t, cond=None, w=None):
        index = column(t)
        here, first = path.levels(index), path.levels(torch.zeros_like(index))
        end = moved(x, mean(cond, column(w)), here, first)
        size = ((scaling * index) ** 2 + DATA**2).sqrt()
        clean = (end - DATA**2 / size**2 * x) * size / (scaling * index)
        return (x - here[0] * clean) / here[1]

    return network


def skipping(skip: int, away: float) -> torch.Tensor:
    """The gradient at three indices, with a scale of guidance of its own in every row."""
    options = f"lcm(low = 0, high = 4, skip = {skip}, c = 1)"
    text = f"process = ddpm\nprediction_type = epsilon\nstrategy = {options}"
    t = torch.tensor([199, 399, 799])
    nodes = turned("ddpm", t)
    w = torch.linspace(0, 4, len(nodes.place), dtype=F64)
    given = {"lcm.w": w, "lcm.j": ((t + 1) // skip - 1)[nodes.place]}

    def teacher(x, t, cond=None):
        return estimates(x, cond, PATHS["ddpm"].levels(column(t)))[1]

    exact = on_indices(lambda cond, w: VOID + (1 + w) * (cond - VOID))
    spec = spec_of(text, backbone="custom(inputs = [lcm.w])")
    return pull(spec, exact, nodes, given, away, teacher)


def test_a_distilled_jump_is_exact_in_the_limit_of_short_skips():
    """One skip is a step of DDIM along the guided teacher."""
    exact, other = ([skipping(skip, away) for skip in (10, 5)] for away in (0.0, 0.1))
    near(order(*other), [1] * 3, 0.1)
    near(order(*exact), [2] * 3, 0.1)
