"""Every pass keeps every value; what each ensures; forwards; printing."""

import pytest
import torch
from objectives import ALL, LINEAR, ZERO, Tiny, batch, declared, draws, nets

from difftrain.compiler.interpret import interpret
from difftrain.compiler.program import compile_quantities
from difftrain.compiler.random import stream_key
from difftrain.graph.build import build
from difftrain.graph.passes import PASSES, forwards, run

WANTED = ("loss", "xt", "target", "pred")


def near(before: dict, after: dict, tolerance: float = 1e-12):
    """The same numbers, to rounding: cancelling a product changes the order of its factors."""
    for name, value in after.items():
        torch.testing.assert_close(value, before[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ALL)
def test_every_pass_keeps_every_value(name):
    graph = build(declared(ALL[name]), WANTED)
    given, net = batch(), nets()
    before = interpret(graph, given, draws(), net)
    for change in PASSES:
        graph = change(graph)
        after = interpret(graph, given, draws(), net)
        assert after.keys() >= set(WANTED), change.__name__
        near(before, after)


# ---- what each pass ensures


def passed(body: str, wanted=("loss",)):
    """The graph of an objective after all passes."""
    return run(build(declared(body), wanted))


def used(graph, *ops: str) -> int:
    return len(graph.find(*ops))


NOISE = f"{LINEAR}\nprediction_type = epsilon\n"


def test_bind_numbers_every_stream():
    graph = build(declared(f"{NOISE}strategy = drop_condition"), ("loss",))
    bound = PASSES[0](graph)
    streams = {bound[n]["attrs"]["name"]: bound[n]["attrs"]["stream"] for n in bound.find("draw")}
    assert streams.keys() == {"t", "eps", "drop_condition.drop"}
    assert streams["t"] == stream_key("t")


@pytest.mark.parametrize(
    ("strategy", "counted"),
    [
        ("[]", (1, 0)),
        ("min_snr", (1, 0)),
        ("dream", (1, 1)),
        ("[dream, nudge]", (1, 2)),
        ("[dream, min_snr, drop_condition]", (1, 1)),
        ("jumpy", (1, 0)),
    ],
)
def test_forwards_with_and_without_gradient(strategy, counted):
    body = f"{LINEAR}\nprediction_type = flow\nstrategy = {strategy}"
    assert forwards(passed(body)) == counted


@pytest.mark.parametrize(
    ("body", "counted"),
    [
        ("target' = stop(target - t * ddt(pred))", (1, 0)),
        ("flow' = stop(flow_hat)\ntarget' = stop(target - t * ddt(pred))", (1, 1)),
        ("strategy = repa\ntarget' = stop(target - t * ddt(pred))", (1, 1)),
    ],
    ids=["shared", "its direction needs it first", "its features are read"],
)
def test_a_derivative_gives_the_forward_at_its_point(body, counted):
    assert forwards(passed(f"{LINEAR}\nprediction_type = flow\n{body}")) == counted


def test_forwards_before_the_passes_are_all_with_gradient():
    assert forwards(build(declared(f"{NOISE}strategy = dream"), ("loss",))) == (2, 0)


class Recording(Tiny):
    """Remembers whether each forward was made with gradient."""

    def __init__(self):
        super().__init__()
        self.made = []

    def forward(self, x, t, cond=None, r=None):
        self.made.append(torch.is_grad_enabled())
        return super().forward(x, t, cond, r)


def test_the_first_forward_of_a_stopped_estimate_runs_without_gradient():
    net = Recording()
    graph = passed(f"{NOISE}strategy = dream")
    loss = interpret(graph, batch(), draws(), {"student": net})["loss"]
    assert net.made == [False, True] and loss.requires_grad


def test_a_gradient_around_the_stop_keeps_its_forward():
    body = f"{NOISE}strategy = dream\nloss = fit + 0.1 * mse(eps_hat(eps = 2 * eps), eps)"
    assert forwards(passed(body)) == (2, 1)
    assert forwards(passed(f"{NOISE}strategy = dream", ("loss", "eps_hat@0"))) == (2, 0)


def test_equal_forwards_are_one():
    twice = f"{NOISE}loss = fit + mse(eps_hat(t = t), eps) + mse(eps_hat(cond = cond), eps)"
    assert forwards(passed(twice)) == (1, 0)
    stopped = f"{NOISE}loss = fit + mse(pred(xt = stop(xt)), eps)"  # xt needs no gradient
    assert used(build(declared(stopped), ("loss",)), "network") == 2
    assert forwards(passed(stopped)) == (1, 0)


def test_other_conditions_and_times_are_other_forwards():
    other = f"{NOISE}loss = fit + mse(eps_hat(cond = null), eps) + mse(pred(t = t / 2), eps)"
    assert forwards(passed(other)) == (3, 0)


def test_stopping_a_condition_is_kept_for_encoders_that_are_trained():
    body = f"{NOISE}loss = fit + mse(pred(cond = stop(cond)), eps)"
    assert used(passed(body), "stop") == 1


def depends_only_on(graph, node: int, index: int) -> bool:
    """Whether a number per sample is a function of the index and constants alone."""
    below = graph.below(node) - {node} - graph.below(index)
    leaves = {n for n in below if not graph[n]["args"]}
    return index in graph.below(node) and all(graph[n]["op"] == "const" for n in leaves)


@pytest.mark.parametrize("name", [n for n in ALL if n.startswith(("ddpm", "cosine", "zero"))])
def test_what_depends_on_the_index_alone_is_looked_up(name):
    graph = passed(ALL[name])
    (index,) = (n for n in graph.find("draw") if graph[n]["attrs"]["name"] == "t")
    computed = [
        n
        for n in graph.order()
        if graph[n]["kind"] == "sample" and n != index and graph[n]["op"] != "pick"
    ]
    assert not [n for n in computed if depends_only_on(graph, n, index)]


def test_tables_are_computed_outside_the_step():
    program = compile_quantities(declared(f"{ZERO}\nprediction_type = epsilon"), ("loss",))
    step = program.source.split("def compute")[1]
    assert "cumprod" not in step and "sqrt" not in step and "count" not in step
    assert {k: v.dtype for k, v in program.make_tables().items()} == {
        "alpha": torch.float64,
        "sigma": torch.float64,
    }


def test_a_table_of_a_redefined_index_is_looked_up_too():
    body = f"{ZERO}\nprediction_type = v_prediction\nt' = floor(t / 2)\nfit' = snr * fit"
    graph = passed(body)
    given, net = batch(), nets()
    before = interpret(build(declared(body), ("loss",)), given, draws(), net)
    near(before, interpret(graph, given, draws(), net))


def test_nothing_is_left_that_no_output_needs():
    graph = passed(f"{NOISE}strategy = [dream, min_snr]")
    assert set(graph.net) == graph.below(*graph.outputs.values())


def test_nothing_is_computed_twice():
    graph = passed(ALL["linear-two_terms"])
    keys = [(d["op"], d["args"], str(d["attrs"])) for d in (graph[n] for n in graph.net)]
    assert len(keys) == len(set(keys))


def test_numbers_per_sample_are_spread_over_fields_once():
    graph = passed(f"{NOISE}strategy = dream")
    for node in graph.find("add", "sub", "mul", "div"):
        kinds = {graph[a]["kind"] for a in graph[node]["args"]}
        assert kinds != {"sample", "field"}
    assert used(graph, "widen") == 3  # alpha, sigma, lambda
