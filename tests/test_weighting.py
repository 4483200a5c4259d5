"""Weights in every space, and w(lambda) against the closed forms of arXiv:2303.00848."""

import math
from statistics import NormalDist

import pytest

from difftrain.language.check import check
from difftrain.language.density import NEEDED, compare, curve
from difftrain.language.numbers import points, values
from difftrain.language.tree import Source
from difftrain.language.weighting import forwards, in_spaces, weighting

GVP = "process path { t ~ uniform(0, 1), alpha = cos(pi * t / 2), sigma = sin(pi * t / 2) }\n"
LINEAR_FLOW = "process = linear\nprediction_type = flow\n"
VE = "process noised { t ~ log_normal(-1.2, 1.2), alpha = 1, sigma = t }\n"


def derivation_of(body: str, before: str = GVP):
    """The derivation of one objective with this body."""
    text = f"diff 1\n{before}objective o {{\n{body}\nbackbone = custom\n}}\n"
    spec, found = check(Source("x.diff", text))
    assert not [f for f in found if f.severity == "error"], found
    return spec.objective().derivation()


def curve_of(body: str, before: str = GVP):
    derivation = derivation_of(body, before)
    terms = {n: derivation.read(n) for n in NEEDED if n != "weight"}
    return curve(terms | {"weight": weighting(derivation).weight})


def spread(line, expected) -> float:
    """How far w(lambda) is from a multiple of a closed form, relatively."""
    ratios = [row.w / expected(row.logsnr) for row in line.rows]
    return max(ratios) / min(ratios) - 1


def sech(x: float) -> float:
    return 1 / math.cosh(x)


def normal(mean: float, std: float):
    return NormalDist(mean, std).pdf


LEVELS = [
    ("process = path\nprediction_type = epsilon", lambda x: sech(x / 2)),
    ("process = path\nprediction_type = v_prediction", lambda x: math.exp(-x / 2)),
    ("process = path\nprediction_type = flow", lambda x: math.exp(-x / 2)),
    ("process = path\nprediction_type = sample", lambda x: math.exp(-x) * sech(x / 2)),
    (LINEAR_FLOW, lambda x: math.exp(-x / 2)),
    ("process = linear\nprediction_type = epsilon", lambda x: sech(x / 4) ** 2),
    ("process = linear\nprediction_type = sample", lambda x: math.exp(-x) * sech(x / 4) ** 2),
    (
        LINEAR_FLOW + "t ~ logit_normal(0.3, 1.2)",
        lambda x: normal(-0.6, 2.4)(x) * (1 + math.exp(-x / 2)) ** 2,
    ),
    (
        LINEAR_FLOW + "t ~ logit_normal(0.3, 1.2)\nt' = shift(t, 3)",
        lambda x: normal(-0.6 - 2 * math.log(3), 2.4)(x) * (1 + math.exp(-x / 2)) ** 2,
    ),
    (
        "process = path\nprediction_type = epsilon\nstrategy = min_snr(5)",
        lambda x: sech(x / 2) * min(1, 5 * math.exp(-x)),
    ),
    (
        "process = path\nprediction_type = epsilon\nstrategy = p2(k = 1, g = 1)",
        lambda x: sech(x / 2) / (1 + math.exp(x)),
    ),
]


@pytest.mark.parametrize(
    ("body", "expected"), LEVELS, ids=[b.replace("\n", "; ") for b, _ in LEVELS]
)
def test_levels(body, expected):
    line = curve_of(body)
    assert line.kind == "exact"
    assert spread(line, expected) < 1e-9


def test_preconditioned_noise():
    """Karras: a weight of snr + 1 / data^2 on clean data, log-normal noise."""
    body = (
        "process = noised\nprediction_type = sample\nfit' = (snr + 1 / 0.5^2) * mse(pred, target)"
    )
    line = curve_of(body, VE)
    assert spread(line, lambda x: normal(2.4, 2.4)(x) * (math.exp(-x) + 0.25)) < 1e-9


@pytest.mark.parametrize("body", [LINEAR_FLOW, "process = path\nprediction_type = epsilon"])
def test_density_has_mass_one(body):
    line = curve_of(body)
    levels = sorted((row.logsnr, row.density) for row in line.rows)
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(levels, levels[1:], strict=False))
    assert 0.95 < area < 1.01


def test_exact_density():
    line = curve_of("process = path\nprediction_type = epsilon")
    for row in line.rows:
        assert math.isclose(row.density, sech(row.logsnr / 2) / (2 * math.pi), rel_tol=1e-12)


def test_index():
    line = curve_of("process = ddpm\nprediction_type = epsilon")
    first, second, *_ = line.rows
    assert line.kind == "steps" and len(line.rows) == 1000
    assert math.isclose(second.density, 0.001 / (first.logsnr - second.logsnr))
    assert all(math.isclose(r.w, 2 * r.density) for r in line.rows)


def test_pure_noise_has_no_weight():
    line = curve_of("process = ddpm(terminal_snr = zero)\nprediction_type = v_prediction")
    last = line.rows[-1]
    assert (last.alpha, last.snr, last.density) == (0, 0, 0) and math.isnan(last.w)
    assert line.range[0] == -math.inf


def test_counted_where_no_map_is_monotone():
    line = curve_of("process = path\nprediction_type = epsilon\nt ~ earlier(uniform(0, 1), 0.5)")
    assert line.kind == "sampled"
    inner = [r for r in line.rows if 0.2 < r.t < 0.8]
    for row in inner:  # half of the times are the smaller of two
        slope = math.pi * sech(row.logsnr / 2) / (2 * math.pi**2)
        assert math.isclose(row.density, slope * (0.5 + (1 - row.t)), rel_tol=0.15)


# ---- one weight in every space


@pytest.mark.parametrize(
    ("strategy", "in_eps"),
    [
        ("", lambda snr: 1),
        ("strategy = min_snr(5)", lambda snr: min(snr, 5) / snr),
        ("strategy = p2(k = 1, g = 0.5)", lambda snr: (1 + snr) ** -0.5),
        ("fit' = mse(x0_hat, x0)", lambda snr: 1 / snr),
        ("fit' = 2 * snr * mse(x0_hat, x0) + mse(eps_hat, eps)", lambda snr: 3),
    ],
)
@pytest.mark.parametrize("row", ["epsilon", "sample", "v_prediction", "flow"])
def test_one_weight_in_every_space(strategy, in_eps, row):
    if not strategy:
        strategy = "fit' = mse(eps_hat, eps)"
    derivation = derivation_of(f"process = path\nprediction_type = {row}\n{strategy}")
    found = weighting(derivation)
    assert found.rest == () and found.reduction == "mean"
    snr, det, alpha = (derivation.read(n) for n in ("snr", "det", "alpha"))
    spaces = in_spaces(found.weight, derivation)
    wanted = [snr, det, alpha, *spaces.values()]
    for r, d, a, pred, clean, noise, v in values(wanted, points(snr)[1:-1]):
        assert math.isclose(noise, in_eps(r), rel_tol=1e-9)
        assert math.isclose(clean, in_eps(r) * r, rel_tol=1e-9)
        assert math.isclose(v, in_eps(r) * r / (r + 1), rel_tol=1e-9)
        assert math.isclose(pred, in_eps(r) * (a / d) ** 2, rel_tol=1e-9)


def test_what_is_no_weighted_square_is_told():
    body = LINEAR_FLOW + "extra = mean(cosine(pred, target))\nloss = 2 * fit - extra"
    found = weighting(derivation_of(body))
    assert str(found.weight) == "2" and len(found.rest) == 1
    assert weighting(derivation_of(LINEAR_FLOW + "fit' = huber(pred, target, 0.1)")).weight is None
    mixed = weighting(derivation_of(LINEAR_FLOW + "loss = fit + sse(pred, target)"))
    assert mixed.weight is None and mixed.reduction == "mean, sum"
    assert weighting(derivation_of(LINEAR_FLOW + "fit' = adaptive(fit)")).weight is None


@pytest.mark.parametrize(
    ("body", "counts"),
    [
        ("", (1, 0, 0)),
        ("strategy = dream", (1, 1, 0)),
        ("strategy = [dream, min_snr]", (1, 1, 0)),
        ("target' = stop(target - t * ddt(pred))", (1, 0, 1)),
        ("target' = stop(pred(t = t / 2))", (1, 1, 0)),
        ("loss = fit + mse(stop(pred), target)", (1, 0, 0)),
    ],
)
def test_forwards(body, counts):
    assert forwards(derivation_of(LINEAR_FLOW + body).read("loss")) == counts


# ---- two curves


def test_one_objective_in_two_coordinates():
    first = curve_of(LINEAR_FLOW)
    second = curve_of("process = path\nprediction_type = v_prediction")
    like = compare(first, second)
    assert math.isclose(like.factor, 2 / math.pi) and like.spread < 1e-9
    assert compare(second, first).spread < 1e-9
    assert first.range == second.range == (-math.inf, math.inf)


def test_two_weights_differ():
    first, second = (
        curve_of(f"process = path\nprediction_type = {p}") for p in ("epsilon", "sample")
    )
    assert compare(first, second).spread > 1


def test_index_against_index():
    body = "process = ddpm\nprediction_type = {}\nstrategy = min_snr(5)"
    first, second = (curve_of(body.format(p)) for p in ("epsilon", "v_prediction"))
    like = compare(first, second)
    assert math.isclose(like.factor, 1) and like.spread < 1e-9
