"""The library against closed forms: the optimum of every process, prediction type and weight."""

from functools import cache

import pytest
import torch
from analytic import (
    GAUSSIAN,
    MIXTURE,
    PATHS,
    PREDICTIONS,
    WEIGHTS,
    WRAPPED,
    Level,
    Mixture,
    Nodes,
    legal,
)

import difftrain
from difftrain.compiler.objective import Objective
from difftrain.language.check import check
from difftrain.language.density import NEEDED, curve
from difftrain.language.tree import Source
from difftrain.language.weighting import weighting
from difftrain.sampling import grids, solvers

STRATEGIES = ("", *WEIGHTS, WRAPPED)
TRIPLES = [
    (process, prediction, strategy)
    for process in PATHS
    for prediction in PREDICTIONS
    for strategy in STRATEGIES
    if legal(process, prediction)
]


class Known:
    """A network whose answer is set by the test; it is given (x, tau)."""

    def __init__(self):
        self.answer = None

    def __call__(self, x, t, cond=None):
        return self.answer(x, t)


def body(process: str, prediction: str, strategy: str) -> str:
    lines = f"process = {PATHS[process].text}\nprediction_type = {prediction}"
    return f"{lines}\nstrategy = [{strategy}]"


def linted(text: str):
    """The spec of an objective with this body, and everything that is said about it."""
    return check(Source("a.diff", f"diff 1\nobjective o {{\n{text}\nbackbone = custom\n}}\n"))


def checked(text: str):
    """The spec of an objective with this body, and what is wrong with it."""
    spec, found = linted(text)
    return spec, [f for f in found if f.severity == "error"]


@cache
def made(process: str, prediction: str, strategy: str) -> tuple[Objective, Known]:
    spec, found = checked(body(process, prediction, strategy))
    assert not found, found
    network = Known()
    return difftrain.objective(spec, network), network


def close(found, expected, tolerance=1e-9):
    """Relative to the largest number; one that is told exactly may be rounded."""
    size = 1 + expected.abs().amax()
    torch.testing.assert_close(found / size, expected / size, rtol=0, atol=tolerance)


def column(values):
    return values[:, None, None]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("process", PATHS)
def test_what_has_no_meaning_is_an_error(process, prediction):
    assert legal(process, prediction) == (not checked(body(process, prediction, ""))[1])


@pytest.mark.parametrize("law", ["logit_normal(0, 1)", "mode(1.29)"])
@pytest.mark.parametrize("process", ["vp", "subvp", "ve"])
def test_a_law_that_leaves_the_process_is_told_the_edit(process, law):
    """Their data stand at t = 1e-5."""
    text = body(process, "epsilon", "")
    (finding,) = checked(f"{text}\nt ~ {law}")[1]
    edit = f"t ~ max({law}, 1e-05)"
    assert finding.code == "DIF206" and finding.help == f"write `{edit}`"
    assert linted(f"{text}\n{edit}")[1] == []


# ---- the optimum is told as it is


def optimal(data: Mixture, level: Level, nodes: Nodes, extra: float = 0.0):
    """The network that predicts E[target | xt] (+ extra) at the nodes, unwrapped."""
    alpha, sigma, a, b, c_in, c_out, c_skip = (
        column(v[nodes.place]) for v in (*level.levels, *level.row, *level.wrapping)
    )

    def answer(x, _):
        x = x / c_in
        x0_hat = data.clean(x, (alpha, sigma))
        target = a * x0_hat + b * (x - alpha * x0_hat) / sigma
        return (target - c_skip * x) / c_out + extra

    return answer


WANTED = ("xt", "x0_hat", "score_hat", "loss")


@pytest.mark.parametrize("triple", TRIPLES, ids="-".join)
def test_the_optimum_of_gaussian_data(triple):
    check_optimum(triple, GAUSSIAN, 2, 1e-9)


@pytest.mark.parametrize("triple", [t for t in TRIPLES if t[2] in ("", WRAPPED)], ids="-".join)
def test_the_optimum_of_a_mixture(triple):
    check_optimum(triple, MIXTURE, 56, 1e-5)


def check_optimum(triple, data: Mixture, count: int, tolerance: float):
    """x0_hat, the score and the loss of the best prediction, and what an error costs."""
    path = PATHS[triple[0]]
    objective, network = made(*triple)
    level, nodes = Level(*triple, path.t()), Nodes.of(data, len(path.times), count)
    given = {"x0": nodes.x0, "eps": nodes.eps, "t": level.t[nodes.place]}
    network.answer = optimal(data, level, nodes)
    values = objective.evaluate(WANTED, given)
    levels = tuple(column(v[nodes.place]) for v in level.levels)
    close(values["x0_hat"], data.clean(values["xt"], levels))
    close(values["score_hat"], data.score(values["xt"], levels))
    left = (level.det / level.levels[1]) ** 2 * data.remaining(level.levels, 200)
    smallest = nodes.mean(values["loss"])
    close(smallest, level.weight * left, tolerance)
    network.answer = optimal(data, level, nodes, 0.1)
    worse = nodes.mean(objective.evaluate(WANTED, given)["loss"])
    close(worse - smallest, level.weight * (0.1 * level.wrapping[1]) ** 2, tolerance)


# ---- training finds it


class Line:
    """out = slope * x + intercept, of its own at each time."""

    def __init__(self, place):
        self.place = place
        self.weights = torch.zeros(2, int(place.max()) + 1, dtype=torch.float64)

    def __call__(self, x, _):
        slope, intercept = (column(w[self.place]) for w in self.weights)
        return slope * x + intercept


def gradient(objective, line: Line, nodes: Nodes, given, weights) -> torch.Tensor:
    line.weights = weights.detach().requires_grad_()
    loss = nodes.mean(objective.evaluate(WANTED, given)["loss"]).sum()
    return torch.autograd.grad(loss, line.weights)[0]


def trained(objective, network: Known, nodes: Nodes, given) -> torch.Tensor:
    """Slope and intercept [2, T] where the gradient of the expected loss vanishes: it is affine in
    them, and times do not mix, so three gradients determine it."""
    network.answer = line = Line(nodes.place)
    zero = torch.zeros_like(line.weights)
    start = gradient(objective, line, nodes, given, zero)
    columns = []
    for entry in range(2):
        unit = zero.clone()
        unit[entry] = 1
        columns.append(gradient(objective, line, nodes, given, unit) - start)
    curvature = torch.stack(columns, -1).permute(1, 0, 2)  # [T, 2, 2]
    return -torch.linalg.solve(curvature, start.T).T


def regression(level: Level, data: Mixture, noisier: float = 1, told: float = 1):
    """Slope and intercept of E[target | xt] for Gaussian data; xt has `noisier` times the variance
    of its noise, of which the target is told `told`."""
    (alpha, sigma), (a, b), (mean,) = level.levels, level.row, data.means
    variance = (alpha * data.std) ** 2 + noisier * sigma**2
    slope = (a * alpha * data.std**2 + b * told * sigma) / variance
    return slope, a * mean - slope * alpha * mean


def unwrapped(level: Level, found) -> tuple:
    """Slope and intercept of pred in xt, from those of the network in its input."""
    c_in, c_out, c_skip = level.wrapping
    return c_skip + c_out * found[0] * c_in, c_out * found[1]


@pytest.mark.parametrize("triple", TRIPLES, ids="-".join)
def test_training_finds_the_optimum(triple):
    objective, network = made(*triple)
    path = PATHS[triple[0]]
    level, nodes = Level(*triple, path.t()), Nodes.of(GAUSSIAN, len(path.times), 2)
    given = {"x0": nodes.x0, "eps": nodes.eps, "t": level.t[nodes.place]}
    found = unwrapped(level, trained(objective, network, nodes, given))
    for number, expected in zip(found, regression(level, GAUSSIAN), strict=True):
        close(number, expected)


PAIRS = [(p, q) for p in PATHS for q in PREDICTIONS if legal(p, q)]


@pytest.mark.parametrize(
    ("strategy", "stream", "noisier", "told"),
    [
        ("offset_noise(0.5)", "offset_noise.level", 1.25, 1.25),
        ("input_perturbation(0.5)", "input_perturbation.extra", 1.25, 1),
    ],
)
@pytest.mark.parametrize("pair", [p for p in PAIRS if p[1] != "score"], ids="-".join)
def test_training_with_more_noise(pair, strategy, stream, noisier, told):
    """More noise in xt: the target sees all of it, or only the usual part."""
    objective, network = made(*pair, strategy)
    path = PATHS[pair[0]]
    level, once = Level(*pair, "", path.t()), Nodes.of(GAUSSIAN, len(path.times), 2)
    nodes = Nodes(*(torch.cat([v, v]) for v in vars(once).values()))
    sign = torch.ones_like(once.x0)
    given = {"x0": nodes.x0, "eps": nodes.eps, "t": level.t[nodes.place]}
    given[stream] = torch.cat([sign, -sign])
    found = trained(objective, network, nodes, given)
    for number, expected in zip(found, regression(level, GAUSSIAN, noisier, told), strict=True):
        close(number, expected)


@pytest.mark.parametrize("strategy", ["", "min_snr(5)"])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_rectified_noise(pair, strategy):
    """arXiv:2312.00210 at the optimum: eps moves by d = lam e, e the error of eps_hat, so the
    residual is ((slope sigma - b) lam - det / alpha) e, whose variance is known."""
    objective, network = made(*pair, f"dream(p = 1), {strategy}")
    path = PATHS[pair[0]]
    level, nodes = Level(*pair, strategy, path.t()), Nodes.of(GAUSSIAN, len(path.times), 2)
    given = {"x0": nodes.x0, "eps": nodes.eps, "t": level.t[nodes.place]}
    network.answer = optimal(GAUSSIAN, level, nodes)
    (alpha, sigma), (_, b), (slope, _) = level.levels, level.row, regression(level, GAUSSIAN)
    lam = sigma / (alpha**2 + sigma**2).sqrt()
    error = (alpha * GAUSSIAN.std) ** 2 / ((alpha * GAUSSIAN.std) ** 2 + sigma**2)
    expected = ((slope * sigma - b) * lam - level.det / alpha) ** 2 * error
    loss = objective.evaluate(("loss",), given)["loss"]
    close(nodes.mean(loss), level.weight * expected)


# ---- w(lambda)


@pytest.mark.parametrize("triple", TRIPLES, ids="-".join)
def test_levels_and_weights(triple):
    """w(lambda) = 2 w (det / alpha)^2 p(lambda), the density by differences of lambda(t)."""
    derivation = checked(body(*triple))[0].objective().derivation()
    terms = {n: derivation.read(n) for n in NEEDED if n != "weight"}
    line = curve(terms | {"weight": weighting(derivation).weight})
    path = PATHS[triple[0]]
    rows = line.rows[1:] if path.slopes is None else line.rows
    t = torch.tensor([row.t for row in rows], dtype=torch.float64 if path.slopes else torch.int64)
    level = Level(*triple, t)
    if path.slopes is None:
        density = 0.001 / (path.logsnr(t) - path.logsnr(t - 1)).abs()
    else:
        density = path.in_logsnr(t)
    ratio = level.det / level.levels[0]
    for name, expected in {
        "logsnr": path.logsnr(t),
        "weight": level.weight,
        "density": density,
        "w": 2 * level.weight * ratio**2 * density,
    }.items():
        found = torch.tensor([getattr(row, name) for row in rows], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


# ---- solvers, with the exact network


class Exact:
    """What solvers need, from the compiled objective and the best network for Gaussian data."""

    def __init__(self, process: str, prediction: str):
        self.objective, network = made(process, prediction, "")
        self.path, self.prediction, self.process = PATHS[process], prediction, process
        network.answer = self.answer

    def answer(self, x, t):
        level = Level(self.process, self.prediction, "", t)
        place = Nodes(x, x, x, torch.arange(len(x)))
        return optimal(GAUSSIAN, level, place)(x, t)

    def alpha(self, t):
        return self.objective.evaluate(("alpha",), {"t": t})["alpha"]

    def sigma(self, t):
        return self.objective.evaluate(("sigma",), {"t": t})["sigma"]

    def slopes(self, t):
        return self.path.slopes(t)

    def estimates(self, x, t):
        program = self.objective.program(("x0_hat", "eps_hat"), (), ("xt", "t"))
        given = {"xt": x, "t": t, "cond": None, "null": None, "step": torch.tensor(0)}
        tables = program.tables("cpu", torch.float64)
        return tuple(program.compute(given, None, self.objective.nets, tables).values())

    def flow(self, x, t):
        return self.objective.pred(x, t)


STEPS = {
    "ddpm": grids.trailing(200, 1000),
    "linear": grids.shifted(200, start=0.999),
    "gvp": grids.shifted(200, start=0.999),
    "vp": grids.shifted(200, start=1.0, end=1e-3),
    "subvp": grids.shifted(200, start=1.0, end=1e-3),
    "ve": grids.shifted(800, start=1.0, end=1e-3),  # sigma falls by a factor of 5000
    "edm": grids.power(200),
    "trig": grids.shifted(200, start=1.56, end=0.0),
}
CONTINUOUS = ("linear", "gvp", "vp", "subvp", "ve", "edm", "trig")
SOLVERS = {
    "ddim": ("ddpm", *CONTINUOUS),
    "dpm_solver_pp": CONTINUOUS,
    "euler": CONTINUOUS,
    "heun": CONTINUOUS,
}


def runs(*solved: str) -> list[tuple[str, str, str]]:
    """Every solver with the processes that it solves, and their predictions."""
    every = [(s, p, q) for s in solved for p in SOLVERS.get(s, CONTINUOUS) for q in PREDICTIONS]
    return [(s, p, q) for s, p, q in every if legal(p, q)]


def beginning(model: Exact, grid) -> tuple[float, float]:
    """Mean and deviation at the start of the grid."""
    alpha, sigma = model.path.levels(grid[:1])
    spread = ((alpha * GAUSSIAN.std) ** 2 + sigma**2).sqrt()
    return float(alpha * GAUSSIAN.means[0]), float(spread)


@pytest.mark.parametrize(("solver", "process", "prediction"), runs(*SOLVERS), ids=str)
def test_solvers_reproduce_the_moments(solver, process, prediction):
    """Two points one deviation from the mean stay there: the mean and the deviation of all."""
    model, grid = Exact(process, prediction), STEPS[process]
    mean, spread = beginning(model, grid)
    start = mean + spread * torch.tensor([-1.0, 1.0]).double()
    draws = solvers.Draws(0, torch.arange(2))
    low, high = getattr(solvers, solver)(model, start[:, None, None], grid, draws).flatten()
    assert float((low + high) / 2) == pytest.approx(GAUSSIAN.means[0], abs=0.01)
    assert float((high - low) / 2) == pytest.approx(GAUSSIAN.std, abs=0.02)


def alone(like, streams):
    """1 in the row that has the number of this step."""
    return (streams.index == streams.step).to(like.dtype).reshape(-1, 1, 1).expand_as(like)


@pytest.mark.parametrize(("solver", "process", "prediction"), runs("euler_maruyama"), ids=str)
def test_noisy_solvers_reproduce_the_moments(solver, process, prediction):
    """The result is affine in the start and in every draw: what one deviation of each alone adds
    to the mean, squared and summed, is the variance of all."""
    model, grid = Exact(process, prediction), STEPS[process]
    mean, spread = beginning(model, grid)
    start = torch.full((len(grid), 1, 1), mean, dtype=torch.float64)
    start[-1] += spread  # its number is that of no step
    draws = solvers.Draws(0, torch.arange(len(grid)), alone)
    ends = getattr(solvers, solver)(model, start, grid, draws).flatten()
    assert float(ends[0]) == pytest.approx(GAUSSIAN.means[0], abs=0.01)
    assert float((ends - ends[0]).norm()) == pytest.approx(GAUSSIAN.std, abs=0.02)
