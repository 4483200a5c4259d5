"""Files of samples: of a run while it trains, and of its checkpoints afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from torch import Tensor

from difftrain.compiler import lowering
from difftrain.language.options import Run
from difftrain.language.part import Part
from difftrain.language.spec import Objective
from difftrain.sampling import grids
from difftrain.sampling.pictures import grid_png, to_bytes
from difftrain.training import evaluate, state
from difftrain.training.arrays import Arrays
from difftrain.training.bundle import ARRAYS, Bundle, SettingError, block
from difftrain.training.folder import FolderError, open_run
from difftrain.training.known import told
from difftrain.training.own import importable
from difftrain.training.parts import Parts, build_parts, condition_field, held_out, opened
from difftrain.training.sources import DataError, Pictures

COLUMNS = 8  # at most
SHOWN = 64  # of the pictures that are all saved


@dataclass(frozen=True, eq=False)
class Model:
    """What samples are made with: weights [P] of a bundle's modules after `step` steps."""

    bundle: Bundle
    programs: evaluate.Programs
    parts: Parts
    weights: Tensor
    step: int
    width: str = ""  # the width of an average that was made after training


def sample(
    run: str,
    settings: Mapping[str, str] | None = None,
    *,
    prompts: Sequence[str] = (),
    count: int | None = None,
    out: str | None = None,
    save: str | None = None,
    weights: str | None = None,
) -> Path:
    """What is drawn from the averaged weights of a run, or of a checkpoint in it, or of the file
    `weights`: a grid of pictures, or the arrays. `save` names a file for all pictures; the grid
    then has the first."""
    bundle, checkpoint = open_run(run)
    checkpoint = _file(weights) if weights else checkpoint
    spec = bundle.read(settings, ("sample", "data"))
    options, data, objective = block(spec, "sample"), block(spec, "data"), spec.objective()
    fits(bundle, options["solver"])
    read = condition_field(objective)
    if prompts and not read:
        raise SettingError("this network reads no condition: leave out `--prompt`")
    with importable(bundle.texts):
        model = open_model(bundle, objective, checkpoint, data["size"])
        texts = list(prompts) or declared(options)
        texts = texts or _captions(data, read, count or options["count"])
        texts = list(islice(cycle(texts), count)) if count else texts
        path = Path(out or f"{bundle.name}{ending(data)}")
        return draw(model, options, data["size"], texts, path, save and Path(save))


def _file(weights: str) -> Path:
    if not Path(weights).is_file():
        raise FolderError(
            f"there is no file `{weights}`: give a checkpoint, or one that `difftrain ema` wrote"
        )
    return Path(weights)


def open_model(bundle: Bundle, objective: Objective, checkpoint: Path, size: int) -> Model:
    """The averaged weights of a checkpoint in the modules of its spec."""
    device = lowering.device("auto")
    graph = bundle.manifest["graph"]
    facts = state.facts(checkpoint, graph)
    parts = build_parts(objective, told(facts), 0, device, size=size, sampling=True)
    state.load_average(checkpoint, parts.weights, parts.plan, graph, parts.kept)
    programs = evaluate.programs(bundle, device)
    step, width = int(facts["step"]), facts.get("width", "")
    return Model(bundle, programs, parts, parts.weights, step, width)


def declared(options: Run) -> list[str]:
    """The prompts that a spec lists, as many as it wants drawn."""
    return list(options["prompts"])[: options["count"]]


def _captions(data: Run, read: str, count: int) -> list[str]:
    if not read:
        return [""] * count
    try:
        unseen = held_out(data, read)
        if unseen is not None and len(unseen) >= count:
            return captions(count, unseen)
        seen = opened(data, "train", read)
        return captions(count, seen) if unseen is None else captions(count, unseen, seen)
    except DataError as problem:
        raise DataError(f"{problem}; or say with `--prompt` what to draw") from problem


def captions(count: int, *sets: Pictures | Arrays) -> list[str]:
    """At most `count` captions, of the first set as many as it has, from all over it."""
    texts: list[str] = []
    for found in sets:
        wanted, every = count - len(texts), [record.caption for record in found.records]
        texts += every[:: max(1, len(every) // max(1, wanted))][:wanted]
    return texts


def ending(data: Run) -> str:
    """How the file of samples ends: pictures are shown, other arrays are not."""
    return ".npz" if data["source"].module == ARRAYS else ".png"


def fits(bundle: Bundle, solver: Part) -> None:
    """Refuses a solver that cannot walk the times of the compiled process."""
    try:
        grids.check(tuple(bundle.manifest["time"]), solver.options)
    except ValueError as problem:
        raise SettingError(str(problem)) from problem


def draw(
    model: Model,
    options: Run,
    size: int,
    texts: Sequence[str],
    path: Path,
    save: Path | None = None,
) -> Path:
    """Writes one sample a text into a file that carries the settings it was made with: a PNG, or
    an `.npz` where they are no pictures. `save` is for all pictures, uint8."""
    made = evaluate.sample(
        model.bundle, model.programs, model.parts, model.weights, options, list(texts), size
    )
    settings = _settings(model, options)
    if path.suffix == ".npz":
        write_arrays(path, texts, settings, x=made.numpy())
        return path
    if save is not None:
        pictures = to_bytes(made).permute(0, 3, 1, 2).numpy()
        write_arrays(save, texts, settings, pictures=pictures)
        made, texts = made[:SHOWN], texts[:SHOWN]
    columns = min(COLUMNS, max(1, round(len(texts) ** 0.5)))
    grid_png(path, made, columns, texts, settings)
    return path


def _settings(model: Model, options: Run) -> dict[str, object]:
    solver = options["solver"]
    return {
        "spec": model.bundle.manifest["spec"],
        "step": model.step,
        **({"width": model.width} if model.width else {}),
        "solver": f"{solver.module} {dict(solver.options)}",
        "guidance": options["guidance"],
        "seed": options["seed"],
    }


def write_arrays(
    path: Path, texts: Sequence[str], settings: Mapping[str, object], **arrays: np.ndarray
) -> None:
    """Writes arrays with their captions and settings into an `.npz`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            np.savez(file, **arrays, captions=np.array(texts), settings=json.dumps(settings))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
