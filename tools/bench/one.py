"""Measures one contender in a process of its own: python one.py TASK.json RESULT.json"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from threading import Thread, get_ident

import torch
from bench import gauge, ours
from bench.kernels import launches
from bench.latents import CLASSES
from peers.loop import FORMS, Loop
from peers.networks import NETWORKS

LOOK = 60  # seconds after which it says, again and again, where it is
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main(task: str, result: str) -> None:
    told = json.loads(Path(task).read_text())
    Thread(target=look, args=[get_ident()], daemon=True).start()
    found = ours_measured(told) if told["spec"] else peer_measured(told)
    rate = gauge.matmul_rate()
    if not math.isfinite(found["loss"]):
        raise ArithmeticError(f"the loss is {found['loss']} after {told['steps']} steps")
    worth = found["flops"] * told["passes"] * told["batch"] / found["seconds"]
    found |= {"matmul": rate, "share": worth / rate, "torch": torch.__version__}
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    Path(result).write_text(json.dumps(found))


def look(thread: int) -> None:
    """Says where a thread is, for the log of what is not done in time: compiling takes minutes.
    The watchdog of faulthandler reads the stack while it changes, and ended a run."""
    began = time.monotonic()
    while True:
        time.sleep(LOOK)
        stack = "".join(traceback.format_stack(sys._current_frames()[thread]))
        print(f"after {time.monotonic() - began:.0f} s:\n{stack}", file=sys.stderr, flush=True)


def ours_measured(told: Mapping) -> dict[str, object]:
    """The step of a spec."""
    batch = told["batch"]
    with ours.opened(told["spec"], told["settings"], batch, told["side"]) as session:
        flops = gauge.forward_flops(ours.forward(session, batch)) / batch
        found = {"flops": flops, **gauge.timed(ours.stepping(session, batch), told["steps"])}
        return found | ({"update": updates(session)} if told["update"] else {})


def updates(session: ours.Session) -> int:
    """The kernels of what a step does with its gradient."""
    update = ours.updating(session)
    update()
    return launches(gauge.kernels(update))


def peer_measured(told: Mapping) -> dict[str, object]:
    """The step of a peer, on inputs in its precision."""
    batch, side, precision = told["batch"], told["side"], DTYPES[told["precision"]]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        network, call = NETWORKS[told["network"]](**told["sizes"], side=side)
        latents = torch.randn(batch, 4, side, side, dtype=precision)
        classes = torch.randint(0, CLASSES, (batch,))
        cond = torch.randn(batch, 77, 768, dtype=precision) if told["family"] == "unet" else classes
    form = FORMS[told["form"]]
    x = latents.to(memory_format=torch.channels_last) if form.channels_last else latents
    times = torch.zeros(batch, dtype=torch.int64, device=device)
    seen = (latents.float(), times, cond if cond.dtype == torch.int64 else cond.float())
    flops = gauge.forward_flops(lambda: call(network, *seen)) / batch
    loop = Loop(network, call, form, precision)
    found = gauge.timed(lambda: loop.step(x, cond, told["dream"]), told["steps"])
    inside = gauge.kernels(lambda: loop.backbone(x, cond))
    outside = launches(found["kernels"]) - launches(inside)
    return {"flops": flops, "outside": outside, **found}


if __name__ == "__main__":
    main(*sys.argv[1:])
