"""Weights are carried to the space that is trained, and nothing is 0 / 0 at an end of a process."""

import math

import pytest
import torch
from objectives import LINEAR, Tiny, batch, declared, draws

from difftrain.compiler.interpret import interpret
from difftrain.compiler.program import compile_quantities
from difftrain.graph.build import build
from difftrain.graph.cancel import cancel

DDPM = "process = ddpm(beta = scaled_linear, steps = 1000)"
ZERO = "process = ddpm(beta = scaled_linear, steps = 1000, terminal_snr = zero)"
TIMES = {
    LINEAR: torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64),
    DDPM: torch.tensor([0, 300, 700, 999]),
    ZERO: torch.tensor([0, 300, 700, 999]),
}


def ratio(a: float, b: float) -> float:
    return a / b if b else math.inf


# (a, s) -> the weight of mean((pred - target)^2), with every common factor divided out by hand.
X0 = {
    "epsilon": lambda a, s: ratio(s * s, a * a),
    "sample": lambda a, s: 1,
    "v_prediction": lambda a, s: s * s / (a * a + s * s) ** 2,
    "flow": lambda a, s: s * s,
}
NOISE = {
    "epsilon": lambda a, s: 1,
    "sample": lambda a, s: ratio(a * a, s * s),
    "v_prediction": lambda a, s: a * a / (a * a + s * s) ** 2,
    "flow": lambda a, s: a * a,
}
MIN_SNR = {
    "epsilon": lambda a, s: min(1, ratio(5 * s * s, a * a)),
    "sample": lambda a, s: min(ratio(a * a, s * s), 5),
    "v_prediction": lambda a, s: min(a * a, 5 * s * s) / (a * a + s * s) ** 2,
    "flow": lambda a, s: min(a * a, 5 * s * s),
}
P2 = {
    "epsilon": lambda a, s: s * s / (a * a + s * s),
    "sample": lambda a, s: a * a / (a * a + s * s),
    "v_prediction": lambda a, s: a * a * s * s / (a * a + s * s) ** 3,
    "flow": lambda a, s: a * a * s * s / (a * a + s * s),
}
DEBIASED = {
    "epsilon": lambda a, s: ratio(s, a),
    "sample": lambda a, s: ratio(a, s),
    "v_prediction": lambda a, s: a * s / (a * a + s * s) ** 2,
    "flow": lambda a, s: a * s,
}
PLUS_ONE = {
    "epsilon": lambda a, s: ratio(a * a + s * s, a * a),
    "sample": lambda a, s: ratio(a * a + s * s, s * s),
    "v_prediction": lambda a, s: 1 / (a * a + s * s),
    "flow": lambda a, s: a * a + s * s,
}
TRUNCATED = {
    "epsilon": lambda a, s: max(1, ratio(s * s, a * a)),
    "sample": lambda a, s: max(ratio(a * a, s * s), 1),
    "v_prediction": lambda a, s: max(a * a, s * s) / (a * a + s * s) ** 2,
    "flow": lambda a, s: max(a * a, s * s),
}
LEAST = {
    "epsilon": lambda a, s: min(1, ratio(s * s, a * a)),
    "sample": lambda a, s: min(ratio(a * a, s * s), 1),
    "v_prediction": lambda a, s: min(a * a, s * s) / (a * a + s * s) ** 2,
    "flow": lambda a, s: min(a * a, s * s),
}
WEIGHTS = {
    "mse(x0_hat, x0)": X0,
    "mse(eps_hat, eps)": NOISE,
    "min(snr, 5) * mse(x0_hat, x0)": MIN_SNR,
    "min(5, snr) * mse(x0_hat, x0)": MIN_SNR,
    "mse(x0_hat, x0) * min(snr, 5)": MIN_SNR,
    "(1 + snr)^(-1) * mse(eps_hat, eps)": P2,
    "mse(eps_hat, eps) / (1 + snr)": P2,
    "snr^(-0.5) * mse(eps_hat, eps)": DEBIASED,
    "mse(eps_hat, eps) / sqrt(snr)": DEBIASED,
    "snr^0.5 * mse(x0_hat, x0)": DEBIASED,
    "(snr + 1) * mse(x0_hat, x0)": PLUS_ONE,
    "max(snr, 1) * mse(x0_hat, x0)": TRUNCATED,
    "(if snr < 1 then snr else 1) * mse(x0_hat, x0)": LEAST,
    "snr * mse(x0_hat, x0)": NOISE,
    "mse(eps_hat, eps) / snr": X0,
}
CASES = [
    (process, prediction, fit)
    for process in TIMES
    for prediction in X0
    for fit in WEIGHTS
    if prediction != "flow" or process == LINEAR
]


def values(body: str, t: torch.Tensor, wanted=("loss", "pred", "target", "alpha", "sigma"), **more):
    """Quantities of the emitted function at given times, in float64."""
    program = compile_quantities(declared(body), wanted, ("t",))
    given = batch(len(t)) | {"t": t} | more
    tables = program.tables("cpu", torch.float64)
    return program.compute(given, draws(len(t)), {"student": Tiny()}, tables)


@pytest.mark.parametrize(("process", "prediction", "fit"), CASES)
def test_the_weight_of_the_trained_residual(process, prediction, fit):
    found = values(f"{process}\nprediction_type = {prediction}\nfit' = {fit}", TIMES[process])
    plain = (found["pred"] - found["target"]).square().mean((1, 2, 3))
    levels = zip(*(found[n].expand(len(plain)).tolist() for n in ("alpha", "sigma")), strict=True)
    weights = [WEIGHTS[fit][prediction](a, s) for a, s in levels]
    expected = torch.tensor(weights, dtype=torch.float64) * plain
    torch.testing.assert_close(found["loss"], expected, rtol=1e-9, atol=1e-12)


def test_a_sum_of_weighted_terms_is_carried_term_by_term():
    body = (
        f"{LINEAR}\nprediction_type = sample\nfit' = mse(x0_hat, x0) + sigma^2 * mse(eps_hat, eps)"
    )
    found = values(body, TIMES[LINEAR])
    plain = (found["pred"] - found["target"]).square().mean((1, 2, 3))
    torch.testing.assert_close(found["loss"], plain * (1 + found["alpha"] ** 2))


# ---- estimates

FINITE = {
    (LINEAR, "sample"): ("x0_hat",),
    (LINEAR, "flow"): ("x0_hat", "eps_hat", "flow_hat"),
    (LINEAR, "epsilon"): ("eps_hat",),
    (DDPM, "epsilon"): ("x0_hat", "eps_hat"),
    (DDPM, "v_prediction"): ("x0_hat", "eps_hat"),
    (ZERO, "v_prediction"): ("x0_hat", "eps_hat"),
    (ZERO, "sample"): ("x0_hat", "eps_hat"),
}


@pytest.mark.parametrize(("process", "prediction"), FINITE)
def test_estimates_are_finite_where_they_have_a_value(process, prediction):
    wanted = FINITE[process, prediction]
    found = values(f"{process}\nprediction_type = {prediction}", TIMES[process], wanted)
    for name in wanted:
        assert found[name].isfinite().all(), name


@pytest.mark.parametrize("prediction", X0)
def test_estimates_give_back_xt(prediction):
    body = f"{LINEAR}\nprediction_type = {prediction}"
    names = ("xt", "x0_hat", "eps_hat", "alpha", "sigma")
    found = values(body, TIMES[LINEAR][1:3], names)
    a, s = (found[n].reshape(-1, 1, 1, 1) for n in ("alpha", "sigma"))
    torch.testing.assert_close(a * found["x0_hat"] + s * found["eps_hat"], found["xt"])


def test_an_estimate_of_what_is_predicted_is_the_prediction():
    found = values(f"{LINEAR}\nprediction_type = sample", TIMES[LINEAR], ("x0_hat", "pred"))
    assert found["x0_hat"] is found["pred"]


# ---- what is not the same residual is evaluated as written


def forms(body: str) -> tuple[str, str]:
    """The graph before and after cancelling, for one objective."""
    graph = build(declared(body), ("loss",))
    return str(graph), str(cancel(graph))


PRIMED = {
    "input": f"{DDPM}\nprediction_type = epsilon\nstrategy = [input_perturbation, min_snr]",
    "target": f"{DDPM}\nprediction_type = epsilon\ntarget' = 0.9 * target\nfit' = mse(x0_hat, x0)",
    "late": f"""{LINEAR}\nprediction_type = flow
      target' = if t > 0.9995 then x0 else target
      fit'    = mse(x0_hat, x0)""",
    "at a step": f"""{LINEAR}\nprediction_type = flow
      target' = if step == 7 then x0 else target
      fit'    = mse(x0_hat, x0)""",
}


@pytest.mark.parametrize("name", PRIMED)
def test_residuals_that_are_no_multiple_are_left(name):
    t = torch.tensor([0.2, 0.9999], dtype=torch.float64) if "linear" in PRIMED[name] else None
    t = torch.tensor([100, 900]) if t is None else t
    found = values(PRIMED[name], t, ("loss", "x0_hat", "snr"))
    x0 = batch(len(t))["x0"]
    by_hand = (found["x0_hat"] - x0).square().mean((1, 2, 3))
    weight = found["snr"].clamp(max=5) if name == "input" else 1
    torch.testing.assert_close(found["loss"], weight * by_hand, rtol=1e-12, atol=0)


def test_noise_that_is_redefined_is_still_one_residual():
    """Both xt and the target move with it, so the multiple stays: the weight is carried."""
    before, after = forms(f"{DDPM}\nprediction_type = v_prediction\nstrategy = [dream, min_snr]")
    assert " weight" in after and "x0_hat" not in after and "x0_hat" in before


def test_a_sum_that_is_always_one_number_is_that_number():
    """alpha^2 + sigma^2 on a circle; but what only looks constant is not touched."""
    circle = "process = arc(data = 1)\nprediction_type = v_prediction\nfit' = mse(eps_hat, eps)"
    assert "div" not in forms(circle)[1]
    stepping = f"{LINEAR}\nprediction_type = flow\nfit' = (1 + step / 10) * mse(x0_hat, x0)"
    graph = build(declared(stepping), ("loss",))
    for step in (0, 5, 1000):
        given = batch() | {"step": torch.tensor(step)}
        before, after = (
            interpret(g, given, draws(), {"student": Tiny()})["loss"]
            for g in (graph, cancel(graph))
        )
        torch.testing.assert_close(before, after)


def test_other_weights_of_other_losses_are_left_as_they_are():
    body = f"{LINEAR}\nprediction_type = flow\nfit' = snr * huber(x0_hat, x0, 0.1)"
    assert " snr" in forms(body)[1]


@pytest.mark.parametrize(
    "line",
    ["fit' = mse(pred / (norm(pred) + 1), target)", "target' = stop(target / (rms(target) + 1))"],
)
def test_numbers_that_depend_on_the_fields_they_scale_are_left(line):
    body = f"{LINEAR}\nprediction_type = flow\n{line}"
    graph = build(declared(body), ("loss",))
    before, after = (
        interpret(g, batch(), draws(), {"student": Tiny()})["loss"] for g in (graph, cancel(graph))
    )
    torch.testing.assert_close(before, after, rtol=1e-12, atol=0)


def test_given_quantities_do_not_stop_the_proof():
    body = f"{LINEAR}\nprediction_type = epsilon\nstrategy = min_snr"
    graph = cancel(build(declared(body), ("loss",), ("t", "eps", "x0")))
    assert "x0_hat" not in str(graph)
