"""The step that a user gets: a spec compiled, opened and run as `difftrain train` does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from bench.latents import write_data
from torch import Tensor

from difftrain.compiler import lowering
from difftrain.training.batches import Batches
from difftrain.training.bundle import compile_spec
from difftrain.training.own import importable
from difftrain.training.session import Session, open_session
from difftrain.training.stepper import Stepper, feeding

SPECS = Path(__file__).parent
MANY = 1_000_000  # steps, so that none is the last one


@contextmanager
def opened(spec: str, settings: Mapping[str, str], batch: int, side: int) -> Iterator[Session]:
    """A run of a spec of this folder, on random latents, that is about to make its first step."""
    bundle = compile_spec(SPECS / f"{spec}.diff", settings)
    with TemporaryDirectory() as folder, chdir(folder), importable(bundle.texts):
        write_data(Path(folder), batch, side)
        yield open_session(bundle, {}, None, MANY, None, str(Path(folder, "run")), None)


def stepping(session: Session, batch: int) -> Callable[[], Tensor]:
    """A function that makes one step on a batch that lies on the device, and gives the loss."""
    parts = session.parts
    fed = feeding(session)(Batches(session.prepared, 0, batch).at(0))
    fixed = (parts.modules, parts.plan, session.programs.tables["step"])
    step = Stepper(session)
    return lambda: step(session.state, fed, *fixed)["loss"]


def forward(session: Session, batch: int) -> Callable[[], object]:
    """The network's forward alone."""
    parts, device = session.parts, session.device
    x = session.prepared.latents[:batch].to(device)
    texts = [record.caption for record in session.prepared.pictures.records[:batch]]
    cond = parts.text(parts.text.ids(texts).to(device))
    further = session.bundle.read().objective().backbone.interface.times[1:]
    t = x.new_zeros(len(x))
    extra = {name.rpartition(".")[2]: t for name in further}
    return lambda: parts.modules["student"](x, t, cond, **extra)


def updating(session: Session) -> Callable[[], None]:
    """What a step does with its gradient, compiled: the norm, clipping, AdamW and the average."""
    plan, whole = session.parts.plan, session.programs.step.step
    parts = tuple(map(torch.ones_like, plan.buffers(session.state)))
    update = lowering.compiled(whole).update
    return lambda: update(session.state, parts)
