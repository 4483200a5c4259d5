"""Laws of time: on other quantities, other grids, with other densities; and laws of the noise."""

import pytest
import torch
from conftest import declare, near, spec_of, student, wide

import difftrain
from difftrain.compiler.draws import Draws
from difftrain.language.check import check
from difftrain.language.numbers import draws
from difftrain.language.tree import Source

# every process, with a prediction that it has
PROCESSES = {
    "linear": "flow",
    "gvp": "flow",
    "vp": "epsilon",
    "subvp": "epsilon",
    "ve": "epsilon",
    "edm": "sample",
    "trig": "flow",
}
SHAPE = (64, 1, 2, 2)


def body(process: str, prediction: str, more: str = "") -> str:
    return f"process = {process}\nprediction_type = {prediction}\n{more}"


def drawn(objective, *names, count: int = 64):
    """Quantities of a batch of zeros whose draws are those of step 0."""
    x0 = torch.zeros(count, 1, 2, 2, dtype=torch.float64)
    return objective.evaluate(names, {"x0": x0})


def findings(text: str) -> list:
    source = Source("test.diff", f"diff 1\nobjective o {{\n{text}\nbackbone = custom\n}}\n")
    return check(source)[1]


# ---- laws on a quantity that t decides


@pytest.mark.parametrize("process", PROCESSES)
def test_a_law_of_logsnr_is_inverted(process):
    objective = declare(body(process, PROCESSES[process], "logsnr ~ uniform(-3, 3)"))
    values = drawn(objective, "t", "logsnr")
    law = Draws(0, 0, torch.arange(64), torch.float64).uniform("t", -3, 3)
    near(values["logsnr"], law.tolist(), 1e-7)
    assert values["t"].unique().numel() == 64


@pytest.mark.parametrize("process", ["linear", "edm", "trig", "gvp"])
def test_a_normal_law_of_logsnr_reaches_every_level(process):
    objective = declare(body(process, PROCESSES[process], "logsnr ~ normal(1, 2)"))
    values = drawn(objective, "logsnr")["logsnr"]
    near(values, Draws(0, 0, torch.arange(64), torch.float64).normal("t", 1, 2).tolist(), 1e-7)


def test_a_user_s_path_is_inverted_by_bisection():
    text = """diff 1
process bent {
  t ~ uniform(0, 1)
  alpha = 1 - t^3 * (2 - t)
  sigma = t + t^2 * (1 - t)
}
objective o {
  process = bent, prediction_type = epsilon
  logsnr ~ uniform(-2, 2)
  backbone = custom
}
"""
    spec, found = check(Source("test.diff", text))
    assert [f.code for f in found if f.severity == "error"] == []
    values = drawn(difftrain.objective(spec, lambda x, t, cond: x), "t", "logsnr")
    near(
        values["logsnr"], Draws(0, 0, torch.arange(64), torch.float64).uniform("t", -2, 2).tolist()
    )


def test_a_law_of_sigma_on_a_straight_path():
    objective = declare(body("linear", "flow", "sigma ~ uniform(0.2, 0.4)"))
    values = drawn(objective, "t", "sigma")
    near(values["t"], values["sigma"].tolist())
    assert values["t"].min() >= 0.2 and values["t"].max() <= 0.4


def test_a_law_outside_the_levels_names_one_that_is_inside():
    (finding,) = findings(body("vp", "epsilon", "logsnr ~ normal(0, 2)"))
    assert finding.code == "DIF206"
    edit = finding.help.rpartition("write `")[2].rstrip("`")
    assert edit.startswith("logsnr ~ min(max(normal(0, 2), -")
    assert findings(body("vp", "epsilon", edit)) == []


def test_a_law_of_what_no_time_leads_to_is_its_own():
    values = drawn(declare(body("linear", "flow", "dropped ~ bernoulli(0.5)")), "t", "dropped")
    assert values["dropped"].dtype == torch.bool and len(values["dropped"].unique()) == 2
    assert values["t"].unique().numel() == 64


@pytest.mark.parametrize("first", ["t ~ uniform(0, 1)", "snr ~ exp(normal(0, 1))", "t = 0.5"])
def test_one_law_alone_can_say_what_t_is(first):
    found = findings(body("linear", "flow", f"{first}\nlogsnr ~ normal(0, 2)"))
    assert [f.code for f in found] == ["DIF109"] and "two laws" in found[0].message


def test_a_law_of_what_does_not_decide_t():
    assert [f.code for f in findings(body("linear", "flow", "det ~ uniform(0, 1)"))] == ["DIF215"]


# ---- densities


def test_importance_keeps_the_objective():
    """The mean of the compensated loss over the new law is the mean of the loss over the old."""
    plain = declare(body("linear", "flow"))
    moved = declare(body("linear", "flow", "strategy = importance(logit_normal(0.5, 1.5))"))
    x0 = torch.ones(20_000, 1, 1, 1, dtype=torch.float64)
    given = {"x0": x0, "eps": 0.5 * x0}
    old, new = (o.evaluate(("loss", "t"), given) for o in (plain, moved))
    assert abs(old["t"].mean() - new["t"].mean()) > 0.05
    assert abs(old["loss"].mean() / new["loss"].mean() - 1) < 0.02


def test_importance_divides_by_how_much_more_often_a_time_comes():
    objective = declare(body("linear", "flow", "strategy = importance(logit_normal(0, 1))"))
    t = torch.tensor([0.3, 0.7], dtype=torch.float64)
    x0 = torch.ones(2, 1, 2, 2, dtype=torch.float64)
    values = objective.evaluate(("loss", "fit"), {"x0": x0, "t": t})
    near(values["fit"] / values["loss"], [1.32677658864] * 2)


def with_two_times(*strategies: str, more: str = ""):
    text = body("linear", "flow", f"strategy = [{', '.join(strategies)}]\n{more}")
    return difftrain.objective(spec_of(text, backbone="custom(times = [t, r])"), student)


MOVED = "importance(logit_normal(0, 1))"


def test_importance_weighs_every_time_that_a_step_draws():
    """Two times from the other law: the loss by both of their odds."""
    names = ("t", "mean_flow.one", "mean_flow.two", "loss", "fit")
    values = drawn(with_two_times(MOVED, "mean_flow"), *names)
    one, two = values["mean_flow.one"], values["mean_flow.two"]
    assert (values["t"] == torch.maximum(one, two)).all()
    law = torch.distributions.Normal(0, 1)
    likely = [law.log_prob(t.logit()).exp() / (t * (1 - t)) for t in (one, two)]
    near(values["loss"] * likely[0] * likely[1] / values["fit"], [1.0] * 64)


@pytest.mark.parametrize("law", [(), ("importance(logit_normal(0, 2))",)])
def test_importance_of_two_times_keeps_the_objective(law):
    """The mean of both times, which are uniform in the objective: 1 / 2 each."""
    objective = with_two_times(*law, "mean_flow(1)", more="loss = t + r + 0.000001 * fit")
    assert abs(drawn(objective, "loss", count=40_000)["loss"].mean() - 1) < 0.02


def test_a_time_that_is_given_is_weighed_as_one():
    given = {"x0": torch.ones(2, 1, 2, 2, dtype=torch.float64)}
    given["t"] = torch.tensor([0.3, 0.7], dtype=torch.float64)
    values = with_two_times(MOVED, "mean_flow").evaluate(("loss", "fit"), given)
    near(values["fit"] / values["loss"], [1.32677658864] * 2)


def test_a_law_that_nothing_of_t_comes_from_weighs_nothing():
    top = "strategy fresh { own ~ uniform(0, 1), t' = own }"
    spec = spec_of(body("linear", "flow", f"strategy = [{MOVED}, fresh]"), head=top)
    values = drawn(difftrain.objective(spec, student), "loss", "fit")
    assert (values["loss"] == values["fit"]).all()


@pytest.mark.parametrize(
    ("law", "lost"),
    [
        ("uniform(0.2, 1)", "0..0.2"),
        ("uniform(0, 0.5)", "0.5..1"),
        ("uniform(0.2, 0.8)", "0..0.2 and 0.8..1"),
        ("shift(uniform(0, 0.5), 3)", "0.75..1"),
    ],
)
def test_a_narrower_law_says_which_times_are_lost(law, lost):
    (finding,) = findings(body("linear", "flow", f"strategy = importance({law})"))
    assert finding.code == "DIF219" and f"times in {lost} are never drawn" in finding.because


def test_a_wider_law_is_fine():
    text = "t ~ uniform(0.3, 0.6)\nstrategy = importance(logit_normal(0, 1))"
    assert findings(body("linear", "flow", text)) == []


def test_a_law_of_two_draws_is_listed_first():
    with pytest.raises(difftrain.SpecError) as failed:
        with_two_times("mean_flow", MOVED)
    (finding,) = failed.value.findings
    assert finding.help == "list `importance` before `mean_flow`, which makes `t` of several draws"


def test_a_law_of_an_earlier_estimate_says_nothing_of_t():
    spec = spec_of(body("linear", "flow", "guess ~ noise(x0)"), backbone="custom(inputs = [guess])")
    assert draws(spec.objective().quantity("guess"))[0]["name"] == "guess"
    assert spec.objective().quantity("t")["law"] == "uniform"


@pytest.mark.parametrize("process", ["ddpm(steps = 50)", "discrete(linear, steps = 50)"])
@pytest.mark.parametrize("t", [-1, 50])
def test_a_given_index_outside_the_table_is_told(process, t):
    objective = declare(body(process, "sample"))
    x0, index = torch.ones(2, 1, 2, 2, dtype=torch.float64), torch.tensor([3, t])
    said = rf"`t` is {t}, and `{process.partition('(')[0]}` has the steps 0 to 49"
    for ask in (
        lambda: objective.evaluate(("alpha",), {"x0": x0, "t": index}),
        lambda: objective.loss(x0, t=index),
        lambda: objective.add_noise(x0, x0, index),
    ):
        with pytest.raises(ValueError, match=said):
            ask()


def test_an_index_has_a_density_too():
    objective = declare(body("ddpm(steps = 50)", "epsilon", "fit' = density(t, t) * fit"))
    x0 = torch.ones(4, 1, 2, 2, dtype=torch.float64)
    values = objective.evaluate(("fit", "fit@0"), {"x0": x0})
    near(values["fit"] / values["fit@0"], [0.02] * 4)


def test_a_density_is_zero_where_its_law_gives_nothing():
    more = "t ~ uniform(0, 0.5)\nstrategy = importance(uniform(0, 1))"
    values = drawn(declare(body("linear", "flow", more)), "t", "loss", "fit")
    weight = values["loss"] / values["fit"]
    assert set(weight.tolist()) == {0.0, 2.0}
    assert ((weight == 2) == (values["t"] <= 0.5)).all()


@pytest.mark.parametrize(
    "law", ["min(1, abs(normal(0, 0.3)))", "abs(2 * uniform(0, 1) - 1)", "floor(2 * uniform(0, 1))"]
)
def test_a_law_that_gives_some_times_twice_has_no_density(law):
    (finding,) = findings(body("linear", "flow", f"strategy = importance({law})"))
    assert finding.code == "DIF215" and "monotone map" in finding.because


def test_an_end_that_is_zero_but_for_rounding_is_zero():
    assert findings(body("gvp", "flow", "snr ~ exp(normal(0, 2))")) == []


def test_a_law_of_two_draws_has_no_density():
    text = body("linear", "flow", "t ~ earlier(uniform(0, 1), 0.5)\nfit' = density(t, t) * fit")
    assert "DIF215" in [f.code for f in findings(text)]


# ---- the noise


def test_uniform_noise_has_the_moments_of_normal_noise():
    low, high = -(3**0.5), 3**0.5
    objective = declare(body("linear", "flow", f"eps ~ uniform_noise(x0, {low}, {high})"))
    noise = objective.sample_n((4096, 2, 2))
    assert noise.min() > low and noise.max() < high
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.02


def test_correlated_noise_has_what_it_shares():
    objective = declare(body("linear", "flow", "eps ~ noise(x0) + 2 * noise(pool(x0))"))
    noise = objective.sample_n((4096, 1, 2, 2)).flatten(1)
    shared = (noise.T @ noise / len(noise)).fill_diagonal_(4)
    assert (shared - 4).abs().max() < 0.4


@pytest.mark.parametrize("more", ["eps ~ uniform_noise(x0, -1, 1)", "strategy = offset_noise(0.1)"])
def test_other_noise_has_another_score(more):
    objective = declare(body("linear", "flow", more))
    x, t = torch.zeros(2, 1, 2, 2), torch.tensor([0.3, 0.7])
    with pytest.raises(difftrain.SpecError, match="not standard normal"):
        objective.score(x, t)
    assert objective.pred(x, t).shape == x.shape


def test_a_prediction_of_the_score_needs_normal_noise():
    found = findings(body("ve", "score", "eps ~ uniform_noise(x0, -1, 1)"))
    assert [f.code for f in found] == ["DIF205"] and "`epsilon`" in found[0].help
    assert findings(body("ve", "score")) == []


# ---- grids

GRIDS = {
    "discrete(linear)": ("linear", 1000, lambda i: (i + 1) / 1000),
    "discrete(linear, steps = 40, spacing = leading)": ("linear", 40, lambda i: i / 40),
    "discrete(gvp, steps = 100)": ("gvp", 100, lambda i: (i + 1) / 100),
    "discrete(vp(low = 0.1, high = 10), steps = 50)": (
        "vp(low = 0.1, high = 10)", 50, lambda i: (i + 1) / 50,
    ),
    "discrete(subvp, steps = 20)": ("subvp", 20, lambda i: (i + 1) / 20),
    "discrete(ve, steps = 20)": ("ve", 20, lambda i: (i + 1) / 20),
    "discrete(trig, steps = 20, spacing = trailing(high = 1.5))": (
        "trig", 20, lambda i: 1.5 * (i + 1) / 20,
    ),
    "discrete(edm, steps = 18, spacing = karras(low = 0.002, high = 80, rho = 7))": (
        "edm", 18,
        lambda i: (0.002 ** (1 / 7) + i / 17 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7,
    ),
}  # fmt: skip
QUANTITIES = ("alpha", "sigma", "snr", "xt", "target", "pred", "x0_hat", "flow", "flow_hat", "loss")


# on the last index of these all is noise, of which no prediction of the noise knows the data
FULL = ("discrete(linear)", "discrete(gvp, steps = 100)")
LEGAL = [
    (grid, prediction)
    for grid in GRIDS
    for prediction in ("epsilon", "flow", "sample")
    if not (grid in FULL and prediction == "epsilon")
]


@pytest.mark.parametrize("strategy", ["", "strategy = [dream, min_snr]", "strategy = p2"])
@pytest.mark.parametrize(("grid", "prediction"), LEGAL)
def test_a_grid_of_times_is_the_process_at_these_times(x0, eps, grid, prediction, strategy):
    process, count, time = GRIDS[grid]
    index = torch.tensor([count // 3, count - 2])
    given = {"x0": x0, "eps": eps}
    on_grid = declare(body(grid, prediction, strategy))
    found = on_grid.evaluate(QUANTITIES, {**given, "t": index})
    continuous = declare(body(process, prediction, strategy))
    wanted = continuous.evaluate(QUANTITIES, {**given, "t": time(index.double())})
    for name in QUANTITIES:
        scale = wanted[name].abs().max().clamp(min=1)
        assert (found[name] - wanted[name]).abs().max() <= 1e-12 * scale, name


def two_times(x, t, cond=None, r=None):
    return 0.3 * x + 0.1 * wide(t) ** 2 + 0.05 * wide(r) ** 3


def jumping(process: str):
    text = body(process, "flow", "strategy = mean_flow\nbackbone = custom(times = [t, r])")
    spec, found = check(Source("test.diff", f"diff 1\nobjective o {{\n{text}\n}}\n"))
    assert not found
    return difftrain.objective(spec, two_times)


def test_jumps_on_a_grid_are_those_between_its_times(x0, eps):
    given = {"x0": x0, "eps": eps}
    index = {"t": torch.tensor([299, 699]), "r": torch.tensor([99, 499])}
    found = jumping("discrete(linear)").evaluate(("target", "loss"), {**given, **index})
    times = {name: (i.double() + 1) / 1000 for name, i in index.items()}
    wanted = jumping("linear").evaluate(("target", "loss"), {**given, **times})
    for name in ("target", "loss"):
        near(found[name], wanted[name].flatten().tolist(), 1e-12)


def test_a_solver_tells_the_network_both_times_on_a_grid(x0):
    time = {"time": torch.tensor([0.3, 0.7]).double(), "r": torch.tensor([0.1, 0.5]).double()}
    ours = jumping("discrete(linear)")
    found = ours._compute(("flow_hat",), {"xt": x0, **time}, ("xt", "time", "r"))["flow_hat"]
    near(found, two_times(x0, time["time"], r=time["r"]).flatten().tolist())


def test_the_flow_of_this_moment_on_a_grid(x0):
    index = torch.tensor([299, 699])
    time = (index.double() + 1) / 1000
    near(
        jumping("discrete(linear)").pred(x0, index), two_times(x0, time, r=time).flatten().tolist()
    )


def test_a_grid_offers_the_whole_interface(x0, eps):
    objective = declare(body("discrete(linear, steps = 10)", "flow"))
    t = objective.sample_t((512,))
    assert set(t.tolist()) == set(range(10))
    levels = objective.alphas_cumprod
    assert levels.dtype == torch.float64
    near(levels, [(1 - (i + 1) / 10) ** 2 for i in range(10)])
    at = torch.tensor([2, 6])
    a, s = (v.reshape(2, 1, 1, 1) for v in (torch.tensor([0.7, 0.3]), torch.tensor([0.3, 0.7])))
    near(objective.add_noise(x0, eps, at), (a * x0 + s * eps).flatten().tolist(), 1e-6)
    near(objective.get_velocity(x0, eps, at), (a * eps - s * x0).flatten().tolist(), 1e-6)
    near(objective.c_noise(at), [0.3, 0.7], 1e-6)
    assert objective.prediction_type == "flow"


def test_a_process_that_there_is_not_is_named():
    (finding,) = findings(body("discrete(liner)", "flow"))
    assert finding.code == "DIF119" and "`linear`" in finding.help


def test_steps_are_numbered_as_flow_schedulers_do():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    objective = declare(body("discrete(linear, steps = 1000)", "flow"))
    index = torch.arange(1000)
    times = objective._at("sigma", index, {"x0": torch.zeros(1000, 1).double()})
    near(times.flip(0), scheduler.sigmas[:1000].tolist(), 1e-6)
    near(1000 * times.flip(0), scheduler.timesteps.tolist(), 1e-3)


def test_spec_of_other_laws_lints_clean():
    assert spec_of(body("linear", "flow", "t ~ mode(1.29)")).findings == ()


@pytest.mark.parametrize(
    ("process", "said"),
    [
        ("discrete(ddpm)", "counts steps already"),
        ("discrete(discrete(linear))", "counts steps already"),
        ("discrete(trig, spacing = trailing(high = 2))", "leaves the range"),
        ("discrete(vp, spacing = leading)", "leaves the range"),
    ],
)
def test_a_grid_needs_a_path_to_stand_on(process, said):
    found = [f for f in findings(body(process, "epsilon")) if f.code == "DIF206"]
    assert len(found) == 1 and said in found[0].message
