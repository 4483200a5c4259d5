"""Training: from a bundle to a run folder with checkpoints and sample grids."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from difftrain.compiler import lowering
from difftrain.language.options import Run
from difftrain.sampling.pictures import grid_png
from difftrain.training import evaluate, state
from difftrain.training.batches import Batches
from difftrain.training.bundle import Bundle, block, compile_spec
from difftrain.training.latents import Prepared
from difftrain.training.parts import Parts, build_parts, encoded, held_out, pictures
from difftrain.training.sources import Pictures

TRIAL = 3  # uncompiled steps that are timed before `auto` decides on a CPU
RUNTIME = {  # what may be set without compiling again
    "data": ("source", "size", "batch", "captions"),
    "train": (
        "steps", "compile", "resume_from", "seed", "save_every", "sample_every", "log_every", "keep",
    ),
    "sample": ("solver", "guidance", "prompts", "count", "seed"),
}  # fmt: skip


class RunFailed(Exception):
    """A run that cannot go on; the message names what was saved."""


def say(line: str) -> None:
    """One line for the person who waits, beside the progress bar."""
    tqdm.write(line, file=sys.stderr)


@dataclass(eq=False)
class Session:
    """Everything of one run."""

    bundle: Bundle
    folder: Path
    data: Run
    train: Run
    sample: Run
    parts: Parts
    programs: evaluate.Programs
    prepared: Prepared
    unseen: Prepared | None
    state: dict[str, Tensor]
    steps: int
    started: float
    written: list[Path] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.state["weights"].device


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
) -> int:
    """Trains a bundle: the same for `difftrain train` and for an executable. The exit code."""
    session = open_session(bundle, settings or {}, data, steps, resume, out, started)
    loop(session)
    finish(session)
    return 0


# ---- opening


def open_session(bundle, settings, data, steps, resume, out, started) -> Session:
    """Builds data, modules and state, from the beginning or from a checkpoint."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = bundle.read(settings)
    objective = spec.objective()
    options = {kind: block(spec, kind) for kind in ("data", "train", "sample")}
    seen, unseen = pictures(options["data"], "train", data), held_out(options["data"], data)
    parts = build_parts(objective, _vocabulary(objective, seen, unseen), options["train"]["seed"], device)
    steps = steps if steps is not None else options["train"]["steps"]
    current = state.fresh(parts.weights, options["train"]["seed"], steps)
    folder, checkpoint = _place(bundle.name, resume or options["train"]["resume_from"], out)
    size, cache = options["data"]["size"], folder.parent / ".latents"
    prepared = encoded(seen, parts, size, cache, device, say)
    other = encoded(unseen, parts, size, cache, device, say) if unseen else None
    if checkpoint is not None:
        state.load(checkpoint, current, parts.plan, bundle.manifest["graph"])
        say(f"resumed at step {int(current['turn'])} from {checkpoint}")
    _write_texts(folder, bundle)
    say(f"training `{bundle.name}` on {seen!r}: {parts.plan.size:,} weights, {device}, in {folder}")
    made = evaluate.programs(bundle, device)
    return Session(
        bundle, folder, options["data"], options["train"], options["sample"], parts, made, prepared,
        other, current, steps, started or time.perf_counter(),
    )  # fmt: skip


def _vocabulary(objective, seen: Pictures, unseen: Pictures | None) -> list[int]:
    """The token ids in use in a data set."""
    from difftrain.models.tokenizer import clip_tokenizer

    texts = [*seen.texts, *(unseen.texts if unseen else ())]
    return clip_tokenizer().used(texts)


def _place(name: str, resume: str, out: str | None) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint to go on from. A new run never touches an old folder."""
    home = Path("runs")
    if resume == "auto":
        folder = Path(out) if out else _last(home, name)
        return folder, state.newest(folder)
    if resume:
        path = Path(resume)
        checkpoint = state.newest(path) if path.is_dir() else path
        if checkpoint is None:
            raise state.CheckpointError(f"the folder `{path}` has no checkpoint to resume from")
        return Path(out) if out else checkpoint.parent.parent, checkpoint
    return (Path(out) if out else _free(home, name)), None


def _free(home: Path, name: str) -> Path:
    taken = {p.name for p in home.glob(f"{name}*")} if home.is_dir() else set()
    number = 1
    while (name if number == 1 else f"{name}-{number}") in taken:
        number += 1
    return home / (name if number == 1 else f"{name}-{number}")


def _last(home: Path, name: str) -> Path:
    """The newest folder of that name with a checkpoint, or the next free one."""
    found = [p for p in home.glob(f"{name}*") if state.newest(p)] if home.is_dir() else []
    return max(found, key=lambda p: state.newest(p).stat().st_mtime, default=_free(home, name))


def _write_texts(folder: Path, bundle: Bundle) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in bundle.files().items():
        (folder / name).write_text(text, encoding="utf-8")


# ---- the loop


def loop(session: Session) -> None:
    """Steps until done. Everything a step changes is a tensor of the state."""
    from torch.utils.tensorboard import SummaryWriter

    first = int(session.state["turn"])
    seed, batch_size = session.train["seed"], session.data["batch"]
    batches = Batches(session.prepared, seed, batch_size, first, notes=False)
    null_ids = session.parts.null_ids(session.device)
    fixed = (session.parts.modules, session.parts.plan, session.programs.tables["step"])
    step = Stepper(session)
    bar = tqdm(total=session.steps, initial=first, unit="step", file=sys.stderr, dynamic_ncols=True)
    with bar, SummaryWriter(str(session.folder / "log")) as board:
        for done, batch in zip(range(first + 1, session.steps + 1), batches, strict=False):
            log = step(session.state, _feed(session, batch, null_ids), *fixed)
            bar.update()
            if done % session.train["log_every"] == 0 or done == session.steps:
                _report(session, bar, board, done, log)
            _at_intervals(session, done)


class Stepper:
    """The step as this machine runs it best, chosen once: compiled or not, replayed on a GPU.

    On a CPU `auto` first times a few steps as they are.
    """

    def __init__(self, session: Session):
        self.session, self.step = session, session.programs.step.step
        self.calls, self.started = 0, time.perf_counter()
        self.undecided = session.train["compile"] == "auto" and session.device.type == "cpu"
        if not self.undecided or lowering.cxx() is None:
            self._decide(None)

    def __call__(self, *args) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == TRIAL + 1 and self.undecided:
            self._decide((time.perf_counter() - self.started) / TRIAL)
        elif self.calls == 2 * TRIAL + 1:
            lowering.no_more_compiling()
        return self.step(*args)

    def _decide(self, seconds: float | None) -> None:
        session, self.undecided = self.session, False
        left = session.steps - int(session.state["turn"])
        choice = lowering.choose(session.train["compile"], session.device.type, left, seconds)
        say(choice.because)
        self.step = lowering.compiled(self.step) if choice.compiled else self.step
        if session.device.type == "cuda":
            self.step = lowering.Replayed(self.step)


def _feed(session: Session, batch: dict, null_ids: Tensor | None) -> dict[str, Tensor]:
    """What the step reads of a batch, on the device."""
    names = {"latents": "x0", "index": "index", "input_ids": "input_ids"}
    fed = {ours: batch[name].to(session.device) for name, ours in names.items() if name in batch}
    return fed if null_ids is None else {**fed, "null_ids": null_ids}


def _report(session: Session, bar: tqdm, board, done: int, log: Mapping[str, Tensor]) -> None:
    numbers = {name: value.item() for name, value in log.items()}
    if numbers["loss"] != numbers["loss"] or numbers["loss"] in (float("inf"), float("-inf")):
        raise RunFailed(_not_finite(session, done, numbers["loss"]))
    for name, value in numbers.items():
        board.add_scalar(name, value, done)
    rate = bar.format_dict["rate"] or 0.0
    bar.set_postfix_str(f"loss {numbers['loss']:.4f}, {rate * session.data['batch']:.0f} img/s")


def _not_finite(session: Session, done: int, loss: float) -> str:
    kept = state.newest(session.folder)
    saved = f"the last checkpoint is {kept}" if kept else "no checkpoint had been written"
    return f"the loss is {loss} at step {done}, so the run stops: {saved}; try a smaller learning rate"


def _at_intervals(session: Session, done: int) -> None:
    last = done == session.steps
    if last or (session.train["save_every"] and done % session.train["save_every"] == 0):
        save(session, done)
    if not last and session.train["sample_every"] and done % session.train["sample_every"] == 0:
        grid(session, done)


def save(session: Session, done: int) -> Path:
    """A checkpoint of this step; older ones than `keep` go."""
    path = session.folder / "checkpoints" / f"step-{done:09d}.safetensors"
    facts = {**{k: session.bundle.manifest[k] for k in ("name", "spec", "graph")}, "step": str(done)}
    state.save(path, session.state, session.parts.plan, facts)
    state.forget(session.folder, session.train["keep"])
    return path


# ---- showing


def prompts(session: Session) -> list[str]:
    """What is drawn: the declared prompts, or captions that training has not seen."""
    declared = list(session.sample["prompts"])
    source = session.unseen or session.prepared
    captions = [record.caption for record in source.pictures.records]
    spread = captions[:: max(1, len(captions) // session.sample["count"])]
    return (declared or spread)[: session.sample["count"]]


def grid(session: Session, done: int) -> Path:
    """A grid of samples from the averaged weights."""
    texts = prompts(session)
    images = evaluate.sample(
        session.bundle, session.programs, session.parts, session.state["average"], session.sample,
        texts, session.data["size"],
    )  # fmt: skip
    path = session.folder / "samples" / f"step-{done:09d}.png"
    path.parent.mkdir(exist_ok=True)
    columns = min(8, max(1, round(len(texts) ** 0.5)))
    grid_png(path, images, columns, texts, _settings(session, done))
    return path


def _settings(session: Session, done: int) -> dict[str, object]:
    solver = session.sample["solver"]
    return {
        "spec": session.bundle.manifest["spec"],
        "step": done,
        "solver": f"{solver.module} {dict(solver.options)}",
        "guidance": session.sample["guidance"],
        "seed": session.sample["seed"],
    }


def finish(session: Session) -> None:
    """The last grid, the losses on unseen pictures, and where everything lies."""
    done = int(session.state["turn"])
    path = grid(session, done)
    if session.unseen is not None:
        tokens = session.unseen.tokens
        captions = [r.caption for r in session.unseen.pictures.records]
        ids = tokens(captions) if tokens else None
        result = evaluate.validate(
            session.programs, session.parts, session.state["average"], session.unseen.latents, ids
        )
        say(str(result))
        (session.folder / "validation.json").write_text(json.dumps(vars(result), indent=2) + "\n")
    last = session.folder / "samples.png"
    shutil.copyfile(path, last)
    say(f"{time.perf_counter() - session.started:.0f} s in all; look at {last}")


