"""`difftrain.testing.check`: what conforms, and that each point can break."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from objectives import ALL, OWN
from torch import nn

import difftrain
from difftrain.compiler import operations, program, random
from difftrain.compiler.conformance import POINTS
from difftrain.language.check import check as lint
from difftrain.language.derive import Derivation
from difftrain.language.names import standard
from difftrain.language.tree import Source
from difftrain.testing import ConformanceError, check

SPECS = Path(__file__).parent.parent / "specs"
FLOW = "process = linear\nprediction_type = flow"
TRIG = "process = trig\nprediction_type = flow"
EDM = "process = edm\nprediction_type = sample"
DDPM = "process = ddpm(beta = scaled_linear, steps = 50)"


def spec_of(body: str):
    """The spec of one objective; networks that jump also receive r."""
    times = "[t, r]" if "jumpy" in body or "mean_flow" in body else "[t]"
    backbone = "" if "backbone" in body else f"backbone = custom(times = {times})"
    text = f"diff 1\n{OWN}\nobjective o {{\n{body}\n{backbone}\n}}\n"
    spec, found = lint(Source("test.diff", text))
    if errors := [f for f in found if f.severity == "error"]:
        raise difftrain.SpecError(errors)
    return spec


def outcomes(report) -> dict[str, str]:
    return {p.name: p.outcome for p in report.points}


# ---- what conforms

FAMILIES = [
    *("ddpm-v_prediction-dream+min_snr", "cosine-sample-p2+drop_condition", "ddpm-halves-dream"),
    *("zero-v_prediction-dream+min_snr", "zero-sample-offset_noise+dream", "ddpm-epsilon-"),
    *("linear-flow-nudge+gentle", "linear-epsilon-input_perturbation+min_snr", "linear-flow-"),
    *("linear-halves-min_snr", "arc-flow-offset_noise+dream", "exploding-flow-p2+drop_condition"),
    *("linear-huber", "linear-pseudo_huber", "ddpm-two_terms", "linear-scaled", "linear-adaptive"),
    *("linear-shifted", "linear-by_size", "linear-earlier", "linear-primed_input"),
    *("linear-derivative", "linear-jumps_dropped", "growing-flow", "wrapped-linear"),
]
OWN_BODIES = {name: ALL[name] for name in FAMILIES}
LIBRARY = {
    "soft_min_snr": "process = gvp\nprediction_type = v_prediction\nstrategy = soft_min_snr",
    "debiased": "process = vp\nprediction_type = epsilon\nstrategy = debiased",
    "score": "process = subvp\nprediction_type = score\nstrategy = input_perturbation",
    "ve": "process = ve\nprediction_type = sample",
    "edm": f"{EDM}\nstrategy = edm_precondition",
    "trig": f"{TRIG}\nstrategy = trig_flow",
    "mean_flow": f"{FLOW}\nstrategy = [mean_flow(omega = 2, kappa = 0.5), drop_condition(0.5)]",
    "sct": f"{TRIG}\nstrategy = sct(warmup = 10)",
    "scd": f"{TRIG}\nstrategy = [scd(scale = 3, warmup = 10), drop_condition(0.5)]",
    "consistency": f"{EDM}\nstrategy = consistency",
    "ct": f"{EDM}\nstrategy = ct(total = 100)",
    "ict": f"{EDM}\nstrategy = ict(total = 100)",
    "lcm": """process = ddpm(steps = 100)
      prediction_type = epsilon
      strategy = lcm
      backbone = custom(inputs = [lcm.w])""",
    "truncated_snr": "process = discrete(linear)\nprediction_type = flow\nstrategy = truncated_snr",
    "direction": f"{FLOW}\nstrategy = [direction, importance(logit_normal(0, 1))]",
    "self_condition": f"{FLOW}\nstrategy = self_condition\nbackbone = custom(inputs = [guess])",
    "repa": f"{FLOW}\nstrategy = repa",
    "uncertain": f"{EDM}\nstrategy = edm_precondition\nloss = uncertainty(fit)",
    "teacher": f"{FLOW}\ntarget' = stop(flow_hat(net = teacher, t = t / 2))",
}
BODIES = OWN_BODIES | LIBRARY


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_conforms(body):
    report = check(spec_of(body))
    assert set(outcomes(report).values()) <= {"holds", "left out"}
    assert all(p.said for p in report.left_out)


def shipped() -> list[tuple[Path, str]]:
    files = [SPECS / "quickstart.diff", *sorted((SPECS / "recipes").glob("*.diff"))]
    return [(f, name) for f in files for name in difftrain.read(f).objectives]


@pytest.mark.parametrize(("path", "name"), shipped(), ids=str)
def test_shipped_specs_conform(path, name):
    assert not check(path, name).broken


def test_every_definition_of_the_library_is_checked():
    kinds = ("process", "prediction", "strategy")
    names = {name for s in standard() for kind, name in s.own if kind in kinds}
    text = "\n".join(BODIES.values())
    assert {n for n in names if n not in text} == set()


# ---- what is left out says why


def test_what_has_no_meaning_is_left_out():
    said = {p.name: p.said for p in check(spec_of(f"{DDPM}\nprediction_type = epsilon")).left_out}
    assert "a table has no derivative" in said["`pred` answers"]
    assert said["frozen modules get no gradient"] == "no module is frozen"


def test_a_report_reads_line_by_line():
    lines = str(check(spec_of(FLOW))).splitlines()
    assert lines[0] == "objective `o`" and "holds     the loss is finite" in lines
    assert len(lines) == len(POINTS) + 1


# ---- networks of one's own


def halved(x, t, cond=None):
    return x / 2


def test_a_plain_function_is_a_network():
    assert outcomes(check(spec_of(FLOW), network=halved))["gradients reach what is trained"]


def test_a_network_is_not_changed():
    net = nn.Conv1d(2, 2, 3, padding=1).train()
    teacher = nn.Conv1d(2, 2, 1)
    before = net.weight.clone()

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net

        def forward(self, x, t, cond=None):
            return self.inner(x)

    body = LIBRARY["teacher"]
    given = {"teacher": lambda x, t, cond=None: teacher.to(x)(x)}
    check(spec_of(body), network=Net(), modules=given, shapes=[(2, 8)])
    assert net.weight.dtype == torch.float32 and net.training and net.weight.grad is None
    assert torch.equal(net.weight, before)


def test_conditions_of_ones_own():
    class Labels(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 1)

        def forward(self, x, t, cond):
            return torch.tanh(x) * self.table(cond[:, 0])[:, :, None, None]

    label, null = torch.tensor([[2]]), torch.tensor([[3]])
    body = f"{FLOW}\nstrategy = drop_condition(0.5)"
    check(spec_of(body), network=Labels(), cond=label, null=null, shapes=[(1, 2, 2)])


# ---- each point can break


def broken(spec, **given) -> dict[str, str]:
    """The points that do not hold, and what is said of them."""
    with pytest.raises(ConformanceError) as caught:
        check(spec, **given)
    said = {p.name: p.said for p in caught.value.report.broken}
    assert all(f"{name}: {text}" in str(caught.value) for name, text in said.items())
    return said


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, t, cond=None):
        self.calls += 1
        return self.weight * x / self.calls


class Plain(nn.Module):
    """A network that does one thing wrong."""

    def __init__(self, act):
        super().__init__()
        self.act = act
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, cond=None):
        return self.act(self.weight, x)


NETWORKS = {
    "mixes the batch": (lambda w, x: w * (x - x.mean(0)), "a sample does not depend on its batch"),
    "draws": (lambda w, x: w * x + torch.randn_like(x), "equal keys draw equal numbers"),
    "changes its input": (lambda w, x: w * x.mul_(0.5), "forwards are those"),
    "has another shape": (lambda w, x: (w * x).mean(1), "draws and quantities have their shapes"),
    "is not finite": (lambda w, x: w * x / 0, "the loss is finite"),
    "passes no gradient": (lambda w, x: (w * x).detach(), "gradients reach what is trained"),
    "has another gradient": (lambda w, x: w * x + w.detach() * x, "the gradient is the slope"),
    "fails": (lambda w, x: x @ torch.ones(7, 7), "the loss is finite"),
}


@pytest.mark.parametrize(("act", "point"), NETWORKS.values(), ids=NETWORKS.keys())
def test_broken_networks(act, point):
    found = broken(spec_of(FLOW), network=Plain(act))
    assert any(name.startswith(point) for name in found), found


def test_a_network_that_counts_its_calls():
    assert "equal keys draw equal numbers, others differ" in broken(
        spec_of(FLOW), network=Counting()
    )


def test_what_stops_is_told_in_one_line():
    found = broken(spec_of(FLOW), network=Plain(lambda w, x: x @ torch.ones(7, 7)))
    assert found["the loss is finite"].startswith("for data of shape [3, 1, 2, 2] it stops with: ")


def test_a_teacher_that_is_part_of_the_student():
    net = Plain(lambda w, x: w * x)
    found = broken(spec_of(LIBRARY["teacher"]), network=net, modules={"teacher": Around(net)})
    assert "frozen modules get no gradient" in found


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, t, cond=None):
        return self.inner(x, t, cond)


OBJECTIVES = {
    "the loss is finite": f"{FLOW}\nloss = fit / (sse(x0, xt) - sse(x0, xt))",
    "gradients reach what is trained": f"{FLOW}\nloss = if fit < 0 then fit else stop(fit)",
}


@pytest.mark.parametrize(("point", "body"), OBJECTIVES.items(), ids=OBJECTIVES.keys())
def test_broken_objectives(point, body):
    assert point in broken(spec_of(body))


ILL = "process = ddpm(terminal_snr = zero)\nprediction_type = epsilon"


def test_what_lint_finds_is_a_broken_point(tmp_path):
    file = tmp_path / "ill.diff"
    file.write_text(f"diff 1\nobjective o {{\n{ILL}\nbackbone = custom\n}}\n")
    assert "cannot be trained" in broken(file)["lint"]
    assert broken(file.with_name("ill.diff"), name="o").keys() == {"lint"}


def test_a_name_that_is_not_there(tmp_path):
    assert "there is no objective `p`" in broken(spec_of(FLOW), name="p")["lint"]


# ---- mutants of the compiler


def without_stops(graph, *args):
    """Passes that lose every `stop`."""
    graph = graph.copy()
    for node in graph.find("stop"):
        graph.replace(node, graph[node]["args"][0])
        graph.remove([node])
    return RUN(graph, *args)


RUN = program.run


def swapped(derivation, *args):
    a, b = ROW(derivation, *args)
    return b, a


ROW = Derivation.row


def by_place(stream, seed, step, index, *args, **more):
    return NORMAL(stream, seed, step, torch.arange(len(index)), *args, **more)


NORMAL = random.normal
MUTANTS = {
    "a lost stop": (program, "run", without_stops, "the compiled step is the equations"),
    "a gradient through stop": (
        operations.TORCH,
        "stop",
        lambda x: x,
        "the compiled step is the equations",
    ),
    "another sign": (
        program,
        "emit",
        lambda *a: EMIT(*a).replace("product + ", "product - "),
        "the compiled step is the equations",
    ),
    "a row the wrong way round": (Derivation, "row", swapped, "estimates of the target give back"),
    "draws by place": (random, "normal", by_place, "a sample does not depend on its batch"),
    "draws of no step": (
        random,
        "normal",
        lambda stream, seed, step, *a, **m: NORMAL(stream, seed, 0, *a, **m),
        "equal keys draw equal numbers",
    ),
    "a forward that is not shared": (
        program,
        "emit",
        lambda *a: EMIT(*a).replace("with torch.no_grad():", "if True:"),
        "forwards are those",
    ),
}
EMIT = program.emit


@pytest.mark.parametrize(("where", "name", "mutant", "point"), MUTANTS.values(), ids=MUTANTS.keys())
def test_mutants_of_the_compiler_are_found(monkeypatch, where, name, mutant, point):
    spec = spec_of(f"{DDPM}\nprediction_type = v_prediction\nstrategy = [dream, min_snr]")
    patch = monkeypatch.setitem if isinstance(where, dict) else monkeypatch.setattr
    patch(where, name, mutant)
    assert any(p.startswith(point) for p in broken(spec))


def test_a_member_with_another_shape_is_told(monkeypatch):
    from difftrain.compiler.objective import Objective

    monkeypatch.setattr(Objective, "score", lambda self, x, t, cond=None: x.sum())
    said = broken(spec_of(FLOW))["`score` answers"]
    assert said == "it answers with shape [] where [3, 1, 2, 2] is due"


def test_importing_it_needs_neither_torch_nor_pytest():
    code = "import sys, difftrain.testing; print(*{'torch', 'pytest'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
