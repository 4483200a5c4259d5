"""Linear forms, products that cancel, and the weights that come out of them."""

import math
import random

import pytest
import torch
from conftest import wide

import difftrain
from difftrain.language.algebra import NotLinear, linear, simplify
from difftrain.language.check import check
from difftrain.language.numbers import constant, points, support, value
from difftrain.language.term import const, leaf, make
from difftrain.language.tree import Source

X, Y = (leaf("variable", "field", name=n) for n in ("x", "y"))
A, S, T = (leaf("variable", "sample", name=n) for n in ("alpha", "sigma", "t"))
ATOMS = frozenset((A, S))


# ---- linear forms


def test_coefficients_of_a_sum():
    found = linear(A * X + S * Y - X / S, frozenset((X, Y)))
    assert found == {X: A - 1 / S, Y: S}


def test_coefficients_go_through_a_choice():
    found = linear(make("where", make("lt", A, S), X, 2 * Y), frozenset((X, Y)))
    assert {k: str(v) for k, v in found.items()} == {
        X: "if (alpha < sigma) then 1 else 0",
        Y: "if (alpha < sigma) then 0 else 2",
    }


@pytest.mark.parametrize("term", [X * Y, X + 1, make("exp", X), 1 / X, make("stop", X)])
def test_what_is_not_linear(term):
    with pytest.raises(NotLinear):
        linear(term, frozenset((X, Y)))


# ---- terms


@pytest.mark.parametrize(
    ("term", "same"),
    [
        (X + 0, X),
        (0 + X, X),
        (X * 1, X),
        (X / 1, X),
        (X**1, X),
        (make("neg", make("neg", X)), X),
        (X * 0, const(0)),
        (const(2) + 3, const(5)),
        (make("stop", make("stop", X)), make("stop", X)),
        (make("where", make("lt", A, S), X, X), X),
    ],
)
def test_neutral_elements_are_dropped(term, same):
    assert term is same


def test_equal_terms_are_one():
    assert A * X + S * Y is A * X + S * Y
    assert const(1) is not const(True)


def test_what_has_no_value_stays():
    assert make("div", const(1), const(0)).op == "div"


# ---- products


SNR = A**2 / S**2


@pytest.mark.parametrize(
    ("term", "text"),
    [
        (SNR * (S / A) ** 2, "1"),
        (make("pow", SNR, const(-0.5)) * (A / S) ** 2, "alpha / sigma"),
        (make("min", SNR, const(5)) / SNR, "min(1, 5 * sigma^2 / alpha^2)"),
        (make("sqrt", A**2 * S**2), "alpha * sigma"),
        ((A * X + A * Y) / A, "x + y"),
        (A - A, "0"),
    ],
)
def test_what_cancels_is_cancelled(term, text):
    assert str(simplify(term, ATOMS)) == text


def grown(rng: random.Random, depth: int):
    """A random positive term in alpha, sigma, t."""
    if depth == 0:
        return rng.choice([A, S, T, const(rng.choice([0.5, 2, 3]))])
    left, right = grown(rng, depth - 1), grown(rng, depth - 1)
    match rng.choice(["add", "mul", "div", "pow", "sqrt", "min", "max", "where"]):
        case "pow":
            return make("pow", left, const(rng.choice([2, -1, -0.5, 0.5, 3])))
        case "sqrt":
            return make("sqrt", left)
        case "where":
            return make("where", make("lt", A, S), left, right)
        case op:
            return make(op, left, right)


@pytest.mark.parametrize("seed", range(200))
def test_simplifying_keeps_the_value(seed):
    rng = random.Random(seed)
    term = grown(rng, 4)
    simple = simplify(term, ATOMS)
    for _ in range(3):
        at = {leaf: rng.uniform(0.2, 1.8) for leaf in (A, S, T)}
        assert math.isclose(value(term, at), value(simple, at), rel_tol=1e-9)


def test_a_sum_that_is_always_one_number_is_that_number():
    def known(term):
        return 1.0 if str(term) in ("alpha^2 + sigma^2", "sigma^2 + alpha^2") else None

    assert str(simplify(S**2 / (A**2 + S**2), ATOMS, known)) == "sigma^2"


# ---- numbers


def law(text: str):
    body = f"process = linear\nprediction_type = flow\nt ~ {text}\nbackbone = custom"
    spec, _ = check(Source("test.diff", f"diff 1\nobjective o {{\n{body}\n}}\n"))
    return spec.objective().quantity("t")


@pytest.mark.parametrize(
    ("text", "low", "high", "whole"),
    [
        ("uniform(0.1, 0.9)", 0.1, 0.9, False),
        ("logit_normal(0, 1)", 0, 1, False),
        ("log_normal(0, 1)", 0, math.inf, False),
        ("max(uniform(0, 1), uniform(0, 0.5))", 0, 1, False),
        ("integer(1000)", 0, 999, True),
        ("integer(10) / 10", 0, 0.9, False),
        ("shift(uniform(0, 1), 3)", 0, 1, False),
    ],
)
def test_the_values_of_a_law(text, low, high, whole):
    found = support(law(text))
    assert (found.low, found.high, found.whole) == pytest.approx((low, high, whole))


def test_every_index_of_a_discrete_law_is_a_point():
    t = law("integer(1000)")
    assert [known[t] for known in points(t)] == list(range(1000))


def test_constants_are_told_from_what_moves():
    t = law("uniform(0, 1)")
    assert constant(make("cos", t) ** 2 + make("sin", t) ** 2, points(t)) == 1
    assert constant(t, points(t)) is None


# ---- weights, as one table: objectives by what they weight, predictions by what they return

CIRCLE = "process circle { t ~ uniform(0, 1), alpha = cos(pi * t / 2), sigma = sin(pi * t / 2) }"
WEIGHTS = {
    "mse(eps_hat, eps)": ("1", "a2 / s2", "a2", "a2"),
    "mse(x0_hat, x0)": ("s2 / a2", "1", "s2", "s2"),
    "max(snr, 1) * mse(x0_hat, x0)": (
        "max(1, s2 / a2)",
        "max(a2 / s2, 1)",
        "max(a2, s2)",
        "max(a2, s2)",
    ),
    "(snr + 1) * mse(x0_hat, x0)": ("1 + s2 / a2", "1 + a2 / s2", "1", "a2 + s2"),
    "min(snr, 5) * mse(x0_hat, x0)": (
        "min(1, 5 * s2 / a2)",
        "min(a2 / s2, 5)",
        "min(a2, 5 * s2)",
        "min(a2, 5 * s2)",
    ),
    "(1 + snr)^(-1) * mse(eps_hat, eps)": (
        "s2 / (a2 + s2)",
        "a2 / (a2 + s2)",
        "a2 * s2",
        "a2 * s2 / (a2 + s2)",
    ),
    "snr^(-0.5) * mse(eps_hat, eps)": ("s / a", "a / s", "a * s", "a * s"),
}
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow")


def weighted(prediction: str, fit: str):
    """(the objective, alpha and sigma of t)."""
    process = "linear" if prediction == "flow" else "circle"
    body = f"process = {process}\nprediction_type = {prediction}\nfit' = {fit}\nbackbone = custom"
    top = CIRCLE if process == "circle" else ""
    spec, _ = check(Source("test.diff", f"diff 1\n{top}\nobjective o {{\n{body}\n}}\n"))
    made = difftrain.objective(spec, lambda x, t, cond=None: 0.3 * x + 0.1 * wide(t))

    def path(t: float) -> tuple[float, float]:
        if process == "linear":
            return 1 - t, t
        return math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)

    return made, path


def weight_of(made, times, x0, eps):
    """The factor of mean((pred - target)^2) in the loss, for each time."""
    losses = []
    for t in times:
        at = torch.full((2,), t, dtype=torch.float64)
        got = made.evaluate(("loss", "pred", "target"), {"x0": x0, "eps": eps, "t": at})
        plain = (got["pred"] - got["target"]).square().mean((1, 2, 3))
        losses.append((got["loss"] / plain)[0].item())
    return losses


@pytest.mark.parametrize("column", range(4), ids=PREDICTIONS)
@pytest.mark.parametrize("fit", WEIGHTS)
def test_the_table_of_weights(fit, column, x0, eps):
    made, path = weighted(PREDICTIONS[column], fit)
    times = (0.1, 0.37, 0.5, 0.82)
    for t, got in zip(times, weight_of(made, times, x0, eps), strict=True):
        a, s = path(t)
        names = {"a": a, "s": s, "a2": a * a, "s2": s * s, "min": min, "max": max}
        assert got == pytest.approx(eval(WEIGHTS[fit][column], {}, names), rel=1e-9)


def limit(text: str, t: float) -> float:
    """The value of an entry of the table at an end, in arithmetic where 1 / 0 is infinite."""
    a, s = torch.tensor(1 - t), torch.tensor(t)
    names = {"a": a, "s": s, "a2": a * a, "s2": s * s, "min": min, "max": max}
    return float(eval(text, {}, names))


ENDS = [
    (fit, column, t)
    for fit, row in WEIGHTS.items()
    for column, text in enumerate(row)
    for t in (0.0, 1.0)
    if math.isfinite(limit(text, t))
]


@pytest.mark.parametrize(("fit", "column", "t"), ENDS)
def test_weights_have_their_values_at_the_ends(fit, column, t, x0, eps):
    made, _ = weighted(PREDICTIONS[column], fit)
    (got,) = weight_of(made, (t,), x0, eps)
    assert got == pytest.approx(limit(WEIGHTS[fit][column], t), abs=1e-9)
