"""What stands in the golden entries beside the quantities of an objective: rates, tangents, other
norms and spaces, each written as a line of `.diff`."""

import json
from pathlib import Path

import pytest
import torch
from conftest import declare, near, on_index, spec_of, student, wide
from test_golden import ANGLE, DDPM, FLOW, TRIG, index, one

import difftrain
from difftrain.sampling import solvers

SCALED = DDPM.format(beta="scaled_linear", more="", prediction="epsilon")


def probed(body: str, lines: dict[str, str], given: dict, network=student, **modules) -> dict:
    """The values of lines that are added to an objective."""
    text = body + "".join(f"\nprobe_{name} = {line}" for name, line in lines.items())
    objective = difftrain.objective(spec_of(text), network, modules=modules)
    values = objective.evaluate([f"probe_{name}" for name in lines], given)
    return {name: values[f"probe_{name}"] for name in lines}


def told(entry: dict, values: dict) -> None:
    for name, value in values.items():
        near(value, entry[name])


def test_rates_of_a_variance_preserving_process(golden, x0, eps):
    rate = "(2 * sigma * dot(sigma) - 2 * sigma^2 * dot(alpha) / alpha)"
    lines = {
        "beta": "-2 * dot(alpha) / alpha",
        "g2": rate,
        "likelihood_weight_eps": f"{rate} / sigma^2",
    }
    body = "process = vp\nprediction_type = epsilon"
    told(golden["vp_sde.epsilon"], probed(body, lines, {"x0": x0, "eps": eps, "t": FLOW}))


def test_the_network_s_own_target(golden, x0, eps):
    entry = golden["edm"]
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64)
    wanted = "(target - c_skip * xt) / c_out"
    lines = {
        "F_target": wanted,
        "loss_F_space": f"mse(output, {wanted})",
        "loss_sum_over_pixels": "sse(pred, target) / c_out^2",
    }
    body = "process = edm\nprediction_type = sample\nstrategy = edm_precondition(0.5)"
    found = probed(body, lines, {"x0": x0, "eps": eps, "t": sigma})
    near(found.pop("F_target"), entry["F_target"])
    told(entry, {name: value.mean() for name, value in found.items()})


def test_the_share_of_the_error_that_is_dreamed(golden, x0, eps):
    lines = {"lam": "sigma / sqrt(alpha^2 + sigma^2)"}
    given = {"x0": x0, "eps": eps, "t": index(200, 700)}
    found = probed(f"{SCALED}\nstrategy = dream", lines, given, on_index(student))
    told(golden["dream_p1.epsilon.scaled_linear"], found)


def test_residuals(golden, x0, eps):
    given = {"x0": x0, "eps": eps, "t": index(200, 700)}
    found = probed(SCALED, {"residual": "pred - target"}, given, on_index(student))
    told(golden["robust_losses.epsilon.scaled_linear"], found)


@pytest.mark.parametrize(
    ("place", "shape"), [(0, (4, 32, 32)), (1, (4, 64, 64)), (2, (3, 64, 64)), (3, (768, 16, 16))]
)
def test_a_shift_by_the_size_of_the_data(golden, place, shape):
    body = "process = linear\nprediction_type = flow\nk = sqrt(numel(x0) / 4096)\nt' = shift(t, k)"
    x0 = torch.zeros(1, *shape, dtype=torch.float64)
    values = declare(body).evaluate(("k", "t"), {"x0": x0, "t": one(0.3).reshape(1)})
    factor = golden["time_shift"]["factor_sqrt_numel_over_4096"][place]
    near(values["k"], [factor])
    near(values["t"], [factor * 0.3 / (1 + (factor - 1) * 0.3)])


def test_parts_of_an_average_velocity(golden, x0, eps):
    entry = golden["meanflow.plain"]
    body = "process = linear\nprediction_type = flow\nstrategy = mean_flow(c = 0.001)"
    spec = spec_of(f"{body}\ndudt = ddt(pred)", backbone="custom(times = [t, r])")
    given = {"x0": x0, "eps": eps, "t": FLOW}
    given["r"] = torch.tensor([0.1, 0.7], dtype=torch.float64)
    names = ("dudt", "mean_flow.raw", "loss")
    values = difftrain.objective(spec, student).evaluate(names, given)
    near(values["dudt"], entry["dudt"])
    near(values["mean_flow.raw"], entry["sq_sum"])
    near(values["loss"] / values["mean_flow.raw"], entry["weight"])


def test_a_loss_in_units_of_the_data(golden, x0, eps):
    body = TRIG.format("trig_flow") + "\nfit' = fit / process.data^2"
    loss = declare(body).evaluate(("loss",), {"x0": x0, "eps": eps, "t": ANGLE})["loss"]
    near(loss.mean(), golden["trigflow"]["loss_over_sd2"])


@pytest.mark.parametrize("name", ["sct", "scd"])
@pytest.mark.parametrize("size", ["l2", "rms"])
def test_parts_of_a_tangent(golden, x0, eps, name, size):
    """arXiv:2410.11081 algorithm 1: `jvp` is that of the network alone, by cos(t) sin(t)."""
    entry = golden[f"{name}.r1.0"]
    reduced = {"l2": "norm", "rms": "rms"}[size]
    tangent = f"{name}.g / ({reduced}({name}.g) + 0.1)"
    lines = {
        "jvp": "alpha * sigma / process.data * ddt(output)",
        f"g_norm_{size}": tangent,
        f"F_target_{size}": f"output + {tangent}",
        f"loss_b_{size}": f"mse(output, stop(output + {tangent}))",
    }
    if size == "l2":
        lines["g_l2"] = f"norm({name}.g)"
    given = {"x0": x0, "eps": eps, "t": ANGLE, f"{name}.ramp": one(1.0)}

    def teacher(x, t, cond=None):
        return 0.25 * x + 0.20 * wide(t)

    found = probed(TRIG.format(name), lines, given, teacher=teacher)
    told(entry, found)
    near(found[f"loss_b_{size}"].mean(), entry[f"loss_{size}"])


def test_an_alignment_is_the_mean_of_the_batch(golden):
    entry = golden["repa"]
    near(torch.tensor(entry["proj_loss_b"]).double().mean(), entry["proj_loss"])


def test_both_variances_of_a_posterior(golden):
    entry = golden["sampler.ddpm_posterior_linear_700"]
    levels = declare(DDPM.format(beta="linear", more="", prediction="epsilon")).alphas_cumprod
    beta = 1 - levels[700] / levels[699]
    near(beta, [entry["variance_large"]])
    near(beta * (1 - levels[699]) / (1 - levels[700]), [entry["variance_small"]])
    (alpha, sigma), (a, s) = ((levels[i].sqrt(), (1 - levels[i]).sqrt()) for i in (700, 699))
    k = torch.arange(8, dtype=torch.float64)
    x = alpha * k.sin() + sigma * k.cos()
    eps_hat = 0.3 * x + 0.07
    estimates = (x - sigma * eps_hat) / alpha, eps_hat
    near(solvers.ddim_move(estimates, (alpha, sigma), (a, s), 0 * x, 1.0), entry["mean"])


def test_every_number_is_compared():
    """Each name inside an entry is read by one of the tests of golden numbers."""
    here = Path(__file__).parent
    golden = json.loads((here / "golden.json").read_text())
    files = ("golden", "golden_rest", "sampler")
    tests = "".join((here / f"test_{name}.py").read_text() for name in files)
    tests = tests.replace("{size}", "l2") + tests.replace("{size}", "rms")
    missing = {k for entry in golden.values() for k in entry if k not in ("c",)}
    missing = {k for k in missing if f'"{k}"' not in tests}
    assert not missing
