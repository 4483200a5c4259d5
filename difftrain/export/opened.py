"""A run that is exported: what it samples with, opened for good."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from difftrain.export.errors import ExportError
from difftrain.export.table import Table, table
from difftrain.language.finding import Finding
from difftrain.language.options import Run
from difftrain.language.spec import Objective
from difftrain.sampling import solvers
from difftrain.sampling.model import Levels, Sampler
from difftrain.sampling.walks import Walk
from difftrain.training import evaluate
from difftrain.training.bundle import ARRAYS, GUESS, Bundle, block, each_part, text_part
from difftrain.training.folder import open_run
from difftrain.training.own import importable
from difftrain.training.parts import Parts
from difftrain.training.samples import doubts, file_of, fits, open_model

BLOCKS = ("sample", "data", "export")
COUNTED, PROMPTED = "sample.count", "tensorrt"  # what cuts a list of prompts, and where one is


@dataclass(frozen=True, eq=False)
class Opened:
    """The averaged weights of a run in the modules of its spec; `sampling` are the options of
    `sample`, `target` those of what it is exported to."""

    model: evaluate.Model
    objective: Objective
    sampling: Run
    target: Run
    data: Run

    @property
    def bundle(self) -> Bundle:
        return self.model.bundle

    @property
    def parts(self) -> Parts:
        return self.model.parts

    @property
    def device(self) -> torch.device:
        return self.model.weights.device

    @property
    def batch(self) -> tuple[int, int]:
        """How many samples at a time: from, to."""
        sizes = self.target["batch"]
        return sizes if isinstance(sizes, tuple) else (sizes, sizes)

    @property
    def arrays(self) -> bool:
        """Whether samples are arrays, which are no pictures."""
        return self.data["source"].module == ARRAYS

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the latents of one sample."""
        return tuple(self.parts.codec.shape(self.data["size"]))

    @property
    def encoder(self) -> str:
        """What encodes its prompts, as messages name it."""
        parts = each_part(text_part(self.objective))
        return " and ".join(f"`{part.module}`" for part in parts) or "nothing"

    @property
    def indexed(self) -> bool:
        """Whether its times are indices of a table."""
        return self.bundle.manifest["time"][0] == "index"

    @property
    def guess(self) -> bool:
        """Whether the network is shown its estimate before."""
        return GUESS in self.objective.backbone.interface.inputs

    @property
    def guided(self) -> bool:
        """Whether the empty condition is read as well."""
        return self.parts.text is not None and self.guidance[0] != 1

    @property
    def guidance(self) -> tuple[float, dict[str, float]]:
        """The scale of the solver's guidance, and the inputs of a network that has its own."""
        return evaluate.own_guidance(self.bundle, self.sampling["guidance"])

    @cached_property
    def levels(self) -> Levels:
        """The levels in float64."""
        module = self.bundle.module("levels.py")
        return Levels(module.compute, module.tables())

    @cached_property
    def grid(self) -> Tensor:
        """The times of the solver, in float64 or as indices."""
        return evaluate.times(self.bundle, self.sampling["solver"], self.levels, self.shape)

    @property
    def walk(self) -> Walk:
        """The solver, `(model, x, grid, draws) -> x`."""
        return evaluate.walking(self.bundle, self.sampling["solver"])

    @cached_property
    def table(self) -> Table:
        """The solver as a table."""
        name = self.sampling["solver"].module
        return table(self.walk, self.levels, self.grid, name, self.guess)

    def eager(self, cond: Tensor | None, null: Tensor | None, count: int) -> Sampler:
        """The run as `sample` asks it, in fp32, for `count` samples."""
        index = torch.arange(count, device=self.device)
        asked = evaluate.sampler(self.model, self.sampling, index, [""] * count)
        return replace(asked, cond=cond, null=null)

    def draws(self, count: int) -> solvers.Draws:
        """The noise that `sample` draws for its first `count` samples."""
        law = self.model.programs.noise
        law = law and partial(evaluate.own_noise, law.compute)
        index = torch.arange(count, device=self.device)
        return solvers.Draws(self.sampling["seed"], index, law)


@contextmanager
def opened(
    run: str,
    target: str,
    settings: Mapping[str, str] | None = None,
    weights: str | None = None,
    doubt: Callable[[list[Finding]], object] = lambda found: None,
) -> Iterator[Opened]:
    """A run, or a checkpoint in one, opened for a target; Python parts of its own can be imported
    meanwhile. `doubt` is for what the settings make doubtful."""
    bundle, checkpoint = open_run(run)
    checkpoint = file_of(weights, bundle) if weights else checkpoint
    spec = bundle.read(settings, BLOCKS)
    doubt(doubts(spec, bundle.read()))
    options, data, objective = block(spec, "sample"), block(spec, "data"), spec.objective()
    _are_read(settings or {}, target, data)
    fits(bundle, options["solver"])
    with importable(bundle.texts):
        model = open_model(bundle, objective, checkpoint, data["size"])
        yield Opened(model, objective, options, block(spec, target), data)


def _are_read(settings: Mapping[str, str], target: str, data: Run) -> None:
    """Refuses settings that this target of this run would not read. Raises ExportError."""
    for path in settings:
        kind, *rest = path.split(".")
        if kind == "export" and rest[0] != target:
            raise ExportError(
                f"`{path}` is an option of another target than `{target}`: leave it out, or export"
                f" with `--to {rest[0]}`"
            )
        if path == COUNTED and target != PROMPTED or kind == "data" and rest[0] != "size":
            raise ExportError(f"`{path}` changes nothing of what is exported: leave it out")
    if "data.size" in settings and data["source"].module == ARRAYS:
        raise ExportError(
            "`data.size` is the side of pictures, and this run draws arrays: leave it out"
        )


def probe(run: Opened, count: int = 2) -> Tensor | None:
    """Ids [count, T] to try an export with: of the prompts that the spec lists, or else of
    whatever the encoder knows; None without one."""
    text = run.parts.text
    if text is None:
        return None
    prompts = list(run.sampling["prompts"])
    if prompts:
        return text.ids((prompts * count)[:count])
    known = torch.tensor(_known(text))
    return known[torch.arange(count * text.length) % len(known)].reshape(count, text.length)


def _known(text: nn.Module) -> list[int]:
    """Ids that an encoder can be given."""
    if hasattr(text, "classes"):
        return list(range(text.classes))
    return text.vocabulary or text.ids(["a picture of something"])[0].tolist()


def refuse(run: Opened) -> None:
    """Raises ExportError for what has no exported form."""
    if "draw." in run.bundle.texts["estimates.py"]:
        raise ExportError(
            f"what `{run.objective.name}` estimates is partly drawn at random, and what is exported"
            " draws nothing: leave out of the objective what draws"
        )
    if run.sampling["guide"]:
        raise ExportError(
            f"`guide = {run.sampling['guide']}` is a second network, and what is exported has one:"
            " leave `guide` out"
        )
