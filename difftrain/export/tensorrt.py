"""A run as one executable file that draws with TensorRT engines.

Modules become ONNX files, and those become engines, by the library that is installed. The engines
are held against the run where there is a GPU, and the ONNX files where there is none.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from difftrain.export import cache, manifest, onnx
from difftrain.export.engine import Engine, Library, Profile, Source, library
from difftrain.export.errors import ExportError
from difftrain.export.modules import Piece, pieces
from difftrain.export.opened import Opened
from difftrain.export.package import encoders, holds_engines, pack
from difftrain.export.parity import Call, Report, by_step, every_size, gate
from difftrain.export.running import Refused, Runner
from difftrain.export.trace import batches, traced
from difftrain.models.errors import PartError
from difftrain.models.foreign import reason
from difftrain.training.folder import free

Say = Callable[[str], object]


@dataclass(frozen=True, eq=False)
class Sized:
    """What a run needs to draw at one size: its modules, their engines, and how far those (or
    without a GPU their ONNX files) are from the run."""

    run: Opened
    made: Mapping[str, Piece]
    engines: Mapping[str, Engine]
    report: Report


def export(run: Opened, file: Path, say: Say = print) -> Path:
    """Writes the file of a run. Raises ExportError, and FolderError for a place that is taken or
    cannot be written."""
    _can_draw(run)
    free(file, holds_engines, "holds no engines")
    onnx.needed()
    profile, maker = wanted(run, say), library(run.target["library"].replace("_", "-"))
    told, data = encoders(run.parts.text, run.encoder, run.sampling["prompts"])
    sizes = _sizes(run)
    every = [_sized(run, size, profile, maker, say) for size in sizes]
    about = _described(every, profile) | {"encoders": told, "sizes": sizes}
    packed = {}
    for size, it in zip(sizes, every, strict=True):
        of = {name: None if name == "text" else size for name in it.engines}
        packed |= {_place(n, of[n]): (n, of[n], engine) for n, engine in it.engines.items()}
    about["engines"] = [
        {**engine.about, "piece": name, "file": place, "size": size}
        for place, (name, size, engine) in packed.items()
    ]
    return pack(file, about, data | {place: it.data for place, (*_, it) in packed.items()})


def _can_draw(run: Opened) -> None:
    if run.model.programs.noise is not None:
        raise ExportError(
            f"the noise of `{run.objective.name}` has a law of its own, and the file draws standard"
            " normal noise alone: leave out what changes `eps`, or export to ONNX"
        )


def _sizes(run: Opened) -> list[int]:
    """The sides of pictures that get engines."""
    asked = run.target["sizes"]
    if run.arrays and asked:
        raise ExportError(
            "`sizes` lists sides of pictures, and this run draws arrays of"
            f" {' x '.join(map(str, run.shape))}: leave it out"
        )
    if not isinstance(asked, (list, tuple)):
        raise ExportError("`sizes` is a list of sides of pictures: write `sizes = [256, 512]`")
    if wrong := [size for size in asked if type(size) is not int or size < 1]:
        raise ExportError(
            f"`sizes` lists {wrong[0]}, and each is the side of pictures in pixels: list whole"
            " numbers, as in `sizes = [256, 512]`"
        )
    return list(dict.fromkeys(asked)) or [run.data["size"]]


def wanted(run: Opened, say: Say) -> Profile:
    """What the engines of a run are built for."""
    profile = Profile(*run.batch, run.target["portable"], run.target["refit"])
    if (profile.refit or not profile.portable) and not torch.cuda.is_available():
        say(
            "here is no GPU: engines are built for every one, and take no new weights; new weights"
            " get new engines"
        )
        return replace(profile, refit=False, portable=True)
    return profile


# ---- one size


def _sized(run: Opened, size: int, profile: Profile, maker: Library, say: Say) -> Sized:
    """Modules and engines at a size, held against the run."""
    run = replace(run, data=replace(run.data, values={**run.data.values, "size": size}))
    made = pieces(run, run.target["precision"])
    _takes(made["backbone"], size)
    with tempfile.TemporaryDirectory() as folder:
        sources = dict(_sources(made, Path(folder), profile, say))
        here = torch.cuda.is_available()
        engines = {
            name: cache.engine(source, its, maker, say=say)
            for name, (source, its) in sources.items()
            if here or name != "backbone"  # which is there to be held against the run
        }
        files = {name: source.onnx for name, (source, _) in sources.items()}
        call = running(made, engines) if here else onnx.sessions(made, files, run.device)
        asked = call if "backbone" in sources else by_step(made, call)
        report = _held(run, made, asked, engines if here else {})
    say(f"{'engines' if here else 'ONNX files, as here is no GPU'}: {report}")
    return Sized(run, made, {n: e for n, e in engines.items() if n != "backbone"}, report)


def _held(
    run: Opened, made: Mapping[str, Piece], call: Call, engines: Mapping[str, Engine]
) -> Report:
    """How far what is called is from the run, and the `engines` with all their kernels. Raises
    ExportError, also for engines that fail."""
    precision = run.target["precision"]
    sizes = {
        n: {min(low + 1, high) for low, high in it.about["profiles"]} for n, it in engines.items()
    }
    try:
        report = gate(run, made, call, precision)
        every_size(made, call, sizes, precision)
        return report
    except Refused as problem:
        raise ExportError(f"{problem}; export to another target, such as `onnx`") from problem


@torch.no_grad()
def _takes(backbone: Piece, size: int) -> None:
    """Raises ExportError, or what the network says itself, where that takes no such size."""
    try:
        backbone.module(**backbone.inputs)
    except PartError:
        raise
    except Exception as cause:  # a network may do anything
        raise ExportError(
            f"the network takes no samples of size {size} ({reason(cause)}): export with other"
            " `sizes`"
        ) from cause


def _sources(
    made: Mapping[str, Piece], folder: Path, profile: Profile, say: Say
) -> Iterator[tuple[str, tuple[Source, Profile]]]:
    """Every module as libraries take it, and what its engine is built for; the backbone can be
    asked through `step`, where that is made."""
    unasked = ["backbone"] if "step" in made else []
    files = onnx.write(made, folder, (profile.low, profile.high), say, unasked)
    for name, file in files.items():
        low, high = batches(name, (profile.low, profile.high))
        program = partial(traced, name, made[name], (low, high))
        yield name, (Source(name, file, program), replace(profile, low=low, high=high))


def running(made: Mapping[str, Piece], engines: Mapping[str, Engine]) -> Call:
    """Engines on the GPU, as functions of inputs by name."""
    runners: dict[str, Runner] = {}

    def call(name: str, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if name not in runners:
            runners[name] = Runner(name, engines[name].data, engines[name].about)
        return tuple(runners[name](*(inputs[n] for n in made[name].inputs)))

    return call


# ---- what the file says of itself


def _described(every: list[Sized], profile: Profile) -> dict[str, object]:
    """The manifest, but for its engines and encoders."""
    first, sampling = every[0], every[0].run.sampling
    batch = profile.low, profile.high
    about = manifest.describe(first.run, "tensorrt", batch, first.made, first.report)
    del about["table"]  # times may be shifted by the size
    reports = [asdict(it.report) for it in every]
    return {
        **about,
        "errors": {name: max(each[name] for each in reports) for name in reports[0]},
        "tables": {str(it.run.data["size"]): manifest.tabled(it.run) for it in every},
        "shapes": {str(it.run.data["size"]): list(it.run.shape) for it in every},
        "arrays": first.run.arrays,
        "guided": first.run.guided,
        "prompts": list(sampling["prompts"])[: sampling["count"]],
    }


def _place(name: str, size: int | None) -> str:
    """Where an engine lies in the file: one of texts serves every size."""
    return f"engines/{name}{'' if size is None else f'-{size}'}.engine"
