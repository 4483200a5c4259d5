"""Prediction types and processes are coordinates: the same estimate has the same loss in all."""

import math

import pytest
import torch
from analytic import PATHS, PREDICTIONS, Level, legal
from objectives import batch

import difftrain
from difftrain.language.check import check
from difftrain.language.density import NEEDED, compare, curve
from difftrain.language.tree import Source
from difftrain.language.weighting import weighting

FITS = {  # stated on a residual, so the same whatever the network predicts
    "min_snr": "strategy = min_snr(5)",
    "p2": "strategy = p2(k = 1, g = 0.5)",
    "debiased": "strategy = debiased",
    "clean": "fit' = mse(x0_hat, x0)",
    "both": "fit' = sse(eps_hat, eps) + 0.3 * mse(x0_hat, x0)",
    "rectified": "strategy = [dream, soft_min_snr]",
    "dropped": "strategy = [drop_condition(0.5), truncated_snr]",
    "offset": "strategy = [offset_noise, min_snr]",
}
ESTIMATES = ("xt", "x0_hat", "eps_hat", "loss")


def declared(body: str):
    text = f"diff 1\nobjective o {{\n{body}\nbackbone = custom\n}}\n"
    spec, found = check(Source("a.diff", text))
    assert not [f for f in found if f.severity == "error"], found
    return spec.objective()


def column(values):
    return values.reshape(-1, 1, 1, 1)


def estimate(x, logsnr, cond):
    """A clean picture made of the noisy one: any function of (x, logsnr, condition)."""
    return torch.tanh(0.7 * x) + 0.1 * torch.sin(logsnr) + column(cond.mean((1, 2)))


def student(process: str, prediction: str, sizes=1.0):
    """The network of this type whose x0_hat is `estimate` of xt / sizes."""

    def network(x, t, cond=None):
        level = Level(process, prediction, "", t)
        alpha, sigma, a, b, logsnr = map(column, (*level.levels, *level.row, level.path.logsnr(t)))
        size = sizes(alpha, sigma) if callable(sizes) else sizes
        x0_hat = estimate(x / size, logsnr, cond)
        return a * x0_hat + b * (x - alpha * x0_hat) / sigma

    return network


def objective(process: str, prediction: str, lines: str, **options):
    text = f"process = {PATHS[process].text}\nprediction_type = {prediction}\n{lines}"
    spec = declared(text)
    return difftrain.compiler.objective.Objective(spec, student(process, prediction, **options))


def given(process: str) -> dict:
    """Data at three times; noise and masks are drawn from the same streams for every type."""
    data = {name: value for name, value in batch(3).items() if name != "step"}
    return data | {"t": PATHS[process].t()}


EVERYWHERE = ("min_snr", "p2", "both")  # the others on two paths
MEETING = [(p, f) for p in PATHS for f in FITS if f in EVERYWHERE or p in ("ddpm", "linear")]


@pytest.mark.parametrize(("process", "fit"), MEETING, ids=str)
def test_one_estimate_has_one_loss(process, fit):
    """For every prediction type: stated on a residual, a weight does not ask what is predicted."""
    types = [p for p in PREDICTIONS if legal(process, p) and (p != "score" or fit != "offset")]
    runs = [
        objective(process, p, FITS[fit]).evaluate(ESTIMATES, given(process), seed=3) for p in types
    ]
    for values in runs[1:]:
        for name in ESTIMATES:
            torch.testing.assert_close(values[name], runs[0][name], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("process", PATHS)
def test_plain_losses_differ_by_the_determinant(process):
    """`mse(pred, target)` of one estimate is det^2 / sigma^2 times the error of x0_hat."""
    for prediction in (p for p in PREDICTIONS if legal(process, p)):
        values = objective(process, prediction, "").evaluate(ESTIMATES, given(process))
        level = Level(process, prediction, "", PATHS[process].t())
        error = (values["x0_hat"] - given(process)["x0"]).square().mean((1, 2, 3))
        expected = (level.det / level.levels[1]) ** 2 * error
        torch.testing.assert_close(values["loss"], expected, rtol=1e-8, atol=1e-12)


# ---- one process in the coordinates of another

CONTINUOUS = [p for p in PATHS if p not in ("ddpm", "linear")]


def where(process: str, logsnr: torch.Tensor) -> torch.Tensor:
    """The times at which a process has these levels, by bisection."""
    path = PATHS[process]
    low = torch.full_like(logsnr, 1e-9)
    high = torch.full_like(logsnr, {"edm": 1e3, "trig": math.pi / 2 - 1e-9}.get(process, 1 - 1e-9))
    for _ in range(200):
        middle = (low + high) / 2
        noisier = path.logsnr(middle) < logsnr
        low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
    return middle


def size(alpha, sigma):
    return (alpha**2 + sigma**2).sqrt()


@pytest.mark.parametrize("process", CONTINUOUS)
def test_one_level_has_one_loss_in_every_process(process):
    """At one snr two processes differ by the size of xt alone: a network that is given xt of unit
    size has the same estimates and the same weighted loss in both."""
    levels = torch.tensor([1.5, 0.0, -2.0], dtype=torch.float64)
    found = []
    for name in ("linear", process):
        own = objective(name, "flow", "strategy = min_snr(2)", sizes=size)
        found.append(own.evaluate(ESTIMATES, given(name) | {"t": where(name, levels)}))
    for name in ("x0_hat", "eps_hat", "loss"):
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-6, atol=1e-7)


def curve_of(text: str):
    derivation = declared(text).derivation()
    terms = {n: derivation.read(n) for n in NEEDED if n != "weight"}
    return curve(terms | {"weight": weighting(derivation).weight})


SAME = {
    "flow on two paths": ("linear", "flow", "", "gvp", "flow", "", math.pi / 2),
    "flow and v": ("linear", "flow", "", "gvp", "v_prediction", "", 2 / math.pi),
    "snr on noise is nothing on data": (
        *("gvp", "epsilon", "fit' = mse(eps_hat, eps) / snr"),
        *("gvp", "sample", "", 1.0),
    ),
    "wrapped noise of two widths": (
        *("edm", "sample", "strategy = edm_precondition(0.5)"),
        *("edm", "epsilon", "fit' = (sigma^2 + 0.25) / 0.25 * mse(eps_hat, eps)", 1.0),
    ),
    "angles": (
        *("edm", "sample", "strategy = edm_precondition(0.5)\nt ~ log_normal(-1, 1.4)"),
        *("trig", "flow", "strategy = trig_flow", 0.25),
    ),
}


@pytest.mark.parametrize("case", SAME.values(), ids=SAME.keys())
def test_one_objective_in_two_spellings(case):
    """w(lambda) is the same up to the factor that is known."""
    *words, factor = case
    first, second = (
        curve_of(f"process = {PATHS[p].text}\nprediction_type = {q}\n{lines}")
        for p, q, lines in (words[:3], words[3:])
    )
    like = compare(first, second)
    assert like.spread < 1e-6 and math.isclose(like.factor, factor, rel_tol=1e-6)


@pytest.mark.parametrize("fit", ["min_snr", "p2", "debiased"])
def test_the_curve_of_a_weight_does_not_ask_what_is_predicted(fit):
    curves = [curve_of(f"process = gvp\nprediction_type = {p}\n{FITS[fit]}") for p in PREDICTIONS]
    for other in curves[1:]:
        like = compare(curves[0], other)
        assert like.spread < 1e-9 and math.isclose(like.factor, 1, rel_tol=1e-9)
