"""Training: from a bundle to a run folder with checkpoints and sample grids."""

from __future__ import annotations

import gc
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from difftrain.training import averages, evaluate, samples, state
from difftrain.training.batches import Batches
from difftrain.training.bundle import Bundle, compile_spec
from difftrain.training.captions import SHARE
from difftrain.training.keeping import Keeping
from difftrain.training.latents import Prepared
from difftrain.training.own import importable
from difftrain.training.session import Session, open_session, say
from difftrain.training.stepper import Stepper, feeding

KEPT_EVERY = "snapshots_every"
REPORTED = ("log_every", "save_every", KEPT_EVERY)  # what a run keeps, it has looked at


class RunFailed(Exception):
    """A run that cannot go on; the message names what was saved."""


def train(
    path: str | Path,
    settings: Mapping[str, str] | None = None,
    *,
    data: str | None = None,
    steps: int | None = None,
    resume: str | None = None,
    out: str | None = None,
) -> int:
    """Compiles a spec file and trains it in this process. The exit code."""
    started = time.perf_counter()
    bundle = compile_spec(path, settings)
    say(f"compiled `{bundle.name}` in {time.perf_counter() - started:.1f} s")
    return run(bundle, data=data, steps=steps, resume=resume, out=out, started=started)


def run(
    bundle: Bundle,
    settings: Mapping[str, str] | None = None,
    *,
    data: str | None = None,
    steps: int | None = None,
    resume: str | None = None,
    out: str | None = None,
    started: float | None = None,
    keeping: Keeping | None = None,
) -> int:
    """Trains a bundle: the same for `difftrain train` and for an executable. The exit code."""
    try:
        with importable(bundle.texts):
            session = open_session(bundle, settings or {}, data, steps, resume, out, started)
            session.keeping = keeping or session.keeping
            loop(session)
            finish(session)
    finally:
        gc.unfreeze()  # what was there as torch's compiler was loaded
    return 0


# ---- the loop


def loop(session: Session) -> None:
    """Steps until done. Everything a step changes is a tensor of the state."""
    from torch.utils.tensorboard import SummaryWriter

    first, seed = session.done, int(session.state["seed"])
    size, home = session.data["batch"], _home(session.prepared, session.device)
    batches = Batches(session.prepared, seed, size, first, notes=False, device=home)
    fixed = (session.parts.modules, session.parts.plan, session.programs.tables["step"])
    step, feed = Stepper(session), feeding(session)
    bar = tqdm(total=session.steps, initial=first, unit="step", file=sys.stderr, dynamic_ncols=True)
    with bar, SummaryWriter(str(session.folder / "log"), purge_step=first + 1) as board:
        for done, batch in zip(range(first + 1, session.steps + 1), batches, strict=False):
            log = _stepped(session, step, feed(batch), fixed)
            bar.update()
            due = {option for option in REPORTED if _due(session, done, option)}
            if due:
                _report(session, bar, board, done, log)
            if "save_every" in due:
                save(session, done)
            if KEPT_EVERY in due:
                snapshot(session, done)
            if _due(session, done, "sample_every") and done < session.steps:
                grid(session, done)


def _stepped(session: Session, step: Stepper, batch: dict, fixed: tuple) -> dict[str, Tensor]:
    """What one step logs."""
    with _memory(session, "", SMALLER):
        return step(session.state, batch, *fixed)


@contextmanager
def _memory(session: Session, when: str, advice: str) -> Iterator[None]:
    """Raises RunFailed where the memory is full."""
    try:
        yield
    except torch.OutOfMemoryError as cause:
        raise RunFailed(_stopped(session, f"the memory is full{when}", advice)) from cause


def _due(session: Session, done: int, option: str) -> bool:
    """Whether something happens after this step: every so many (0 is never), and at the end, where
    snapshots are only taken of runs that want some."""
    every = session.train[option]
    if not every:
        return done == session.steps and option != KEPT_EVERY
    return done == session.steps or done % every == 0


SMALLER = "try a smaller `data.batch`"
FEWER = "draw fewer with `sample.count`, or try a smaller `data.batch`"
SLOWER = "try a smaller learning rate"


def _stopped(session: Session, why: str, advice: str) -> str:
    kept = state.newest(session.folder)
    saved = f"the last checkpoint is {kept}" if kept else "no checkpoint had been written"
    return f"{why}, so the run stops: {saved}; {advice}"


def _home(data: Prepared, device: torch.device) -> torch.device:
    """Where the encoded data are kept: beside the network, if they are small there."""
    states = data.states and data.states.table
    held = [v for v in (data.latents, data.images, states) if v is not None]
    if device.type != "cuda" or not held:
        return torch.device("cpu")
    free, _ = torch.cuda.mem_get_info(device)
    small = sum(v.nbytes for v in held) * SHARE < free
    return device if small else torch.device("cpu")


def _report(session: Session, bar: tqdm, board, done: int, log: Mapping[str, Tensor]) -> None:
    """Writes the numbers of a step. What is not finite ends the run before it could be saved."""
    numbers = {name: value.item() for name, value in log.items()}
    for name in ("loss",) if "scale" in log else ("loss", "gradient"):
        if not math.isfinite(numbers[name]):
            why = f"the {name} is {numbers[name]} at step {done}"
            raise RunFailed(_stopped(session, why, SLOWER))
    for name, value in numbers.items():
        board.add_scalar(name, value, done)
    rate = bar.format_dict["rate"] or 0.0
    bar.set_postfix_str(f"loss {numbers['loss']:.4f}, {rate * session.data['batch']:.0f} samples/s")


def save(session: Session, done: int) -> Path:
    """A checkpoint of this step; older ones than `keep` go."""
    path = session.folder / "checkpoints" / f"step-{done:09d}.safetensors"
    state.save(path, session.state, session.parts.plan, _facts(session, done), session.parts.kept)
    state.forget(session.folder, session.train["keep"])
    return path


def snapshot(session: Session, done: int) -> Path:
    """The averages of this step, kept for good."""
    facts, parts = _facts(session, done), session.parts
    return averages.keep(
        session.folder, session.state, parts.plan, facts, parts.kept, session.averages
    )


def _facts(session: Session, done: int) -> dict[str, object]:
    """What a file of weights says of itself."""
    facts = {k: session.bundle.manifest[k] for k in ("name", "spec", "graph", "network")}
    return {**facts, "step": str(done), **session.parts.known.facts}


# ---- showing


def prompts(session: Session) -> list[str]:
    """What is drawn: the declared prompts, or captions, first those that training has not seen."""
    sets = [p.pictures for p in (session.unseen, session.prepared) if p is not None]
    return samples.declared(session.sample) or samples.captions(session.sample["count"], *sets)


def grid(session: Session, done: int) -> Path:
    """A file of samples from the averaged weights."""
    model = samples.Model(
        session.bundle, session.programs, session.parts, session.state["average"], done
    )
    path = session.folder / "samples" / f"step-{done:09d}{samples.ending(session.data)}"
    with _memory(session, " while samples are drawn", FEWER):
        return samples.draw(model, session.sample, session.data["size"], prompts(session), path)


def finish(session: Session) -> None:
    """The last grid, the losses on unseen data, and where everything lies."""
    if state.newest(session.folder) is None:  # a run of no steps is kept as well
        save(session, session.done)
    path = grid(session, session.done)
    if session.unseen is None:
        say("no losses on unseen pictures: the data have no held-out split to validate on")
    else:
        _validate(session, session.unseen)
    last = (session.folder / "samples").with_suffix(path.suffix)
    shutil.copyfile(path, last)
    say(f"{time.perf_counter() - session.started:.0f} s in all; look at {last}")


def _validate(session: Session, unseen: Prepared) -> None:
    with _memory(session, " while losses on unseen data are computed", SMALLER):
        result = evaluate.validate(session.programs, session.parts, session.state, unseen)
    say(str(result))
    known = {name: None if value != value else value for name, value in vars(result).items()}
    written = json.dumps(known, indent=2) + "\n"
    (session.folder / "validation.json").write_text(written, encoding="utf-8")
