"""The emitted function: equal to the graph as derived, well written, and traceable."""

import subprocess
import sys

import pytest
import torch
from objectives import (
    ALL,
    DDPM,
    LINEAR,
    METHODS,
    OTHERS,
    PAIRS,
    ZERO,
    batch,
    declared,
    draws,
    nets,
)

from difftrain.compiler.interpret import interpret
from difftrain.compiler.printing import arguments, assignment, imports, returned
from difftrain.compiler.program import compile_quantities

WANTED = ("loss", "xt", "target", "pred")


def gradient(values: dict, modules: dict) -> torch.Tensor:
    """The gradient of everything that is trained; 0 for what the loss does not read."""
    trained = [modules[n].weight for n in ("student", "logvar", "project")]
    loss = values["loss"].mean()
    found = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in found])


@pytest.mark.parametrize("name", ALL)
def test_the_emitted_function_is_the_graph_as_derived(name):
    """Values and gradients in float64, at every process, prediction and strategy."""
    program = compile_quantities(declared(ALL[name]), WANTED)
    given, modules = batch(), nets()
    oracle = interpret(program.derived, given, draws(), modules)
    values = program.compute(given, draws(), modules, program.tables("cpu", torch.float64))
    for wanted in WANTED:
        torch.testing.assert_close(values[wanted], oracle[wanted], rtol=1e-12, atol=1e-12)
    slopes = gradient(values, modules), gradient(oracle, modules)
    assert slopes[0].abs().max() > 0
    torch.testing.assert_close(*slopes, rtol=1e-11, atol=1e-12)


# ---- how it is written

READ = [
    *OTHERS,
    *METHODS,
    *(f"{p}-v_prediction-{s}" for p in ("zero", "arc") for s in ("dream+min_snr", "")),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with what is emitted for many objectives."""
    folder = tmp_path_factory.mktemp("emitted")
    for number, name in enumerate(READ):
        source = compile_quantities(declared(ALL[name]), ("loss",)).source
        (folder / f"step_{number}.py").write_text(source)
    return folder


def ruff(*args, folder) -> str:
    options = ("--isolated", "--no-cache", "--line-length", "100", str(folder))
    done = subprocess.run([sys.executable, "-m", "ruff", *args, *options], capture_output=True)
    return (done.stdout + done.stderr).decode() if done.returncode else ""


def test_what_is_emitted_is_clean(written):
    rules = (
        "--select",
        "E,F,I,B,UP,SIM,A",
        "--config",
        "lint.isort.known-first-party=['difftrain']",
    )
    assert ruff("check", *rules, folder=written) == ""


def test_what_is_emitted_is_formatted(written):
    assert ruff("format", "--check", folder=written) == ""


DREAM = '''"""o: loss, as difftrain compiled it."""

import torch

from difftrain.compiler.network import call_network
from difftrain.compiler.operations import (
    count,
    cumprod,
    first,
    last,
    mean,
    pick,
    rows,
    smaller,
    stop,
    widen,
)


def tables() -> dict[str, torch.Tensor]:
    """What depends on an index alone, in float64: looked up in every step."""
    power = (0.0291547594742265 + 0.08038975202680673 * count(50) / 49) ** 2
    kept = torch.sqrt(cumprod(1 - power))
    end = last(kept)
    start = first(kept)
    alpha = (kept - end) * start / (start - end)
    sigma = torch.sqrt(1 - alpha**2)
    weight = smaller(alpha**2, 5 * sigma**2)
    ratio = sigma / torch.sqrt(alpha**2 + sigma**2)
    return {"alpha": alpha, "sigma": sigma, "weight": weight, "ratio": ratio}


def compute(inputs, draw, nets, tables) -> dict[str, torch.Tensor]:
    """The wanted quantities, for one batch."""
    x0 = inputs["x0"]
    null = inputs["null"]
    cond = inputs["cond"]
    t = draw.integer("t", 50)
    eps_1 = draw.noise("eps", x0)
    drop = draw.bernoulli("drop_condition.drop", 0.1)
    shown = rows(drop, null, cond)
    weight = pick(tables["weight"], t)
    alpha = widen(pick(tables["alpha"], t), x0)
    product = alpha * x0
    sigma = widen(pick(tables["sigma"], t), x0)
    xt_1 = product + sigma * eps_1
    with torch.no_grad():
        pred_1 = call_network(nets["student"], xt_1, t, shown)
    eps_hat = alpha * pred_1 + sigma * xt_1
    eps = eps_1 + widen(pick(tables["ratio"], t), x0) * stop(eps_1 - eps_hat)
    xt = product + sigma * eps
    pred = call_network(nets["student"], xt, t, shown)
    target = alpha * eps - sigma * x0
    loss = weight * mean((pred - target) ** 2)
    return {"loss": loss}
'''


def test_a_step_reads_as_a_person_would_write_it():
    strategies = "strategy = [dream(p = 1), min_snr(5), drop_condition(0.1)]"
    body = f"{ZERO}\nprediction_type = v_prediction\n{strategies}"
    assert compile_quantities(declared(body), ("loss",)).source == DREAM


def test_a_derivative_is_a_function_of_its_own():
    source = compile_quantities(declared(OTHERS["linear-jumps"]), ("loss",)).source
    assert (
        """
    def along(t_1, xt_1):
        pred_1 = call_network(nets["student"], xt_1, t_1, cond, r=r)
        return pred_1, pred_1

    _, slope, pred = torch.func.jvp(along, (t, xt), (torch.ones_like(t), flow), has_aux=True)
    target = stop(flow - widen(t - r, x0) * slope)
    loss = mean((pred - target) ** 2)
"""
        in source
    )


def test_names_that_python_has_are_left_to_it():
    body = (
        f"{LINEAR}\nprediction_type = flow\nlambda = snr\nprint = 2 * sigma + 0.25 * alpha + 0.125"
    )
    source = compile_quantities(declared(body), ("print", "lambda")).source
    assert "print_ = " in source and "lambda_ = " in source
    assert 'return {"print": print_, "lambda": lambda_}' in source


def test_equal_last_names_stay_apart():
    body = f"""{DDPM}\nprediction_type = epsilon\nstrategy = [offset_noise]
    level = log(snr)"""
    source = compile_quantities(declared(body), ("level", "offset_noise.level")).source
    assert "offset_noise_level = draw.noise" in source and "    level = pick(" in source


def test_infinite_numbers_can_be_written():
    body = f"{LINEAR}\nprediction_type = flow\nfit' = min(log(0), snr) * mse(pred, target)"
    assert "-torch.inf" in compile_quantities(declared(body), ("loss",)).source


def test_long_calls_are_broken_where_a_formatter_breaks_them():
    names = [f"argument_{i}" for i in range(7)]
    lines = assignment("value", f"function({', '.join(names)})", "    ")
    assert lines == ["    value = function(", f"        {', '.join(names)}", "    )"]
    lines = assignment("value", f"call({', '.join(names * 2)})", "    ")
    assert lines[1] == "        argument_0," and len(lines) == 16
    assert arguments('f(a, b), {"x": c}, d') == ["f(a, b)", '{"x": c}', "d"]


def test_long_dictionaries_and_imports_have_one_entry_a_line():
    entries = {f"quantity_{i}": f"quantity_{i}" for i in range(5)}
    assert returned(entries)[1] == '        "quantity_0": quantity_0,'
    assert imports({"a.b": ["y", "x", "Z"], "a.a": []}) == ["from a.b import Z, x, y"]


# ---- lowering

TRACED = {
    name: ALL[name]
    for name in (
        "ddpm-epsilon-",
        "zero-v_prediction-dream+min_snr",
        "cosine-sample-p2+drop_condition",
        "ddpm-epsilon-offset_noise+dream",
        "linear-flow-input_perturbation+min_snr",
        "linear-flow-nudge+gentle",
        "ddpm-huber",
        "linear-shifted",
        "linear-by_size",
        "linear-earlier",
        "linear-jumps_dropped",
        "wrapped",
        "mean-flow-guided",
        "scd",
        "ict",
        "lcm",
        "repa",
        "self-condition",
        "levels",
    )
}


def lowered(body: str, backend: str, tolerance: float) -> None:
    """Asserts that the compiled function gives what the plain one does, gradients included."""
    program = compile_quantities(declared(body), ("loss", "xt"))
    given, modules, tables = batch(), nets(), program.tables("cpu", torch.float64)

    def values(compute):
        found = compute(given, draws(), modules, tables)
        return found["loss"], found["xt"], gradient(found, modules)

    torch._dynamo.reset()
    compiled = torch.compile(program.compute, fullgraph=True, backend=backend)
    for found, plain in zip(values(compiled), values(program.compute), strict=True):
        torch.testing.assert_close(found, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", TRACED)
def test_the_whole_function_is_one_traced_graph(name):
    lowered(TRACED[name], "aot_eager", 1e-12)


def test_compiled_code_gives_the_same_numbers():
    lowered(PAIRS["zero-v_prediction-dream+min_snr"], "inductor", 1e-9)
