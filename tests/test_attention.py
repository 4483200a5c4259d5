"""Attention that is differentiated forward: its values, its tangent, and their gradients."""

import copy
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from counting import Counting
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from difftrain.compiler import lowering
from difftrain.models.attention import SelfAttention, attend, plain
from difftrain.models.form import Form
from difftrain.models.tangent_attention import (
    carried,
    from_logsumexp,
    plain_because,
    tangent,
)
from difftrain.models.transformer import transformer

# queries, keys, numbers of a head
SHAPES = [(16, 16, 8), (9, 21, 16)]
GPU_SHAPES = [(1024, 1024, 64), (256, 256, 72), (1000, 77, 64), (130, 190, 32), (64, 64, 128)]


def drawn(rows, columns, width, dtype=torch.float64, device="cpu", heads=3):
    """q, k, v and a tangent of each, as a transformer's product of qkv gives them."""
    torch.manual_seed(0)
    counts = (rows, columns, columns) * 2
    wide = [torch.randn(2, n, heads, width, device=device) for n in counts]
    return [x.to(dtype).transpose(1, 2) for x in wide]


def both(function, values, along):
    """The values and the tangent of a function."""
    return torch.func.jvp(function, tuple(values), tuple(along))


def off(found, expected) -> float:
    """The greatest error, as a share of the greatest number."""
    expected = expected.double()
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


def objective(attention, stopped: bool):
    """A loss of the values beside the tangent, which is or is not a fixed target."""

    def loss(values, along):
        value, slope = both(attention, values, along)
        return (value - (slope.detach() if stopped else slope)).square().mean()

    return torch.func.grad(loss)


# ---- the tangent


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_tangent_are_those_of_matrix_products(shape):
    *values, tq, tk, tv = drawn(*shape)
    expected = both(plain, values, (tq, tk, tv))
    for found, wanted in zip(both(carried, values, (tq, tk, tv)), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(tangent(*values, tq, tk, tv), expected[1])


@pytest.mark.parametrize("moving", ["q", "k", "v", "kv"])
def test_what_does_not_move_has_no_share_in_the_tangent(moving):
    values, along = dict(zip("qkv", drawn(9, 21, 16)[:3], strict=True)), drawn(9, 21, 16)[3:]
    along = [a for a, name in zip(along, "qkv", strict=True) if name in moving]

    def moved(attention):
        def function(*given):
            return attention(**{**values, **dict(zip(moving, given, strict=True))})

        return both(function, [values[name] for name in moving], along)

    for found, wanted in zip(moved(carried), moved(plain), strict=True):
        torch.testing.assert_close(found, wanted)


def test_without_a_tangent_it_is_the_fused_kernel():
    q, k, v, *_ = drawn(9, 21, 16)
    assert torch.equal(carried(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_the_precision_is_that_of_the_values():
    q, k, v, *along = drawn(16, 16, 8, torch.float32)
    value, slope = both(carried, (q, k, v.bfloat16()), (*along[:2], along[2].bfloat16()))
    assert value.dtype == slope.dtype == torch.bfloat16
    assert off(slope, both(plain, (q, k, v), along)[1]) < 0.05


# ---- gradients


@pytest.mark.parametrize("stopped", [True, False], ids=["stopped", "followed"])
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_gradients_are_those_of_matrix_products(stopped, compiled):
    *values, tq, tk, tv = drawn(9, 21, 16)
    gradient = objective(carried, stopped)
    whole = torch.compile(gradient, fullgraph=True, backend="aot_eager") if compiled else gradient
    expected = objective(plain, stopped)(tuple(values), (tq, tk, tv))
    found = whole(tuple(values), (tq, tk, tv))
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted)


def test_it_compiles_after_a_call_without_tangent():
    q, k, v, *along = drawn(9, 9, 8)

    def loss(q):
        with torch.no_grad():
            before = carried(q, k, v)
        value, slope = both(carried, (q, k, v), along)
        return (value - before - slope.detach()).square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="aot_eager")
    assert off(compiled(q), torch.func.grad(loss)(q)) < 1e-12


def test_ordinary_gradients_pass_too():
    tensors = [x.requires_grad_() for x in drawn(16, 16, 8)]
    o, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors[:3])
    found = torch.ops.difftrain.attention_tangent(*tensors, o, logsumexp).square().sum()
    wanted = tangent(*tensors).square().sum()
    pairs = (torch.autograd.grad(loss, tensors) for loss in (found, wanted))
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other)


def test_the_operator_says_the_shape_that_it_gives():
    tensors = drawn(9, 21, 16, torch.float32)
    o, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*tensors[:3])
    operator = torch.ops.difftrain.attention_tangent.default
    torch.library.opcheck(operator, (*tensors, o, logsumexp), test_utils="test_faketensor")
    expected = from_logsumexp(*tensors, o, logsumexp)
    assert torch.equal(operator(*tensors, o, logsumexp), expected)


# ---- the choice


def test_on_the_cpu_attention_is_matrix_products():
    q, k, v, *_ = drawn(16, 16, 8)
    assert plain_because(q, v) == "the kernel needs a CUDA GPU"
    assert torch.equal(attend(q, k, v, fused=False), plain(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("forward_mode", [True, False], ids=["forward", "never"])
def test_math_is_matrix_products_on_a_gpu_too(forward_mode):
    with FakeTensorMode():  # as a GPU would be asked
        assert looked("math", forward_mode) == {"aten.bmm.default"}


@pytest.mark.gpu
def test_on_a_gpu_a_network_that_may_choose_is_carried():
    assert "difftrain.attention_tangent.default" in looked("auto", True)
    assert looked("math", True) == {"aten.bmm.default"}


def looked(attention, forward_mode):
    """What attention is computed by where tokens are shown to it, and moved if they may be."""
    there = {"device": "cuda", "dtype": torch.bfloat16}
    layer = SelfAttention(32, 2, **Form(attention=attention, forward_mode=forward_mode).way)
    weights = {n: torch.empty(p.shape, **there) for n, p in layer.named_parameters()}

    def function(x):
        return torch.func.functional_call(layer, weights, (x,))

    x = torch.empty(2, 16, 32, **there)
    with Counting() as counting:
        torch.func.jvp(function, (x,), (x,)) if forward_mode else function(x)
    return {name for name in counting.found if "bmm" in name or "attention" in name}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype, width, words",
    [
        (torch.bfloat16, 64, ""),
        (torch.float16, 72, ""),
        (torch.float32, 64, "the kernel computes in bf16 and fp16"),
        (torch.bfloat16, 136, "the kernel takes heads of a multiple of 8 numbers, 128 at most"),
        (torch.bfloat16, 20, "the kernel takes heads of a multiple of 8 numbers, 128 at most"),
    ],
)
def test_on_a_gpu_precision_and_width_decide(dtype, width, words):
    q, _, v, *_ = drawn(16, 16, width, dtype, "cuda")
    assert plain_because(q, v) == words


@pytest.mark.gpu
def test_a_derivative_of_a_derivative_is_taken_of_matrix_products():
    *values, tq, tk, tv = (x.cuda().bfloat16() for x in drawn(16, 16, 16))

    def attention(*values):
        return attend(*values, fused=False)

    def slope(*values):
        return both(attention, values, (tq, tk, tv))[1]

    def wanted(*values):
        return both(lambda *x: plain(*x).transpose(1, 2).flatten(2), values, (tq, tk, tv))[1]

    found = both(slope, values, (tq, tk, tv))[1]
    assert off(found, both(wanted, values, (tq, tk, tv))[1]) < 0.02


# ---- the kernel

if find_spec("triton"):

    @pytest.mark.parametrize("rows, columns, width", [(20, 33, 8), (32, 16, 32)])
    def test_the_kernel_in_slow_motion(rows, columns, width):
        code = f"import test_attention as t; t.interpreted({rows}, {columns}, {width})"
        paths = os.pathsep.join((os.path.dirname(__file__), *sys.path))
        slow = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
        subprocess.run([sys.executable, "-c", code], env=slow, check=True)


def interpreted(rows: int, columns: int, width: int) -> None:
    """Runs the kernel in Triton's interpreter, which stands for no GPU and knows no bf16."""
    from difftrain.models.tangent_kernel import Plan, launch

    exact = drawn(rows, columns, width)
    o, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*exact[:3])
    halves = [x.half() for x in (*exact, o)]
    found = launch(*halves, logsumexp.float(), torch.empty_like(halves[0]), Plan(16, 16, 4, 1))
    assert off(found, tangent(*exact)) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_on_a_gpu_everything_is_near_float64(shape, dtype):
    tensors = drawn(*shape, dtype, "cuda")
    exact = [x.double() for x in tensors]
    found = both(carried, tensors[:3], tensors[3:])
    for one, wanted in zip(found, both(plain, exact[:3], exact[3:]), strict=True):
        assert off(one, wanted) < 1e-2
    gradients = zip(pulled(carried, tensors), pulled(plain, exact), strict=True)
    assert all(off(one, wanted) < 1e-2 for one, wanted in gradients)


def pulled(attention, tensors):
    """The gradients for q, k and v of the values that stand beside a tangent, along tq."""

    def loss(values):
        return (both(attention, values, tensors[3:])[0] * tensors[3]).sum()

    return torch.func.grad(loss)(tuple(tensors[:3]))


@pytest.mark.gpu
@pytest.mark.parametrize("backend, stopped", [("inductor", True), ("aot_eager", False)])
def test_on_a_gpu_compiled_is_eager(backend, stopped):
    *values, tq, tk, tv = drawn(200, 200, 64, torch.bfloat16, "cuda")
    gradient, given = objective(carried, stopped), (tuple(values), (tq, tk, tv))
    whole = torch.compile(gradient, fullgraph=True, dynamic=False, backend=backend)
    for one, wanted in zip(whole(*given), gradient(*given), strict=True):
        assert off(one, wanted) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize(
    "switches", [{}, {"qk_norm": True, "rotary": True, "norm": "rms"}], ids=str
)
def test_on_a_gpu_a_network_and_its_tangent_are_near_float64(switches):
    torch.manual_seed(0)
    network = transformer(depth=2, width=128, heads=2, patch=1, forward_mode=True, **switches)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    x, t = torch.randn(2, 4, 16, 16, device="cuda"), torch.rand(2, device="cuda")
    exact = copy.deepcopy(network).cuda().double()
    expected = network_gradient(exact)(weights_of(exact), x.double(), t.double())
    network.cuda()
    found = lowering.compiler(forward=True)(network_gradient(network))(weights_of(network), x, t)
    assert off(found[1], expected[1]) < 3e-2
    flat = [
        torch.cat([g.flatten().double() for g in made[0].values()]) for made in (found, expected)
    ]
    assert (flat[0] - flat[1]).norm() < 3e-2 * flat[1].norm()


def weights_of(network):
    return {name: weight.detach() for name, weight in network.named_parameters()}


def network_gradient(network):
    """The gradient for the weights, and the tangent, of a network beside its fixed tangent."""

    def loss(weights, x, t):
        def function(x, t):
            value = torch.func.functional_call(network, weights, (x, t))
            return value, value

        with torch.autocast("cuda", torch.bfloat16, enabled=x.dtype == torch.float32):
            along = (x.cos(), torch.ones_like(t))
            _, slope, value = torch.func.jvp(function, (x, t), along, has_aux=True)
        return (value.double() - slope.detach()).square().mean(), slope

    return torch.func.grad(loss, has_aux=True)
