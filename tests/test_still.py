"""Layers whose weights stand still: their derivatives, and how many products these take."""

from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest
import torch
from counting import Counting
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from difftrain.language.part import Part
from difftrain.models import build, still
from difftrain.training.batches import Batches
from difftrain.training.stepper import feeding

TOOLS = Path(__file__).parents[1] / "tools"
KINDS = {  # a layer of torch's, and what it is shown
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "no bias": (lambda: nn.Linear(5, 7, bias=False), (3, 5)),
    "signals": (lambda: nn.Conv1d(2, 3, 3, padding=1), (3, 2, 6)),
    "pictures": (lambda: nn.Conv2d(2, 4, 3, stride=2, groups=2), (3, 2, 6, 6)),
    "around": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (3, 2, 6, 6)),
    "volumes": (lambda: nn.Conv3d(2, 3, 2), (3, 2, 4, 4, 4)),
}
PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.convolution.default")  # of layers
IN_A_BLOCK = 5  # layers: q, k and v; what follows attention; two of the perceptron; modulation
TINY = {"backbone.width": "32", "backbone.heads": "2", "train.precision": "bf16"}


def made(kind):
    """A layer of torch's and the same one that stands still, and what both are shown."""
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    layer = make().double()
    torch.manual_seed(0)
    return layer, still.stand(make().double()), torch.randn(shape).double()


def called(layer):
    """The layer as a function of what it is shown and of its weights."""
    return lambda x, weights: torch.func.functional_call(layer, weights, (x,))


def weights_of(layer):
    return {name: weight.detach() for name, weight in layer.named_parameters()}


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# ---- derivatives


def test_a_tangent_that_was_not_there_when_it_was_compiled():
    layer, standing, x = made("linear")
    torch._dynamo.reset()
    compiled = torch.compile(standing, backend="eager")
    same(torch.func.jvp(compiled, (x,), (x,)), torch.func.jvp(layer, (x,), (x,)))


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_tangents_are_torch_s(kind):
    layer, standing, x = made(kind)
    assert type(standing) is not type(layer) and isinstance(standing, type(layer))
    same(standing(x), layer(x))
    same(torch.func.jvp(standing, (x,), (x.cos(),)), torch.func.jvp(layer, (x,), (x.cos(),)))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_move_after_all_have_their_share(kind):
    layer, standing, x = made(kind)
    given = x, weights_of(layer)
    along = x.cos(), {name: weight.sin() for name, weight in given[1].items()}
    expected = torch.func.jvp(called(layer), given, along)
    same(torch.func.jvp(called(standing), given, along), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_both_are_torch_s(kind):
    layer, standing, x = made(kind)

    def loss(one):
        def number(weights):
            def function(x):
                return called(one)(x, weights).sin()

            value, slope = torch.func.jvp(function, (x,), (x.cos(),))
            return (value * slope).sum()

        return number

    same(
        torch.func.grad(loss(standing))(weights_of(layer)),
        torch.func.grad(loss(layer))(weights_of(layer)),
    )


def test_a_derivative_of_a_derivative_is_torch_s():
    layer, standing, x = made("linear")

    def twice(one):
        def slope(x):
            return torch.func.jvp(lambda x: one(x.sin()).sin(), (x,), (x.cos(),))[1]

        return torch.func.jvp(slope, (x,), (x * x,))

    same(twice(standing), twice(layer))


def test_it_compiles_once_and_beside_a_call_without_tangent():
    _, standing, x = made("linear")

    def loss(weights, x):
        before = called(standing)(x, weights)
        value, slope = torch.func.jvp(lambda x: called(standing)(x, weights), (x,), (x.cos(),))
        return (value - before.sin() - slope.detach()).square().mean()

    gradient = torch.func.grad(loss)
    torch._dynamo.reset()
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    for shown in (x, x + 1):
        with torch._dynamo.config.patch(error_on_recompile=shown is not x):
            same(
                compiled(weights_of(standing), shown),
                gradient(weights_of(standing), shown),
            )


def test_other_layers_stay_what_they_are():
    class Own(nn.Linear):
        pass

    network = still.stand(nn.Sequential(Own(2, 2), nn.LayerNorm(2), nn.Sequential(nn.Linear(2, 2))))
    assert [type(m) for m in network[:2]] == [Own, nn.LayerNorm]
    assert type(network[2][0]) is still.Linear
    assert list(network.state_dict()) == [
        "0.weight", "0.bias", "1.weight", "1.bias", "2.0.weight", "2.0.bias"
    ]  # fmt: skip


# ---- what a step computes


def products(found: Counter) -> int:
    return sum(found[name] for name in PRODUCTS)


@pytest.fixture
def stepping(monkeypatch):
    """A function that hands the step of a benchmark's spec, and what it is given, to another."""
    monkeypatch.syspath_prepend(str(TOOLS))
    ours = import_module("bench.ours")

    def run(spec, depth, call):
        settings = {**TINY, "backbone.depth": str(depth), "data.batch": "2", "train.compile": "off"}
        with ours.opened(spec, settings, 2, 8) as session:
            fed = feeding(session)(Batches(session.prepared, 0, 2).at(0))
            parts, tables = session.parts, session.programs.tables["step"]
            given = session.state, fed, parts.modules, parts.plan, tables
            return call(session.programs.step.step, given)

    return run


def eager(step, given) -> int:
    """The products of a step as it stands."""
    with Counting() as counting:
        step(*given)
    return products(counting.found)


def traced(step, given) -> int:
    """The products of a step's gradient as it is compiled."""
    found = Counter()

    def count(graph, inputs):
        found.update(str(node.target) for node in graph.graph.nodes)
        return graph

    state, batch, modules, plan, tables = given
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=count)
    compiled = torch.compile(step.gradient, fullgraph=True, backend=backend)
    compiled(plan.read(state), state, batch, modules, plan, tables)
    return products(found)


def test_a_derivative_along_the_path_is_one_pass_of_a_block_s_products_more(stepping):
    plain, more = (
        stepping(spec, 2, eager) - stepping(spec, 1, eager) for spec in ("sit", "mean_flow")
    )
    assert plain == 3 * IN_A_BLOCK
    assert more == 4 * IN_A_BLOCK


def test_what_is_compiled_has_the_same_products(stepping):
    assert stepping("mean_flow", 1, traced) == stepping("mean_flow", 1, eager)


def test_a_unet_s_derivative_is_two_forwards_of_its_products():
    sizes = {"channels": (32, 64), "layers": 1, "heads": 2, "attention": (0, 1), "groups": 8}
    part = Part("backbone", "sd_unet", {**sizes, "text": (), "size": 128})
    network = build(part, forward_mode=True)
    x, t = torch.randn(2, 4, 16, 16), torch.rand(2)
    found = []
    for call in (network, lambda *at: torch.func.jvp(network, at, (x, torch.ones(2)))):
        with Counting() as counting, torch.no_grad():
            call(x, t)
        found.append(products(counting.found))
    assert found[0] > 40 and found[1] == 2 * found[0]
