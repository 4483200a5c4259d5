"""Several nets in one objective: teachers with equations of their own, averaged copies, trained
heads, features, shared dropout masks, and gradients that flow only where they should."""

import pytest
import torch
from conftest import near, student, wide
from torch import nn

import difftrain
from difftrain.language.check import check
from difftrain.language.numbers import draws
from difftrain.language.tree import Source

F64 = torch.float64
T = torch.tensor([0.3, 0.7], dtype=F64)
PLAIN = "process = linear\nprediction_type = flow"


def objective(text: str, network=student, name: str = "o", **modules):
    """The objective `o` of a file, which may declare others."""
    spec, found = check(Source("test.diff", f"diff 1\n{text}"))
    assert [f.message for f in found if f.severity == "error"] == []
    return difftrain.objective(spec, network, name=name, modules=modules)


def body(text: str, backbone: str = "custom") -> str:
    return f"objective o {{\n{text}\nbackbone = {backbone}\n}}\n"


class Affine(nn.Module):
    """a x + b t (+ c r), with weights."""

    def __init__(self, a=0.3, b=0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([a, b, 0.05], dtype=F64))
        self.calls = 0

    def forward(self, x, t, cond=None, r=None, **extra):
        self.calls += 1
        out = self.weight[0] * x + self.weight[1] * wide(t)
        return out if r is None else out + self.weight[2] * wide(r)


# ---- teachers

TEACHERS = {
    "same": "process = linear\nprediction_type = flow",
    "row": "process = linear\nprediction_type = sample",
    "angle": "process = trig(data = 0.5)\nprediction_type = flow\nstrategy = trig_flow",
    "exploding": "process = edm\nprediction_type = sample\nstrategy = edm_precondition(0.5)",
    "curved": "process = vp\nprediction_type = v_prediction",
}


@pytest.mark.parametrize("title", TEACHERS)
def test_a_teacher_s_own_equations_apply_inside(x0, eps, title):
    """The teacher's estimates are those of its own objective at the same noise level."""
    own = f"objective base {{\n{TEACHERS[title]}\nbackbone = custom\n}}\n"
    lines = (
        "seen = x0_hat(net = teacher)",
        "noise = eps_hat(net = teacher)",
        "loss = fit + mean(seen + noise)",
    )
    text = own + body("\n".join((PLAIN, "teacher = base", *lines)))
    teacher = Affine(0.25, 0.2)
    ours = objective(text, teacher=teacher)
    found = ours.evaluate(("seen", "noise", "xt", "logsnr"), {"x0": x0, "eps": eps, "t": T})
    theirs = objective(own, teacher, name="base")
    at, scale = moved(theirs, found["logsnr"], 50 if title == "exploding" else 1.5)
    near(
        theirs.evaluate(("logsnr",), {"x0": x0, "t": at})["logsnr"], found["logsnr"].tolist(), 1e-6
    )
    names = ("x0_hat", "eps_hat")
    given = {"xt": found["xt"] * wide(scale / (1 - T)), "t": at}
    wanted = theirs._compute(names, given, ("xt", "t"))
    near(found["seen"], wanted["x0_hat"].flatten().tolist(), 1e-6)
    near(found["noise"], wanted["eps_hat"].flatten().tolist(), 1e-6)


def moved(theirs, level, end):
    """The time and alpha at which another process has this logsnr, by bisection."""
    low, high = torch.full_like(level, 1e-5), torch.full_like(level, end)
    for _ in range(80):
        middle = (low + high) / 2
        found = theirs.evaluate(("logsnr",), {"x0": wide(middle), "t": middle})["logsnr"]
        low, high = (
            torch.where(found > level, middle, low),
            torch.where(found > level, high, middle),
        )
    alpha = theirs.evaluate(("alpha",), {"x0": wide(low), "t": low})["alpha"]
    return low, alpha


def test_a_teacher_s_prediction_is_converted_to_the_student_s_row(x0, eps):
    own = "objective base {\nprocess = linear\nprediction_type = sample\nbackbone = custom\n}\n"
    text = own + body(f"{PLAIN}\nteacher = base\ntarget' = stop(pred(net = teacher))")
    ours = objective(text, teacher=lambda x, t, cond: 0.5 * x)
    values = ours.evaluate(("target", "xt"), {"x0": x0, "eps": eps, "t": T})
    clean = 0.5 * values["xt"]
    near(values["target"], ((values["xt"] - clean) / wide(T)).flatten().tolist())


def test_a_teacher_without_a_declaration_has_the_student_s_equations(x0, eps):
    text = body(f"{PLAIN}\ntarget' = stop(pred(net = teacher))", "custom(inputs = [guess])")
    ours = objective(text, lambda x, t, cond, guess: x, teacher=lambda x, t, cond: 0.25 * x)
    values = ours.evaluate(("target", "xt"), {"x0": x0, "eps": eps, "t": T})
    near(values["target"], (0.25 * values["xt"]).flatten().tolist())


def test_a_teacher_draws_from_streams_of_its_own():
    shown = f"{PLAIN}\nstrategy = self_condition"
    text = body(shown, "custom(inputs = [guess])").replace("objective o", "objective base")
    more = "\nteacher = base\ntarget' = stop(pred(net = teacher))"
    text += body(shown + more, "custom(inputs = [guess])")
    spec, found = check(Source("test.diff", f"diff 1\n{text}"))
    assert not found
    names = {t["name"] for t in draws(spec.objective("o").quantity("loss"))}
    assert {"self_condition.on", "teacher.self_condition.on"} <= names


def test_a_teacher_on_a_table_has_no_time_between():
    text = "objective base {\nprocess = ddpm\nprediction_type = epsilon\nbackbone = custom\n}\n"
    text += body(f"{PLAIN}\nteacher = base\ntarget' = stop(pred(net = teacher))")
    _, found = check(Source("test.diff", f"diff 1\n{text}"))
    assert [f.code for f in found] == ["DIF160"]


def test_the_objective_that_is_not_a_teacher_is_the_one_that_trains():
    text = f"objective base {{\n{PLAIN}\nbackbone = custom\n}}\n"
    text += body(f"{PLAIN}\nteacher = base\ntarget' = stop(pred(net = teacher))")
    spec, _ = check(Source("test.diff", f"diff 1\n{text}"))
    assert spec.objective().name == "o"


# ---- averaged copies


def test_an_average_follows_the_network(x0, eps):
    text = body(f"{PLAIN}\nlagged = average(0.75)\ntarget' = stop(pred(net = lagged))")
    network = Affine()
    ours = objective(text, network)
    assert len(list(ours.parameters())) == 1
    given = {"x0": x0, "eps": eps, "t": T}
    values = ours.evaluate(("pred", "target"), given)
    near(values["target"], values["pred"].flatten().tolist())
    with torch.no_grad():
        network.weight.add_(1.0)
    ours.update_averages(step=1)
    values = ours.evaluate(("xt", "target"), given)
    near(values["target"], (0.55 * values["xt"] + 0.35 * wide(T)).flatten().tolist())


def test_the_decay_of_an_average_may_change_with_the_step():
    text = body(f"{PLAIN}\nlagged = average(1 - 1 / step)\ntarget' = stop(pred(net = lagged))")
    network = Affine()
    ours = objective(text, network)
    with torch.no_grad():
        network.weight.add_(1.0)
    ours.update_averages(step=1)  # the first update copies
    near(ours.nets["lagged"].weight, network.weight.tolist())


def test_an_average_may_be_given_as_ema(x0, eps):
    text = body(f"{PLAIN}\nlagged = average(0.75)\ntarget' = stop(pred(net = lagged))")
    ours = objective(text, Affine(), ema=lambda x, t, cond: 0 * x)
    assert ours.evaluate(("target",), {"x0": x0, "eps": eps, "t": T})["target"].abs().max() == 0


# ---- heads and features


def test_a_log_variance_is_made_and_trained(x0, eps):
    text = body(f"{PLAIN}\nloss = uncertainty(fit)")
    ours = objective(text, Affine())
    assert {n for n, _ in ours.named_parameters()} == {"network.weight", "logvar.linear.weight"}
    loss = ours.loss(x0, t=T, eps=eps)
    near(loss, ours.evaluate(("fit",), {"x0": x0, "eps": eps, "t": T})["fit"].tolist())
    loss.sum().backward()
    assert ours.logvar.linear.weight.grad.abs().sum() > 0
    ours.to(torch.float32)
    assert ours.logvar.linear.weight.dtype == torch.float32


def test_heads_are_trained_and_encoders_are_not(x0, eps):
    class Tapped(Affine):
        def forward(self, x, t, cond=None):
            return super().forward(x, t), x.flatten(2) * self.weight[0]

    project, vision = nn.Linear(4, 3, dtype=F64), nn.Linear(4, 3, dtype=F64)
    text = body(f"{PLAIN}\nstrategy = repa(0.5)")
    see = nn.Sequential(nn.Flatten(2), vision)
    ours = objective(text, Tapped(), project=project, vision=see)
    assert {n for n, _ in ours.named_parameters()} == {
        "network.weight", "project.weight", "project.bias",
    }  # fmt: skip
    ours.evaluate(("loss",), {"x0": x0, "eps": eps, "t": T, "image": x0})["loss"].sum().backward()
    assert project.weight.grad is not None and vision.weight.grad is None
    _, aux = ours.loss(x0, t=T, eps=eps, image=x0, return_aux=True)
    assert aux["repa.align"].shape == (2,)


def test_a_network_without_features_says_so(x0, eps):
    text = body(f"{PLAIN}\nstrategy = repa(0.5)")
    ours = objective(text, Affine(), project=lambda z: z, vision=lambda x: x.flatten(2))
    with pytest.raises(ValueError, match=r"return `\(output, tokens\)`"):
        ours.evaluate(("loss",), {"x0": x0, "eps": eps, "t": T, "image": x0})


def test_a_module_that_is_not_given_is_named(x0):
    ours = objective(body(f"{PLAIN}\nstrategy = repa(0.5)"), Affine())
    with pytest.raises(ValueError, match="reads `project`"):
        ours.loss(x0)


# ---- dropout

JUMP = "strategy = mean_flow(ratio = 1, omega = 1, kappa = 0.5)"


def test_masks_are_shared_by_the_forwards_of_a_step(x0, eps):
    handed = []

    def network(x, t, cond=None, r=None, masks=None):
        handed.append(masks)
        return x if masks is None else x * masks.bernoulli("drop", 0.5).reshape(-1, 1, 1, 1)

    text = body("process = edm\nprediction_type = sample\nstrategy = ict(total = 100)",
                "custom(dropout = 0.5)")  # fmt: skip
    ours = objective(text, network)
    ours.loss(x0, eps=eps, step=3)
    assert len(handed) == 2 and handed[0] is handed[1]
    ours.eval()
    handed.clear()
    ours.loss(x0, eps=eps, step=3)
    assert handed == [None, None]


def test_guidance_inside_training_drops_nothing(x0, eps):
    handed = []

    def network(x, t, cond=None, r=None, masks=None):
        handed.append(masks is not None)
        return x * 0.5

    ours = objective(body(f"{PLAIN}\n{JUMP}", "custom(times = [t, r], dropout = 0.5)"), network)
    ours.loss(x0, eps=eps, step=3)
    assert sorted(handed) == [False, False, True]  # the derivative gives the forward beside it


# ---- gradients


def test_only_the_network_learns(x0, eps):
    """A consistency distillation: gradient in the student and its head, in nothing else."""
    text = body("process = trig\nprediction_type = flow\nstrategy = scd(2)")
    network, teacher = Affine(), Affine()
    ours = objective(text, network, teacher=teacher)
    ours.loss(x0, eps=eps, step=5000).sum().backward()
    assert network.weight.grad.abs().sum() > 0
    assert teacher.weight.grad is None and not teacher.weight.requires_grad


def test_the_target_of_a_consistency_pair_has_no_gradient(x0, eps):
    text = body("process = edm\nprediction_type = sample\nstrategy = ct(total = 100)")
    network = Affine()
    ours = objective(text, network)
    target = ours.evaluate(("target", "pred"), {"x0": x0, "eps": eps})
    assert target["pred"].requires_grad and not target["target"].requires_grad


def test_an_earlier_estimate_is_shown_without_gradient(x0, eps):
    seen = []

    def network(x, t, cond=None, guess=None):
        seen.append(guess)
        return 0.5 * x

    text = body(f"{PLAIN}\nstrategy = self_condition(1)", "custom(inputs = [guess])")
    values = objective(text, network).evaluate(("x0_hat",), {"x0": x0, "eps": eps, "t": T})
    first, second = seen
    assert first.abs().max() == 0 and first.shape == x0.shape
    near(second, values["x0_hat"].flatten().tolist())


# ---- what has no meaning


@pytest.mark.parametrize(
    "text",
    [
        "process = trig\nprediction_type = flow\nstrategy = sct",
        "process = edm\nprediction_type = sample\nstrategy = ict(total = 100)",
        "process = ddpm\nprediction_type = epsilon\nstrategy = lcm",
    ],
)
def test_a_consistency_function_has_no_score(x0, text):
    backbone = "custom(inputs = [lcm.w])" if "lcm" in text else "custom"
    ours = objective(body(text, backbone), lambda x, t, cond, w=None: x, teacher=lambda *a: a[0])
    for member in (ours.score, ours.pred):
        with pytest.raises(difftrain.SpecError, match="has no meaning under"):
            member(x0, T)


def test_the_score_of_an_average_flow_is_that_of_this_moment(x0):
    """r = t, and one division by t: the two published mistakes are absent."""
    text = body(f"{PLAIN}\nstrategy = mean_flow", "custom(times = [t, r])")
    network = Affine()
    ours = objective(text, network)
    flow = ours.pred(x0, T)
    near(flow, network(x0, T, r=T).flatten().tolist())
    near(ours.score(x0, T), (-(x0 + (1 - wide(T)) * flow) / wide(T)).flatten().tolist())
    jump = ours.pred(x0, T, r=torch.zeros(2, dtype=F64))
    near(jump, network(x0, T, r=torch.zeros(2, dtype=F64)).flatten().tolist())


def test_the_score_of_an_exploding_process_divides_once(x0):
    text = body("process = edm\nprediction_type = sample\nstrategy = edm_precondition(0.5)")
    ours = objective(text, Affine())
    clean = ours._at("x0_hat", T, {"xt": x0}, ("t", "xt"))
    near(ours.score(x0, T), ((clean - x0) / wide(T) ** 2).flatten().tolist())


def test_a_given_time_is_never_before_the_earlier_one(x0, eps):
    text = body(f"{PLAIN}\nstrategy = mean_flow(ratio = 1)", "custom(times = [t, r])")
    _, aux = objective(text, Affine()).loss(x0, t=T, eps=eps, return_aux=True)
    assert (aux["r"] <= T).all()
