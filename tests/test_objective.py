"""A declared objective as a torch module: quantities, draws, and the unified interface."""

import json

import pytest
import torch
from conftest import SHAPE, declare, spec_of, student
from objectives import LINEAR, ZERO, Tiny, batch
from torch import nn

import difftrain
from difftrain.compiler.objective import Objective

FLOW = f"{LINEAR}\nprediction_type = flow"
DDPM = "process = ddpm(beta = scaled_linear, steps = 1000)\nprediction_type = epsilon"
F64 = {"dtype": torch.float64}
T = torch.tensor([0.3, 0.7], **F64)


def wide(t):
    return t.reshape(-1, 1, 1, 1)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- evaluate


def test_quantities_by_name(x0, eps):
    given = {"x0": x0, "eps": eps, "t": T}
    values = declare(FLOW).evaluate(("xt", "target", "pred", "loss", "alpha"), given)
    close(values["alpha"], 1 - T)
    close(values["xt"], (1 - wide(T)) * x0 + wide(T) * eps)
    close(values["target"], eps - x0)
    close(values["loss"], (values["pred"] - values["target"]).square().mean((1, 2, 3)))


def test_values_before_every_redefinition(x0, eps):
    objective = declare(f"{FLOW}\nstrategy = [dream, offset_noise]")
    values = objective.evaluate(("eps@0", "eps", "xt@0", "xt"), {"x0": x0, "eps": eps, "t": T})
    close(values["eps@0"], eps)
    close(values["xt@0"], (1 - wide(T)) * x0 + wide(T) * eps)
    assert (values["eps"] - eps).abs().min() > 1e-6
    close(values["xt"], (1 - wide(T)) * x0 + wide(T) * values["eps"])


def test_a_given_time_passes_through_later_redefinitions(x0):
    objective = declare(f"{FLOW}\nt' = shift(t, 3)")
    values = objective.evaluate(("t", "sigma"), {"x0": x0, "t": T})
    close(values["t"], 3 * T / (1 + 2 * T))
    close(values["sigma"], values["t"])


def test_a_given_value_replaces_equations_that_do_not_read_their_own_name(x0):
    objective = declare(f"{FLOW}\nt' = 0.5 * uniform_one\nuniform_one ~ uniform(0, 1)")
    close(objective.evaluate(("t",), {"x0": x0, "t": T})["t"], T)


def test_any_quantity_may_be_given(x0, eps):
    given = {"x0": x0, "eps": eps, "alpha": T, "sigma": 2 * T, "t": T}
    values = declare(FLOW).evaluate(("xt", "snr"), given)
    close(values["xt"], wide(T) * x0 + 2 * wide(T) * eps)
    close(values["snr"], torch.full_like(T, 0.25))


def test_draws_inside_a_strategy_are_given_by_their_full_name(x0, eps):
    objective = declare(f"{DDPM}\nstrategy = offset_noise(0.5)")
    level = torch.ones(2, 1, 1, 1, **F64)
    given = {"x0": x0, "eps": eps, "t": torch.tensor([1, 2]), "offset_noise.level": level}
    close(objective.evaluate(("eps",), given)["eps"], eps + 0.5)


def test_local_names_and_arguments_can_be_read(x0):
    objective = declare(f"{DDPM}\nstrategy = [dream(p = 2), offset_noise]")
    names = ("dream.p", "process.steps", "offset_noise.level")
    values = objective.evaluate(names, {"x0": x0})
    assert values["dream.p"].tolist() == [2, 2]
    assert values["process.steps"].tolist() == [1000, 1000]
    assert values["offset_noise.level"].shape == (2, 1, 1, 1)


@pytest.mark.parametrize(
    ("name", "hint"), [("targt", "write `target`"), ("xt_hat", "write `x0_hat`"), ("q", "name a")]
)
def test_unknown_names_are_told(x0, name, hint):
    for wanted, given in (((name,), {}), (("loss",), {name: x0})):
        with pytest.raises(difftrain.SpecError) as caught:
            declare(FLOW).evaluate(wanted, {"x0": x0, **given})
        (finding,) = caught.value.findings
        assert finding.message == f"there is no `{name}` in objective `o`"
        assert finding.help.startswith(hint)


def test_something_with_a_batch_must_be_given():
    with pytest.raises(ValueError, match="give at least one tensor with a batch, such as `x0`"):
        declare(FLOW).evaluate(("loss",), {})


def test_the_step_is_read(x0):
    objective = declare(f"{FLOW}\nloss = step * fit")
    given = {"x0": x0, "eps": x0, "t": T}
    three = objective.evaluate(("loss", "fit"), given, step=3)
    close(three["loss"], 3 * three["fit"])


# ---- types


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_have_the_type_of_what_is_given(dtype):
    x0 = torch.randn(SHAPE, dtype=dtype)
    objective = declare(f"{DDPM}\nstrategy = [dream, min_snr]", lambda x, t, cond=None: x / 2)
    values = objective.evaluate(("xt", "loss", "alpha", "eps"), {"x0": x0})
    assert {v.dtype for v in values.values()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_levels_of_half_precision_data_stay_fine(dtype):
    """In bfloat16 sigma would be 0 for the first indices."""
    net = nn.Conv2d(1, 1, 1).to(dtype)
    seen = []
    objective = declare(DDPM, lambda x, t, cond=None: seen.append(x.dtype) or net(x.to(dtype)))
    given = {"x0": torch.randn(SHAPE).to(dtype), "t": torch.tensor([0, 1])}
    values = objective.evaluate(("alpha", "sigma", "snr", "loss"), given)
    assert {v.dtype for v in values.values()} == {torch.float32} and set(seen) == {dtype}
    assert (values["sigma"] > 0.02).all()


def test_a_network_in_half_precision_gets_its_inputs_so():
    class Net(nn.Conv2d):
        def forward(self, x, t, cond=None):
            self.seen = (x.dtype, t.dtype)
            return super().forward(x)

    net = Net(1, 1, 1).bfloat16()
    loss = declare(FLOW, net)(torch.randn(SHAPE, dtype=torch.bfloat16))
    assert net.seen == (torch.bfloat16, torch.float32) and loss.dtype == torch.float32


def test_autocast_reaches_the_network_alone():
    net = nn.Conv2d(1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        values = declare(FLOW, lambda x, t, cond=None: net(x)).evaluate(
            ("xt", "output", "loss"), {"x0": torch.randn(SHAPE)}
        )
    assert values["output"].dtype == torch.bfloat16
    assert values["xt"].dtype == values["loss"].dtype == torch.float32


# ---- draws


def test_a_sample_draws_the_same_in_any_batch():
    objective = declare(f"{FLOW}\nstrategy = [offset_noise, drop_condition(0.5)]")
    x0 = batch(6)["x0"]
    names = ("t", "eps", "loss", "dropped")
    whole = objective.evaluate(names, {"x0": x0}, step=3, seed=1, index=torch.arange(6))
    for rows in (torch.tensor([4]), torch.tensor([5, 0, 2])):
        part = objective.evaluate(names, {"x0": x0[rows]}, step=3, seed=1, index=rows)
        for name in names:
            close(part[name], whole[name][rows])


def test_draws_change_with_step_and_seed():
    objective, x0 = declare(FLOW), batch(4)["x0"]
    times = [
        objective.evaluate(("t",), {"x0": x0}, step=step, seed=seed)["t"]
        for step, seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert len({tuple(t.tolist()) for t in times}) == 3


# ---- conditions


def pooled(x, t, cond=None):
    return x if cond is None else x + wide(cond.mean((1, 2)))


CONDITION = torch.arange(12, **F64).reshape(2, 2, 3)


def test_a_condition_reaches_the_network(x0, eps):
    given = {"x0": x0, "eps": eps, "t": T}
    with_one = declare(FLOW, pooled).evaluate(("output", "xt"), given | {"cond": CONDITION})
    close(with_one["output"], with_one["xt"] + wide(CONDITION.mean((1, 2))))
    without = declare(FLOW, pooled).evaluate(("output", "xt"), given)
    close(without["output"], without["xt"])


@pytest.mark.parametrize("rows", [1, 2])
def test_dropped_rows_get_the_null_condition(x0, eps, rows):
    objective = declare(f"{FLOW}\nstrategy = drop_condition(0.5)", pooled)
    dropped = torch.tensor([True, False])
    null = -torch.ones(rows, 2, 3, **F64)
    given = {"x0": x0, "eps": eps, "t": T, "cond": CONDITION, "null": null}
    values = objective.evaluate(("output", "xt"), given | {"drop_condition.drop": dropped})
    means = torch.stack([torch.tensor(-1, **F64), CONDITION[1].mean()])
    close(values["output"], values["xt"] + wide(means))


def test_the_null_condition_of_one_row_stands_for_all(x0, eps):
    body = f"{FLOW}\nloss = mse(output(cond = null), xt)"
    for null in (torch.ones(1, 2, 3, **F64), torch.ones(2, 2, 3, **F64)):
        given = {"x0": x0, "eps": eps, "t": T, "cond": CONDITION, "null": null}
        close(declare(body, counting).evaluate(("loss",), given)["loss"], torch.ones(2, **F64))
        both = {"a": null, "b": [null]}
        listed = declare(body, lambda x, t, c: counting(x, t, c["b"][0]))
        close(listed.evaluate(("loss",), given | {"null": both})["loss"], torch.ones(2, **F64))


def counting(x, t, cond):
    assert len(cond) == len(x)
    return pooled(x, t, cond)


def test_a_condition_may_be_a_mapping(x0, eps):
    def net(x, t, cond=None):
        return x + wide(cond["text"].mean((1, 2))) + wide(cond["size"])

    objective = declare(f"{FLOW}\nstrategy = drop_condition(0.5)", net)
    cond = {"text": CONDITION, "size": torch.ones(2, **F64)}
    null = {"text": torch.zeros(1, 2, 3, **F64), "size": torch.zeros(1, **F64)}
    given = {"x0": x0, "eps": eps, "t": T, "cond": cond, "null": null}
    given["drop_condition.drop"] = torch.tensor([False, True])
    values = objective.evaluate(("output", "xt"), given)
    close(values["output"] - values["xt"], wide(torch.tensor([3.5, 0], **F64)).expand(SHAPE))


def test_dropping_without_a_null_condition_is_told(x0):
    objective = declare(f"{FLOW}\nstrategy = drop_condition(0.5)", pooled)
    with pytest.raises(ValueError, match="`null` must be given"):
        objective(x0, CONDITION)


def test_dropping_nothing_needs_no_condition(x0):
    assert declare(f"{FLOW}\nstrategy = drop_condition(0.5)", pooled)(x0).shape == (2,)


# ---- the unified interface

WRAPPED = f"""{LINEAR}
prediction_type = flow
t ~ logit_normal(0, 1)
c_in    = 1 / (1 + sigma)
c_out   = 2
c_skip  = sigma
c_noise = 1000 * t"""


def test_coefficients_are_per_sample():
    objective = declare(WRAPPED)
    close(objective.c_in(T), 1 / (1 + T))
    close(objective.c_out(T), torch.full_like(T, 2))
    close(objective.c_skip(T), T)
    close(objective.c_noise(T), 1000 * T)


def test_times_and_noise_are_drawn_for_a_shape():
    objective = declare(f"{FLOW}\nt' = shift(t, 3)")
    t, n = objective.sample_t((5,)), objective.sample_n((5, 1, 2, 2))
    assert t.shape == (5,) and n.shape == (5, 1, 2, 2)
    close(t, objective.sample_t((5, 1, 2, 2)))
    assert not torch.equal(t, objective.sample_t((5,), step=1))
    rows = torch.tensor([3, 1])
    close(objective.sample_t((2,), index=rows), t[rows])
    close(objective.sample_n((2, 1, 2, 2), index=rows), n[rows])


def test_the_members_fit_together(x0):
    """What is drawn, put into the members one by one, is the loss."""
    objective = declare(f"{FLOW}\nt' = shift(t, 3)\nstrategy = [offset_noise, dream]")
    key = {"step": 2, "seed": 5}
    t = objective.sample_t(x0.shape, **key).double()
    n = objective.sample_n(x0.shape, **key).double()
    x_t, target = (f(x0, n, t, **key) for f in (objective.sample_x_t, objective.target))
    by_hand = (student(x_t, t) - target).square().mean((1, 2, 3))
    close(objective.loss(x0, t=t, eps=n, **key), by_hand)


def test_pred_is_the_tangent_and_score_the_score(x0):
    objective = declare(f"{LINEAR}\nprediction_type = epsilon\nstrategy = drop_condition(0.5)")
    eps_hat = student(x0, T)
    clean = (x0 - wide(T) * eps_hat) / (1 - wide(T))
    close(objective.pred(x0, T), eps_hat - clean)
    close(objective.score(x0, T), -eps_hat / wide(T))


def test_pred_is_not_redefined_by_a_strategy(x0):
    plain = declare(FLOW)
    other = declare(f"{FLOW}\nt' = shift(t, 3)\nstrategy = [dream, input_perturbation]")
    close(plain.pred(x0, T), other.pred(x0, T))
    close(plain.score(x0, T), other.score(x0, T))


def test_a_level_of_a_fixed_index_is_read(x0, eps):
    text = "process = ddpm(steps = 8)\nprediction_type = epsilon\nloss = fit * alpha(t = 3)"
    objective = declare(text)
    given = {"x0": x0, "eps": eps, "t": torch.arange(len(x0))}
    values = objective.evaluate(("loss", "fit"), given)
    level = objective.alphas_cumprod[3].sqrt()
    torch.testing.assert_close(values["loss"], values["fit"] * level)


@pytest.mark.parametrize("told", ["0.4", "min(1, step / 10)"])
def test_a_network_is_told_one_number_for_each_sample(x0, told):
    seen = []

    def network(x, t, cond=None):
        seen.append(t)
        return 0.3 * x

    text = f"process = linear\nprediction_type = flow\nc_noise' = {told}"
    declare(text, network).loss(x0, step=4)
    (t,) = seen
    assert t.shape == (len(x0),) and t.is_floating_point()
    assert (t - 0.4).abs().max() < 1e-6


def test_the_tangent_of_a_discrete_process_is_told(x0):
    objective = declare(DDPM)
    close(objective.score(x0, torch.tensor([5, 9])).shape, x0.shape)
    with pytest.raises(difftrain.SpecError) as caught:
        objective.pred(x0, torch.tensor([5, 9]))
    (finding,) = caught.value.findings
    assert "has no value" in finding.message and "table" in finding.because


def test_calling_it_is_the_loss(x0, eps):
    objective = declare(f"{FLOW}\nstrategy = min_snr")
    loss, aux = objective.loss(x0, t=T, eps=eps, return_aux=True)
    close(objective(x0, t=T, eps=eps), loss)
    assert loss.shape == (2,) and aux["loss"] is loss
    assert {"xt", "pred", "fit", "x0_hat", "snr", "alpha", "eps", "t"} <= aux.keys()
    close(aux["xt"], objective.sample_x_t(x0, eps, T))


# ---- the scheduler contract


def test_the_scheduler_contract(x0, eps):
    objective = declare(DDPM.replace("epsilon", "v_prediction"))
    assert objective.prediction_type == "v_prediction"
    levels = objective.alphas_cumprod
    assert levels.shape == (1000,) and levels.dtype == torch.float64
    t = torch.tensor([10, 900])
    a, s = wide(levels[t].sqrt()), wide((1 - levels[t]).sqrt())
    close(objective.add_noise(x0, eps, t), a * x0 + s * eps)
    close(objective.get_velocity(x0, eps, t), a * eps - s * x0)


def test_noise_is_added_as_it_is_given():
    """A scheduler does not perturb: strategies belong to the loss."""
    plain, other = declare(DDPM), declare(f"{DDPM}\nstrategy = [offset_noise, dream]")
    args = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([10, 900])
    close(plain.add_noise(*args), other.add_noise(*args))


def test_continuous_processes_have_no_table():
    assert not hasattr(declare(FLOW), "alphas_cumprod")


CONFIG = {
    "beta_schedule": "squaredcos_cap_v2",
    "num_train_timesteps": 100,
    "rescale_betas_zero_snr": True,
}


VELOCITY = DDPM.replace("epsilon", "v_prediction")


def given_scheduler(scheduler, body: str = VELOCITY) -> Objective:
    return difftrain.objective(spec_of(body), student, modules={"scheduler": scheduler})


def test_a_configuration_stands_in_for_the_process(tmp_path):
    levels = given_scheduler(CONFIG).alphas_cumprod
    assert len(levels) == 100 and levels[-1] == 0
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(CONFIG))
    for path in (file, str(file), file.parent, tmp_path):
        close(given_scheduler(path).alphas_cumprod, levels)


def test_the_rest_of_the_spec_stays():
    body = f"{DDPM.replace('epsilon', 'sample')}\nstrategy = min_snr"
    objective = given_scheduler(CONFIG, body)
    assert objective.prediction_type == "sample"
    assert objective.evaluate(("min_snr.gamma",), {"x0": torch.ones(SHAPE)})
    assert "scheduler" not in objective.nets


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ({"trained_betas": [0.1]}, "the scheduler lists its betas one by one"),
        ({"beta_schedule": "sigmoid"}, "the scheduler's betas `sigmoid` are not known here"),
        (object(), "the scheduler has no `config`"),
        ("nowhere.json", "`nowhere.json` cannot be read .no such file"),
    ],
)
def test_schedulers_without_a_meaning_are_told(scheduler, said):
    with pytest.raises(ValueError, match=said):
        given_scheduler(scheduler)


@pytest.mark.parametrize(("text", "said"), [("{", "is not JSON"), ("[]", "is not a mapping")])
def test_files_that_hold_no_configuration_are_told(tmp_path, text, said):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        given_scheduler(tmp_path / "broken.json")


def test_a_scheduler_cannot_stand_in_for_any_process():
    with pytest.raises(ValueError, match="cannot stand in for `linear`, which has no `beta`"):
        given_scheduler(CONFIG, FLOW)


def test_a_scheduler_that_makes_no_sense_here_is_told():
    with pytest.raises(difftrain.SpecError) as caught:
        given_scheduler(CONFIG, DDPM)
    assert "`epsilon` cannot be trained" in caught.value.findings[0].message


# ---- a torch module


class Frozen(nn.Linear):
    def forward(self, x, t, cond=None):
        return super().forward(x)


def test_frozen_modules_are_not_trained():
    net, teacher = Frozen(2, 2), Frozen(2, 2)
    body = f"{FLOW}\nloss = fit + mse(pred, stop(pred(net = teacher)))"
    objective = difftrain.objective(spec_of(body), net, modules={"teacher": teacher})
    assert [n for n, _ in objective.named_parameters()] == ["network.weight", "network.bias"]
    assert set(objective.state_dict()) == {"network.weight", "network.bias"}
    objective.train()
    assert net.training and not teacher.training
    objective(torch.randn(SHAPE)).mean().backward()
    assert net.weight.grad is not None and teacher.weight.grad is None
    objective.to(torch.float64)
    assert teacher.weight.dtype == net.weight.dtype == torch.float64


def test_a_module_that_is_missing_is_told(x0):
    objective = declare(f"{FLOW}\nloss = mse(pred, stop(pred(net = teacher)))")
    with pytest.raises(ValueError, match="`o` reads `teacher`: give it in modules="):
        objective(x0)


def test_a_state_can_be_saved_and_loaded():
    one, other = (declare(FLOW, Tiny()) for _ in range(2))
    with torch.no_grad():
        one.network.weight.add_(1)
    other.load_state_dict(one.state_dict())
    close(one(batch()["x0"]), other(batch()["x0"]))


@pytest.mark.parametrize("answer", ["tuple", "sample", "list"])
def test_networks_may_answer_in_other_ways(x0, eps, answer):
    def net(x, t, cond=None):
        out = student(x, t)
        return {"tuple": (out, None), "list": [out], "sample": Answer(out)}[answer]

    class Answer:
        def __init__(self, sample):
            self.sample = sample

    given = {"t": T, "eps": eps}
    close(declare(FLOW, net).loss(x0, **given), declare(FLOW).loss(x0, **given))


def test_an_answer_without_a_tensor_is_told(x0):
    with pytest.raises(TypeError, match="a module answered with str: return a tensor"):
        declare(FLOW, lambda x, t, cond=None: "nothing")(x0)


def test_programs_are_made_once(x0):
    objective = declare(FLOW)
    objective(x0), objective(x0), objective.pred(x0, T)
    assert len(objective._programs) == 2


def test_terminal_noise_has_no_singular_weight(x0):
    objective = declare(f"{ZERO}\nprediction_type = v_prediction\nstrategy = min_snr")
    assert objective(x0, t=torch.tensor([0, 49])).isfinite().all()
