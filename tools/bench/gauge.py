"""Measuring: the time of a step, its kernels, its memory, and what the machine can do at best."""

from __future__ import annotations

import os
import resource
import signal
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench.crew import TURN
from bench.kernels import Kernels
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

SIDE, PRODUCTS = 8192, 20  # of the matrix products that the machine's rate is taken from
WARM_UP = 8  # steps before any is timed; a graph is recorded in them
BLOCK = 5  # steps that are timed together


def wait() -> None:
    """Until the device has done everything."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alone() -> None:
    """Until this process has its GPU for itself, where others run beside it: see `bench.crew`."""
    wait()
    while TURN in os.environ and not Path(os.environ[TURN]).exists():
        os.kill(os.getpid(), signal.SIGSTOP)


def matmul_rate(side: int = SIDE) -> float:
    """FLOP/s of products of two square bf16 matrices on the GPU; fp32 ones of 1024 on a CPU."""
    gpu = torch.cuda.is_available()
    side, dtype = (side, torch.bfloat16) if gpu else (1024, torch.float32)
    a, b = torch.randn(2, side, side, device="cuda" if gpu else "cpu", dtype=dtype)
    for _ in range(3):
        a @ b
    seconds = []
    for _ in range(PRODUCTS):
        wait()
        started = time.perf_counter()
        a @ b
        wait()
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / statistics.median(seconds)


def forward_flops(forward: Callable[[], object]) -> int:
    """The arithmetic of a call, 2 for each multiply-add."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


def kernels(work: Callable[[], object]) -> Kernels:
    """What a call launches, nothing on a CPU."""
    if not torch.cuda.is_available():
        work()
        return {}
    wait()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        wait()
    found: dict[str, tuple[int, float]] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name[:3] != "Mem":
            count, spent = found.get(event.name, (0, 0.0))
            found[event.name] = (count + 1, spent + event.device_time)
    return found


def compilations() -> int:
    """Graphs that torch compiled so far."""
    return counters["stats"]["unique_graphs"]


def cache_hits() -> dict[str, int]:
    """What torch's caches of compiled code said."""
    each = {**counters["inductor"], **counters["aot_autograd"]}
    kinds = ("_cache_hit", "_cache_miss", "_cache_bypass")
    return {name: count for name, count in each.items() if name.endswith(kinds)}


def held() -> dict[str, float]:
    """GB in use now, as `memory`; of a process on a CPU what it used at most so far."""
    if not torch.cuda.is_available():
        return memory()
    now = {"allocated": torch.cuda.memory_allocated, "reserved": torch.cuda.memory_reserved}
    return {name: use() / 1e9 for name, use in now.items()}


def memory() -> dict[str, float]:
    """The greatest use so far in GB: `allocated` by tensors and `reserved` from the GPU, or the
    resident set of a process on a CPU."""
    if not torch.cuda.is_available():
        return {"allocated": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    held = {
        "allocated": torch.cuda.max_memory_allocated,
        "reserved": torch.cuda.max_memory_reserved,
    }
    return {name: most() / 1e9 for name, most in held.items()}


def timed(step: Callable[[], torch.Tensor], steps: int) -> dict[str, object]:
    """What a step takes, when the first one began and ended, and the kernels of the third. From
    the second step on this process is alone on its GPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.monotonic()
    step()
    wait()
    ended, hits = time.monotonic(), cache_hits()
    alone()
    step()
    launched = kernels(step)
    for _ in range(WARM_UP - 3):
        step()
    known, seconds = compilations(), []
    for _ in range(max(1, round(steps / BLOCK))):
        wait()
        started = time.perf_counter()
        for _ in range(BLOCK):
            loss = step()
        wait()
        seconds.append((time.perf_counter() - started) / BLOCK)
    return {
        "first": [began, ended],
        "hits": hits,
        "seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
        "kernels": launched,
        "recompiled": compilations() - known,
        "loss": float(loss),
        **memory(),
    }
