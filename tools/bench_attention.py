"""Attention that is differentiated forward: matrix products against fused kernels.

    python tools/bench_attention.py [--every] [--plans]

Times one compiled call that gives values, their tangent and the gradient of the values, where q, k
and v lie as one product gives them: in bf16 on a GPU, replayed as a CUDA graph, and small in fp32
on a CPU. Errors are against float64, as shares of the greatest number.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from difftrain.models.attention import plain
from difftrain.models.tangent_attention import carried, cudnn, flash, fused

# samples, heads, tokens, numbers of a head
SHAPES = [(16, 6, 1024, 64), (8, 16, 1024, 64), (32, 16, 1024, 64), (32, 16, 256, 64)]
SHAPES += [(32, 16, 256, 72), (64, 16, 256, 72)]
EVERY = list(itertools.product((8, 16, 32), (6, 16), (256, 1024), (64,)))
SMALL = [(2, 2, 256, 64)]
PLANS = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3)]
PLANS += [(64, 128, 4, 2), (128, 32, 8, 2), (128, 32, 8, 3), (128, 32, 4, 3), (64, 32, 4, 2)]
CALLS = 20


WAYS: dict[str, Callable] = {
    "matrix products": plain,
    "flash": lambda q, k, v: carried(q, k, v, fused if q.device.type == "cpu" else flash),
    "cudnn": lambda q, k, v: carried(q, k, v, cudnn),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", action="store_true", help="every size, and not a few")
    parser.add_argument("--plans", action="store_true", help="also times the kernel's plans")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    place = torch.cuda.get_device_name() if gpu else platform.processor() or "a CPU"
    lines = [f"{place}, torch {torch.__version__}, {'bf16' if gpu else 'fp32'}"]
    if args.plans and gpu:
        lines += [*plans(16, 6, 1024, 64), *plans(32, 16, 256, 72)]
    lines += _row("samples heads tokens width", "way", "ms", "x", "MiB", "value", "tangent", "grad")
    for shape in (EVERY if args.every else SHAPES) if gpu else SMALL:
        lines += rows(shape, gpu)
    print("\n".join(lines))


def rows(shape: tuple[int, ...], gpu: bool) -> list[str]:
    """A line for each way, with how much faster than matrix products it is."""
    tensors, first, lines = drawn(shape, gpu), None, []
    exact = answers(plain)(*(x[..., :1, :, :, :].double() for x in tensors))
    for name, way in WAYS.items():
        if name == "cudnn" and not gpu:
            continue
        compiled = torch.compile(answers(way), fullgraph=True, dynamic=False)
        found = compiled(*tensors)
        pairs = zip(found, exact, strict=True)
        errors = [f"{off(a[..., :1, :, :, :], b):.1e}" for a, b in pairs]
        call = partial(compiled, *tensors)
        taken, most = timed(replayed(call) if gpu else call, gpu)
        first = first or taken
        size = " ".join(map(str, shape))
        lines += _row(size, name, f"{taken:.3f}", f"{first / taken:.2f}", f"{most:.0f}", *errors)
        del found
        torch.compiler.reset()
    return lines


def drawn(shape: tuple[int, ...], gpu: bool) -> list[Tensor]:
    """q, k and v as one tensor [3, B, T, H, d] that lies as [B, T, 3, H, d], their tangents, and a
    gradient [1, B, T, H, d]."""
    torch.manual_seed(0)
    batch, heads, tokens, width = shape
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    sizes = ((batch, tokens, many, heads, width) for many in (3, 3, 1))
    return [torch.randn(n, device=device, dtype=dtype).movedim(2, 0) for n in sizes]


def answers(way: Callable) -> Callable:
    """The function that gives values, their tangent, and the gradients for q, k and v as one."""

    def loss(values, along, gradient):
        def function(values):
            value = way(*values.transpose(2, 3)).transpose(1, 2)[None]
            return value, value

        _, slope, value = torch.func.jvp(function, (values,), (along,), has_aux=True)
        return (value * gradient).float().sum(), (value, slope.detach())

    def run(values, along, gradient):
        call = torch.func.grad(loss, has_aux=True)
        gradients, given = call(values, along, gradient)
        return *given, gradients

    return run


def off(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


def replayed(call: Callable) -> Callable:
    """The call as one CUDA graph, as it is part of one in a training step."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def timed(call: Callable, gpu: bool) -> tuple[float, float]:
    """The median of a call in ms, and the most memory it had in MiB."""
    wait = torch.cuda.synchronize if gpu else lambda: None
    for _ in range(3):
        call()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(CALLS):
        wait()
        begin = time.perf_counter()
        call()
        wait()
        taken.append(1000 * (time.perf_counter() - begin))
    most = torch.cuda.max_memory_allocated() / 2**20 if gpu else 0
    return statistics.median(taken), most


def plans(*shape: int) -> list[str]:
    """A line for each plan of the kernel alone: its time, and what it makes of its arithmetic."""
    from triton.runtime.errors import OutOfResources

    from difftrain.models.tangent_kernel import Plan, launch

    own, along, _ = drawn(shape, True)
    tensors = [*own.transpose(2, 3), *along.transpose(2, 3)]
    given = (*tensors, *fused(*tensors[:3]), torch.empty_like(tensors[0]))
    batch, heads, tokens, width = shape
    work = 10 * batch * heads * tokens**2 * width
    lines = [f"the kernel alone, {shape}: queries, keys, warps, stages"]
    for plan in PLANS:
        try:
            launch(*given, Plan(*plan))
        except OutOfResources:
            lines.append(f"{plan!s:20} does not fit")
            continue
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch(*given, Plan(*plan))
        taken, _ = timed(graph.replay, True)
        lines.append(f"{plan!s:20} {taken:7.3f} ms {work / taken / 1e9:7.0f} TFLOP/s")
    return lines


def _row(*cells: str) -> list[str]:
    widths = (26, 16, 8, 6, 6, 8, 8, 8)
    return [" ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))]


if __name__ == "__main__":
    main()
