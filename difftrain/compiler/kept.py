"""A compiled step as bytes: taken out of a process that compiled it, given to one that has not.

What comes back needs no tracing. torch reads such bytes with pickle, so they are as much to be
trusted as a program: they are only read out of the executable that is being run, and only
unchanged.
"""

from __future__ import annotations

import gc
import io
import os
import platform
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from difftrain.compiler import random
from difftrain.compiler.executable import FIXED_TIME
from difftrain.compiler.lowering import compiler, compiling
from difftrain.compiler.whole import Step

FUNCTIONS = ("gradient", "update")
COMPILER = ("torch._dynamo.aot_compile", "torch._inductor.compile_fx")  # what reading imports
BINARIES = "TRITON_STORE_BINARY_ONLY"  # and none of the texts that a kernel goes through
Facts = dict[str, object]  # what a compiled step is only good for


class NotKept(Exception):
    """A compiled step that torch cannot hand out."""


def machine(device: torch.device) -> Facts:
    """What a compiled step depends on beside its own text and shapes."""
    major, minor, _ = platform.python_version_tuple()
    facts: Facts = {"torch": torch.__version__, "triton": _triton(), "python": f"{major}.{minor}"}
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return facts | {"device": torch.cuda.get_device_name(device), "capability": capability}
    able, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return facts | {"device": platform.machine(), "capability": able, "threads": threads}


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def load(device: torch.device) -> None:
    """Imports torch's compiler, which steps are compiled and read by; a GPU wakes meanwhile, as
    neither waits for the other."""
    with ThreadPoolExecutor(1) as beside:
        woken = beside.submit(_wake, device)
        with _uncollected():
            for name in COMPILER:
                import_module(name)
        woken.result()


@contextmanager
def _uncollected() -> Iterator[None]:
    """In it no garbage is looked for, which is a third of the time that importing much takes; and
    later not among what was there, until `gc.unfreeze`."""
    before = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if before:
            gc.enable()


def _wake(device: torch.device) -> None:
    """Does on a device what its first product and its first draw wait for: a context, libraries,
    the kernel of draws."""
    index, one = torch.zeros(1, dtype=torch.int64, device=device), torch.ones(8, 8, device=device)
    random.bits("wake", index[0], index[0], index, 4)
    torch.mm(one, one)


def compiled(step: Step, args: tuple, forward: bool = False) -> Step:
    """The step compiled for arguments like these, and for no others: it looks at none again.
    Raises NotCompiled."""
    state, plan = args[0], args[3]
    parts = tuple(map(torch.empty_like, plan.buffers(state)))
    calls = ((step.gradient, (plan.read(state), *args)), (step.update, (state, parts)))
    through = compiler(forward, guard_filter_fn=lambda guards: [False] * len(guards))
    with compiling(), torch._dynamo.config.patch(enable_aot_compile=True), _binaries():
        return Step(*(through(function).aot_compile((given, {})) for function, given in calls))


@contextmanager
def _binaries() -> Iterator[None]:
    """In it, Triton keeps of each kernel only what runs it."""
    before = os.environ.get(BINARIES)
    os.environ[BINARIES] = "1"
    try:
        yield
    finally:
        os.environ.pop(BINARIES)
        os.environ |= {BINARIES: before} if before is not None else {}


def take(step: Step, outside: Mapping[str, object]) -> bytes:
    """The bytes of a `compiled` step; the objects `outside` are not in them. Raises NotKept."""
    with io.BytesIO() as data:
        with zipfile.ZipFile(data, "w") as archive:
            for name in FUNCTIONS:
                entry = zipfile.ZipInfo(name, FIXED_TIME)
                archive.writestr(entry, _taken(getattr(step, name), outside))
        return data.getvalue()


def _taken(function: Callable, outside: Mapping[str, object]) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder, "function")
        try:
            function.save_compiled_function(str(path), external_data=dict(outside))
        except RuntimeError as cause:
            reason = str(cause).partition("\n")[0]
            raise NotKept(f"torch cannot hand out this compiled step ({reason})") from cause
        return path.read_bytes()


def give(data: bytes, step: Step, outside: Mapping[str, object], device: torch.device) -> Step:
    """The step that was taken, with the like of what was outside it then."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive, _alone(device):
        return Step(*(_given(archive.read(n), getattr(step, n), outside) for n in FUNCTIONS))


def _given(data: bytes, function: Callable, outside: Mapping[str, object]) -> Callable:
    return torch.compiler.load_compiled_function(
        io.BytesIO(data), f_globals=function.__globals__, external_data=dict(outside)
    )


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """In it, torch starts no processes that would compile a GPU's kernels, which are there; those
    of a CPU are compiled again, by as many compilers at a time as there are threads."""
    changed = {"compile_threads": 1} if device.type == "cuda" else {}
    with torch._inductor.config.patch(changed):
        yield


def outside(modules: Mapping[str, nn.Module], plan: object) -> dict[str, object]:
    """What a step is called with that is no tensor, by names that are the same in every run."""
    parts = {f"{n}.{path}": m for n, top in modules.items() for path, m in top.named_modules()}
    return {**parts, "plan": plan}


def found() -> bool:
    """Whether all that this process compiled was found in the caches of this machine."""
    counters = torch._dynamo.utils.counters
    graphs, steps = counters["inductor"], counters["aot_autograd"]
    missed = (graphs["fxgraph_cache_miss"], graphs["fxgraph_cache_bypass"])
    missed += (steps["autograd_cache_miss"], steps["autograd_cache_bypass"])
    return graphs["fxgraph_cache_hit"] > 0 and not any(missed)
