"""Sample grids: of a run while it trains, and of its checkpoints afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from torch import Tensor

from difftrain.compiler import lowering
from difftrain.language.options import Run
from difftrain.language.part import Part
from difftrain.language.spec import Objective
from difftrain.sampling import grids
from difftrain.sampling.pictures import grid_png
from difftrain.training import evaluate, state
from difftrain.training.bundle import Bundle, SettingError, block
from difftrain.training.folder import open_run
from difftrain.training.parts import Parts, build_parts, held_out, pictures
from difftrain.training.sources import DataError, Pictures

COLUMNS = 8  # at most


@dataclass(frozen=True, eq=False)
class Model:
    """What samples are made with: weights [P] of a bundle's modules after `step` steps."""

    bundle: Bundle
    programs: evaluate.Programs
    parts: Parts
    weights: Tensor
    step: int


def sample(
    run: str,
    settings: Mapping[str, str] | None = None,
    *,
    prompts: Sequence[str] = (),
    count: int | None = None,
    out: str | None = None,
) -> Path:
    """The grid drawn from the averaged weights of a run, or of a checkpoint in it."""
    bundle, checkpoint = open_run(run)
    spec = bundle.read(settings, ("sample", "data"))
    options, data = block(spec, "sample"), block(spec, "data")
    fits(bundle, options["solver"])
    model = open_model(bundle, spec.objective(), checkpoint)
    texts = list(prompts) or declared(options) or _captions(data, count or options["count"])
    texts = list(islice(cycle(texts), count)) if count else texts
    return draw(model, options, data["size"], texts, Path(out or f"{bundle.name}.png"))


def open_model(bundle: Bundle, objective: Objective, checkpoint: Path) -> Model:
    """The averaged weights of a checkpoint in the modules of its spec."""
    device = lowering.device("auto")
    graph = bundle.manifest["graph"]
    facts = state.facts(checkpoint, graph)
    parts = build_parts(objective, json.loads(facts["vocabulary"]), 0, device)
    state.load_average(checkpoint, parts.weights, parts.plan, graph)
    programs = evaluate.programs(bundle, device)
    return Model(bundle, programs, parts, parts.weights, int(facts["step"]))


def declared(options: Run) -> list[str]:
    """The prompts that a spec lists, as many as it wants drawn."""
    return list(options["prompts"])[: options["count"]]


def _captions(data: Run, count: int) -> list[str]:
    try:
        return captions(held_out(data) or pictures(data, "train"), count)
    except DataError as problem:
        raise DataError(f"{problem}; or say with `--prompt` what to draw") from problem


def captions(found: Pictures, count: int) -> list[str]:
    """At most `count` captions, from all over a set of pictures."""
    texts = [record.caption for record in found.records]
    return texts[:: max(1, len(texts) // count)][:count]


def fits(bundle: Bundle, solver: Part) -> None:
    """Refuses a solver that cannot walk the times of the compiled process."""
    try:
        grids.check(tuple(bundle.manifest["time"]), solver.options)
    except ValueError as problem:
        raise SettingError(str(problem)) from problem


def draw(model: Model, options: Run, size: int, texts: Sequence[str], path: Path) -> Path:
    """Writes one picture a text into a PNG that carries the settings it was made with."""
    images = evaluate.sample(
        model.bundle, model.programs, model.parts, model.weights, options, list(texts), size
    )
    columns = min(COLUMNS, max(1, round(len(texts) ** 0.5)))
    solver = options["solver"]
    settings = {
        "spec": model.bundle.manifest["spec"],
        "step": model.step,
        "solver": f"{solver.module} {dict(solver.options)}",
        "guidance": options["guidance"],
        "seed": options["seed"],
    }
    grid_png(path, images, columns, texts, settings)
    return path
