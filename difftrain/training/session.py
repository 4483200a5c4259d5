"""A run that is about to make its next step: data, modules and state, new or from a checkpoint."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from difftrain.compiler import kept, lowering
from difftrain.language.options import Run
from difftrain.language.spec import Objective
from difftrain.training import averages, evaluate, samples, state
from difftrain.training.bundle import Bundle, block, each_part, recipe, step_inputs, text_part
from difftrain.training.folder import begun, place
from difftrain.training.keeping import Keeping
from difftrain.training.known import Known, found, told
from difftrain.training.latents import Prepared
from difftrain.training.parts import (
    Parts,
    build_parts,
    condition_field,
    copy_of,
    encoded,
    held_out,
    opened,
)
from difftrain.training.start import begin, inherited, try_out


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
    averages: averages.Widths
    state: dict[str, Tensor]
    steps: int
    started: float
    keeping: Keeping = Keeping()

    @property
    def device(self) -> torch.device:
        return self.state["weights"].device

    @property
    def done(self) -> int:
        """Completed steps."""
        return int(self.state["turn"])


def open_session(
    bundle: Bundle,
    settings: Mapping[str, str],
    data: str | None,
    steps: int | None,
    resume: str | None,
    out: str | None,
    started: float | None,
) -> Session:
    """Builds data, modules and state, from the beginning or from a checkpoint.

    Whatever is wrong is found before anything is written.
    """
    started = started or time.perf_counter()
    spec = bundle.read(settings)
    options = {kind: block(spec, kind) for kind in ("data", "train", "sample")}
    train, device = options["train"], lowering.device(options["train"]["device"])
    _possible(bundle, train, options["sample"], device)
    folder, checkpoint, new = place(bundle, resume or train["resume_from"], out)
    objective, widths = spec.objective(), averages.tracked(recipe(spec))
    condition = condition_field(objective)
    seen = opened(options["data"], "train", condition, data)
    unseen = held_out(options["data"], condition, data)
    known = _known(bundle, objective, train, checkpoint, seen, unseen)
    if lowering.choose(train["compile"], device.type, 0, None).compiled:
        kept.load(device)
    parts = _parts(objective, known, options, device)
    begin(objective, parts, train, bool(checkpoint), say)
    prepare = _preparing(objective, parts, options["data"], folder, device)
    steps = steps if steps is not None else train["steps"]
    current = _state(bundle, parts, widths, train, steps, checkpoint)  # has the encoder's weights
    prepared = prepare(seen, ahead=state.FORWARDS[train["precision"]])
    other = prepare(unseen) if unseen else None
    try_out(objective, parts, prepared, bundle.manifest["time"][0] == "index")
    begun(folder, bundle.texts, new)
    say(f"training `{bundle.name}` on {seen!r}: {parts.plan.size:,} weights, {device}, in {folder}")
    _doubts(objective, parts, train, widths)
    return Session(
        bundle=bundle,
        folder=folder,
        **options,
        parts=parts,
        programs=evaluate.programs(bundle, device),
        prepared=prepared,
        unseen=other,
        averages=widths,
        state=current,
        steps=steps,
        started=started,
    )


def _parts(
    objective: Objective, known: Known, options: Mapping[str, Run], device: torch.device
) -> Parts:
    """The modules; words of a prompt that they do not know are told now, not at the end."""
    train, size = options["train"], options["data"]["size"]
    products = train["products"]
    parts = build_parts(objective, known, train["seed"], device, size=size, products=products)
    if parts.text is not None:
        parts.text.ids(options["sample"]["prompts"])
    return parts


def _preparing(objective: Objective, parts: Parts, data: Run, folder: Path, device) -> Callable:
    """What makes a data set ready for the step."""
    cache, images = folder.parent / ".latents", step_inputs(objective).image
    return partial(
        encoded, parts=parts, size=data["size"], cache=cache, device=device, say=say, images=images
    )


def _possible(bundle: Bundle, train: Run, sample: Run, device: torch.device) -> None:
    """Refuses at once what would be refused after hours."""
    samples.fits(bundle, sample["solver"])
    samples.guiding(bundle, sample)
    if train["compile"] == "on":
        lowering.choose("on", device.type, 0, None)


def _known(bundle, objective, train: Run, checkpoint: Path | None, seen, unseen) -> Known:
    """What the modules take from the data: as a checkpoint has it, this run's or the one that it
    begins from, or as the data are."""
    if checkpoint:
        return told(state.facts(checkpoint, bundle.manifest["graph"]))
    return inherited(train, found(text_part(objective), seen, unseen))


def _state(
    bundle: Bundle, parts: Parts, widths, train: Run, steps: int, checkpoint: Path | None
) -> dict[str, Tensor]:
    names = [*(copy_of(name) for name in parts.averages), *widths]
    current = state.fresh(parts.weights, train["seed"], steps, names, train["precision"])
    if checkpoint:
        state.load(checkpoint, current, parts.plan, bundle.manifest["graph"], parts.kept)
        say(f"resumed at step {int(current['turn'])} from {checkpoint}")
        if other := state.apart(checkpoint, bundle.manifest):
            name, theirs, ours = other
            say(f"its network had `{name} = {theirs}`, and goes on with `{name} = {ours}`")
    return current


def _doubts(objective: Objective, parts: Parts, train: Run, widths: averages.Widths) -> None:
    """Says what is probably not meant."""
    encoders = each_part(text_part(objective))
    trained = [part for part in encoders if part.options.get("train")]
    if parts.kept and not (train["start_from"] or train["teacher"]):
        say(
            "warning: the text encoder is random and stays so: give it `weights`, or `train = true`"
        )
    if "teacher" in parts.modules and trained:
        say(
            "warning: the text encoder is trained, and the teacher reads what it makes: with"
            " `train = false` it stays as the teacher knew it"
        )
    if train["snapshots_every"] and not any(widths.values()):
        say(
            "warning: no average is a power function of the step, so nothing can be made of their"
            " snapshots: write `ema = [ema_power(0.05), ema_power(0.10)]`"
        )
