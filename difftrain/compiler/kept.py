"""What torch made of a step, as bytes: taken out of a process that compiled it, given to one that
has not.

The bytes are entries of torch's own compile caches, by the keys that torch finds them under. torch
reads what is in an entry with pickle, so bytes are as much to be trusted as a program: they are
given to torch only out of the executable that is being run, and only unchanged.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from torch._dynamo.utils import counters

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


def take() -> bytes:
    """Everything that this process compiled or found compiled. Raises NotKept."""
    made = torch.compiler.save_cache_artifacts()
    if made is None:
        raise NotKept("torch keeps nothing of what it compiles: its caches are turned off here")
    return made[0]


def give(data: bytes) -> None:
    """Puts what another process took into the caches of this one."""
    torch.compiler.load_cache_artifacts(data)


def found() -> bool:
    """Whether all that this process asked torch to compile was found in its caches."""
    graphs, steps = counters["inductor"], counters["aot_autograd"]
    missed = (graphs["fxgraph_cache_miss"], graphs["fxgraph_cache_bypass"])
    missed += (steps["autograd_cache_miss"], steps["autograd_cache_bypass"])
    return graphs["fxgraph_cache_hit"] > 0 and not any(missed)
