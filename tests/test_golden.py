"""Numbers of independent implementations, in float64, through `objective.evaluate`."""

import math

import pytest
import torch
from conftest import declare, near, on_index, spec_of, student, wide

import difftrain
from difftrain.language.check import check
from difftrain.language.tree import Source

DDPM = "process = ddpm(beta = {beta}, steps = 1000{more})\nprediction_type = {prediction}"
NAMES = {
    "a": "alpha",
    "s": "sigma",
    "x_t": "xt",
    "target": "target",
    "pred": "pred",
    "loss_b": "loss",
}


def index(*values):
    return torch.tensor(values)


def agree(objective, entry, given, names=NAMES):
    """Every number of the entry that the language has a name for."""
    wanted = {ours: entry[theirs] for theirs, ours in names.items() if theirs in entry}
    assert "loss" in wanted
    values = objective.evaluate((*wanted, "pred", "target"), given)
    for name, expected in wanted.items():
        near(values[name], expected)
    near(values["loss"].mean(), entry["loss"])
    if "weight" in entry and "sq_sum" not in entry:  # else it is that of a sum
        error = (values["pred"] - values["target"]).square().mean((1, 2, 3))
        near(values["loss"] / error, entry["weight"])


@pytest.mark.parametrize("beta", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddpm(golden, x0, eps, beta, prediction):
    entry = golden.get(f"ddpm.{beta}.{prediction}")
    body = DDPM.format(beta=beta, more="", prediction=prediction)
    objective = declare(body, on_index(student))
    given = {"x0": x0, "eps": eps, "t": index(200, 700)}
    if entry is not None:
        agree(objective, entry, given)
    else:  # not among the references: the same loss by hand
        values = objective.evaluate(("loss", "pred", "target"), given)
        by_hand = (values["pred"] - values["target"]).square().mean((1, 2, 3))
        near(values["loss"], by_hand.tolist())


@pytest.mark.parametrize("beta", ["linear", "scaled_linear", "cosine", "scaled_linear_ztsnr"])
def test_levels(golden, beta):
    zero = beta.endswith("_ztsnr")
    more = ", terminal_snr = zero" if zero else ""
    body = DDPM.format(beta=beta.removesuffix("_ztsnr"), more=more, prediction="v_prediction")
    levels = declare(body).alphas_cumprod
    rows = torch.tensor(golden["schedules.index"]["values"]).long()
    near(levels[rows], golden[f"schedules.alphas_cumprod.{beta}"]["values"])


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_min_snr(golden, x0, eps, prediction):
    body = DDPM.format(beta="scaled_linear", more="", prediction=prediction)
    objective = declare(body + "\nstrategy = min_snr(5)", on_index(student))
    entry = golden[f"min_snr_gamma5.{prediction}"]
    agree(objective, entry, {"x0": x0, "eps": eps, "t": index(50, 700)}, NAMES | {"snr": "snr"})


def test_p2(golden, x0, eps):
    body = DDPM.format(beta="scaled_linear", more="", prediction="epsilon")
    objective = declare(body + "\nstrategy = p2(k = 1, g = 1)", on_index(student))
    agree(objective, golden["p2_k1_gamma1.epsilon"], {"x0": x0, "eps": eps, "t": index(50, 700)})


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_one_weight_carried_to_each_prediction(golden, x0, eps, prediction):
    body = DDPM.format(beta="scaled_linear", more="", prediction=prediction)
    objective = declare(body + "\nfit' = mse(eps_hat, eps)", on_index(student))
    entry = golden[f"omega_eps_1.{prediction}"]
    agree(objective, entry, {"x0": x0, "eps": eps, "t": index(50, 700)})


def test_dream(golden, x0, eps):
    body = DDPM.format(beta="scaled_linear", more="", prediction="epsilon")
    objective = declare(body + "\nstrategy = dream(p = 1)", on_index(student))
    names = {"x_t": "xt@0", "x_t_new": "xt", "target_new": "target", "eps_hat": "eps_hat@0"}
    entry = golden["dream_p1.epsilon.scaled_linear"]
    given = {"x0": x0, "eps": eps, "t": index(200, 700)}
    agree(objective, entry, given, names | {"pred": "pred", "loss_b": "loss"})


def test_offset_noise(golden, x0, eps):
    body = DDPM.format(beta="scaled_linear", more="", prediction="epsilon")
    objective = declare(body + "\nstrategy = offset_noise(0.1)", on_index(student))
    level = torch.tensor([100.0, 101.0], dtype=torch.float64).cos().reshape(2, 1, 1, 1)
    given = {"x0": x0, "eps": eps, "t": index(200, 700), "offset_noise.level": level}
    agree(objective, golden["offset_noise_0.1.epsilon.scaled_linear"], given)


FLOW = torch.tensor([0.3, 0.7], dtype=torch.float64)


def test_flow(golden, x0, eps):
    objective = declare("process = linear\nprediction_type = flow")
    agree(objective, golden["flow.linear.velocity"], {"x0": x0, "eps": eps, "t": FLOW})


def test_flow_with_noise_prediction(golden, x0, eps):
    objective = declare("process = linear\nprediction_type = epsilon")
    agree(objective, golden["flow.linear.epsilon"], {"x0": x0, "eps": eps, "t": FLOW})


def test_flow_weighted_by_clean_data(golden, x0, eps):
    objective = declare("process = linear\nprediction_type = flow\nfit' = mse(x0_hat, x0)")
    entry = golden["flow.linear.velocity.x0_space(sd3_precondition)"]
    agree(objective, entry, {"x0": x0, "eps": eps, "t": FLOW})


def test_conversions(golden, x0, eps):
    objective = declare("process = linear\nprediction_type = flow")
    values = objective.evaluate(
        ("x0_hat", "eps_hat", "score_hat"), {"x0": x0, "eps": eps, "t": FLOW}
    )
    entry = golden["flow.linear.conversions"]
    for ours, theirs in (("x0_hat", "x0"), ("eps_hat", "eps"), ("score_hat", "score")):
        near(values[ours], entry[theirs])


@pytest.mark.parametrize(
    ("loss", "key", "factor"),
    [
        ("huber(pred, target, 0.1)", "torch_huber_delta", 1),
        ("huber(pred, target, 0.1) / 0.1", "torch_smooth_l1_beta", 1),
        ("pseudo_huber(pred, target, 0.1)", "pseudo_huber_elementwise", 1),
        ("0.2 * pseudo_huber(pred, target, 0.1)", "diffusers_huber", 1),
        ("2 * pseudo_huber(pred, target, 0.1)", "diffusers_smooth_l1", 1),
        ("pseudo_huber_norm(pred, target, 0.1)", "pseudo_huber_vector", 1),
    ],
)
def test_robust_losses(golden, x0, eps, loss, key, factor):
    body = DDPM.format(beta="scaled_linear", more="", prediction="epsilon")
    objective = declare(f"{body}\nfit' = {loss}", on_index(student))
    values = objective.evaluate(("loss",), {"x0": x0, "eps": eps, "t": index(200, 700)})
    near(values["loss"], golden["robust_losses.epsilon.scaled_linear"][key])


# ---- the library's other processes, and derivatives along the path


def test_variance_preserving(golden, x0, eps):
    objective = declare("process = vp\nprediction_type = epsilon")
    agree(objective, golden["vp_sde.epsilon"], {"x0": x0, "eps": eps, "t": FLOW})


def test_preconditioning(golden, x0, eps):
    body = "process = edm\nprediction_type = sample\nstrategy = edm_precondition(0.5)"
    names = {"sigma": "sigma", "x_t": "xt", "denoised": "pred", "target": "target"}
    names |= {n: n for n in ("c_skip", "c_out", "c_in", "c_noise")}
    names |= {"velocity": "flow_hat", "score": "score_hat", "loss_b": "loss"}
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64)
    agree(declare(body), golden["edm"], {"x0": x0, "eps": eps, "t": sigma}, names)


ANGLE = torch.tensor([0.4, 1.2], dtype=torch.float64)
TRIG = "process = trig(data = 0.5)\nprediction_type = flow\nstrategy = [{}]"
ANGLES = {"x_t": "xt", "target": "target", "pred": "pred", "x0_hat": "x0_hat", "loss_b": "loss"}


def test_angles(golden, x0, eps):
    entry = golden["trigflow"]
    agree(declare(TRIG.format("trig_flow")), entry, {"x0": x0, "eps": eps, "t": ANGLE}, ANGLES)


def jumping(strategy: str, process="trig", prediction="flow", network=student, **modules):
    """The objective of a strategy that jumps."""
    body = f"process = {process}\nprediction_type = {prediction}\nstrategy = {strategy}"
    return difftrain.objective(spec_of(body), network, modules=modules)


def one(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


TANGENT = {"x_t": "xt", "dxdt": "flow", "F": "output", "loss_b": "loss"}


def tangent(entry, label: str) -> tuple[dict, dict]:
    """The entry and the names of a consistency tangent with the norm of the library."""
    entry = entry | {"loss": entry["loss_l2"], "loss_b": entry["loss_b_l2"]}
    return entry, TANGENT | {"g": f"{label}.g"}


def test_consistency_training(golden, x0, eps):
    """arXiv:2410.11081 algorithm 1 with r = 1, the learned weight at 0."""
    entry, names = tangent(golden["sct.r1.0"], "sct")
    given = {"x0": x0, "eps": eps, "t": ANGLE, "sct.ramp": one(1.0)}
    agree(jumping("sct"), entry, given, names)


def test_the_other_reading_of_a_tangent_s_norm(golden, x0, eps):
    entry = golden["sct.r1.0"]
    objective = jumping("sct")
    given = {"x0": x0, "eps": eps, "t": ANGLE, "sct.ramp": one(1.0)}
    g = objective.evaluate(("sct.g",), given)["sct.g"]
    rms = g.square().mean((1, 2, 3), keepdim=True).sqrt()
    near(g / (rms + 0.1), entry["g_norm_rms"])
    given["sct.tangent"] = g / (rms + 0.1)
    near(objective.evaluate(("loss",), given)["loss"], entry["loss_b_rms"])


def test_consistency_distillation(golden, x0, eps):
    def teacher(x, t, cond=None):
        return 0.25 * x + 0.20 * wide(t)

    entry, names = tangent(golden["scd.r1.0"], "scd")
    given = {"x0": x0, "eps": eps, "t": ANGLE, "scd.ramp": one(1.0)}
    agree(jumping("scd(1)", teacher=teacher), entry, given, names)


def test_discrete_consistency(golden, x0, eps):
    objective = jumping("ct(total = 1000)", "edm", "sample")
    given = {"x0": x0, "eps": eps, "ct.i": index(3, 7), "ct.points": one(11.0)}
    agree(objective, golden["ct_l2_uniform"], given, {"loss_b": "loss"})


def test_representation_alignment(golden, x0, eps):
    k = torch.arange(12, dtype=torch.float64).reshape(2, 3, 2)
    entry = golden["repa"]
    objective = jumping(
        "repa(0.5)", "linear", "flow",
        network=lambda x, t, cond=None: (student(x, t), (1 + k).sin()),
        project=lambda tokens: tokens, vision=lambda image: (2 * k).cos(),
    )  # fmt: skip
    given = {"x0": x0, "eps": eps, "t": FLOW, "image": x0}
    values = objective.evaluate(("repa.align", "loss"), given)
    near(values["repa.align"], entry["proj_loss_b"])
    near(values["loss"].mean(), entry["total_lambda0p5"])


def test_shifted_times(golden, x0):
    entry = golden["time_shift"]
    t = torch.tensor(entry["t"], dtype=torch.float64)
    for k, key in ((3, "shift3"), (math.e, "mu1")):
        objective = declare(f"process = linear\nprediction_type = flow\nt' = shift(t, {k})")
        near(objective.evaluate(("t",), {"x0": x0, "t": t})["t"], entry[key])
    back = declare("process = linear\nprediction_type = flow\nt' = shift(t, 1 / 3)")
    shifted = torch.tensor(entry["shift3"], dtype=torch.float64)
    near(back.evaluate(("t",), {"x0": x0, "t": shifted})["t"], entry["inverse"])


@pytest.mark.parametrize(
    ("law", "weight", "key"),
    [
        ("logit_normal(0, 1)", "density(t, t)", "logit_normal_0_1"),
        ("shift(logit_normal(0, 1), 3)", "density(t, t)", "logit_normal_shift3"),
        ("uniform(0, 1)", "mode_map(t, 1.29)", "sd3_mode_map_s1p29"),
        ("uniform(0, 1)", "2 / (pi * (1 - 2 * t + 2 * t^2))", "sd3_cosmap_weight"),
    ],
)
def test_densities_of_times(golden, x0, eps, law, weight, key):
    body = f"process = linear\nprediction_type = flow\nt ~ {law}\nfit' = {weight} * fit"
    values = declare(body).evaluate(("fit", "fit@0"), {"x0": x0, "eps": eps, "t": FLOW})
    near(values["fit"] / values["fit@0"], golden["time_density"][key])


def test_average_velocity(golden, x0, eps):
    """arXiv:2505.13447 algorithm 1: the loss, and its gradient at the prediction."""
    entry = golden["meanflow.plain"]
    body = "process = linear\nprediction_type = flow\nstrategy = mean_flow(c = 0.001)"
    text = f"diff 1\nobjective o {{\n{body}\nbackbone = custom(times = [t, r])\n}}\n"
    spec, _ = check(Source("test.diff", text))
    given = {"x0": x0, "eps": eps, "t": FLOW}
    given["r"] = torch.tensor([0.1, 0.7], dtype=torch.float64)
    names = {"x_t": "xt", "v": "flow", "u": "pred", "target": "target", "loss_b": "loss"}
    shift = torch.zeros_like(x0, requires_grad=True)
    objective = difftrain.objective(
        spec, lambda x, t, cond=None, r=None: student(x, t, r=r) + shift
    )
    agree(objective, entry, given, names)
    (slope,) = torch.autograd.grad(objective.evaluate(("loss",), given)["loss"].sum(), shift)
    near(slope[0], entry["grad_u_sample0"])
