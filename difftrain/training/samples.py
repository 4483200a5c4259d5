"""Files of samples: of a run while it trains, and of its checkpoints afterwards."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import difftrain
from difftrain.compiler import lowering
from difftrain.compiler.texts import versions
from difftrain.language.finding import Finding
from difftrain.language.options import Run
from difftrain.language.part import Part, written
from difftrain.language.spec import Objective, Spec
from difftrain.sampling import grids
from difftrain.sampling.model import Levels
from difftrain.sampling.pictures import to_bytes
from difftrain.training import evaluate, scores, state
from difftrain.training.arrays import Arrays
from difftrain.training.bundle import ARRAYS, Bundle, SettingError, block
from difftrain.training.evaluate import Model
from difftrain.training.folder import FolderError, open_run
from difftrain.training.known import told
from difftrain.training.latents import signed
from difftrain.training.outputs import PICTURES, places
from difftrain.training.own import importable
from difftrain.training.parts import build_parts, condition_field, held_out, opened
from difftrain.training.sources import DataError, Pictures
from difftrain.training.state import CheckpointError
from difftrain.training.writing import keeping, write


def sample(
    run: str,
    settings: Mapping[str, str] | None = None,
    *,
    prompts: Sequence[str] = (),
    count: int | None = None,
    out: str | None = None,
    save: str | None = None,
    weights: str | None = None,
    tell: Callable[[str], object] | None = None,
    inception: str = "",
    doubt: Callable[[list[Finding]], object] = lambda found: None,
) -> Path:
    """What is drawn from the averaged weights of a run, or of a checkpoint in it, or of the file
    `weights`: a grid of pictures, or the arrays. Each picture also lies in a folder beside the
    grid, or all of them in the file that `save` names; a grid has the first. `tell` is for a table
    of scores, `inception` a file of weights for one of them, and `doubt` for what the settings make
    doubtful."""
    bundle, checkpoint = open_run(run)
    checkpoint = file_of(weights, bundle) if weights else checkpoint
    spec = bundle.read(settings, ("sample", "data"))
    doubt(doubts(spec, bundle.read()))
    options, data, objective = block(spec, "sample"), block(spec, "data"), spec.objective()
    _are_read(settings or {}, bundle, data)
    fits(bundle, options["solver"])
    guiding(bundle, options)
    path, place = places(bundle.name, ending(data), out, save)
    read = condition_field(objective)
    if prompts and not read:
        raise SettingError("this network reads no condition: leave out `--prompt`")
    with importable(bundle.texts):
        model = open_model(bundle, objective, checkpoint, data["size"])
        texts = list(prompts) or declared(options)
        texts = texts or _captions(data, read, count or options["count"])
        texts = list(islice(cycle(texts), count)) if count else texts
        if tell:
            scores.possible(data, len(texts), inception)
        made, settings = making(model, options, data["size"], texts)
        made, kept = _counted(_fit(made, path), len(texts), path), []
        write(keeping(made, kept) if tell else made, settings, texts, path, place)
    if tell:
        shown = signed(torch.cat(kept).permute(0, 3, 1, 2))
        tell(scores.table(shown, texts, data, read, inception))
    return path


def _are_read(settings: Mapping[str, str], bundle: Bundle, data: Run) -> None:
    """Refuses settings of the data that samples do not depend on, or that are not of their kind.
    Raises SettingError."""
    if "data.batch" in settings:
        raise SettingError(
            "`data.batch` is how many samples a step of training reads, and nothing here does:"
            " leave it out"
        )
    own, other = (it["source"].module == ARRAYS for it in (block(bundle.read(), "data"), data))
    if own != other:
        kinds = "arrays", "pictures"
        ours, theirs = kinds if own else reversed(kinds)
        raise SettingError(
            f"`data.source` has {theirs}, and this run was trained on {ours}: give a source of"
            f" {ours}"
        )


def doubts(spec: Spec, plain: Spec) -> list[Finding]:
    """What is found of a spec with settings, and was not without them."""
    before = {(f.code, f.message, f.place) for f in plain.findings}
    return [f for f in spec.findings if (f.code, f.message, f.place) not in before]


def file_of(weights: str, bundle: Bundle) -> Path:
    """The file of other weights for a run. Raises FolderError, and CheckpointError for those of
    another objective or network, also where they would fit."""
    if not Path(weights).is_file():
        raise FolderError(
            f"there is no file `{weights}`: give a checkpoint, or one that `difftrain ema` wrote"
        )
    if other := state.apart(Path(weights), bundle.manifest):
        name, theirs, ours = other
        raise CheckpointError(
            f"the checkpoint `{weights}` is of another network (`{name} = {theirs}`, and this spec"
            f" has `{name} = {ours}`): sample the run that it is of"
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
    """Refuses a solver that is not there, or cannot walk the times of the compiled process."""
    evaluate.walking(bundle, solver)
    try:
        grids.check(tuple(bundle.manifest["time"]), solver.options)
    except ValueError as problem:
        raise SettingError(str(problem)) from problem


# ---- a weaker model that guides


def guiding(bundle: Bundle, options: Run) -> tuple[Bundle, Path] | None:
    """The run that guides, and its checkpoint, if there is one. Raises FolderError."""
    if not options["guide"]:
        return None
    guide, checkpoint = open_run(options["guide"])
    here, there = (tuple(b.manifest["time"]) for b in (bundle, guide))
    if here != there or not _equally_noisy(bundle, guide):
        raise FolderError(
            f"`{options['guide']}` cannot guide this run: its process has other levels of noise, so"
            " the two estimate from different things; give a run of the same process"
        )
    return guide, checkpoint


def _equally_noisy(one: Bundle, two: Bundle) -> bool:
    """Whether alpha and sigma of two runs of one time are the same."""
    kind, low, high = one.manifest["time"]
    t = torch.linspace(low, min(high, FAR), POINTS, dtype=torch.float64)
    t = torch.arange(int(high)) if kind == "index" else t
    modules = (bundle.module("levels.py") for bundle in (one, two))
    first, second = (Levels(module.compute, module.tables()) for module in modules)
    pairs = ((first.alpha(t), second.alpha(t)), (first.sigma(t), second.sigma(t)))
    return all(torch.allclose(a.double(), b.double()) for a, b in pairs)


FAR, POINTS = 100.0, 65  # where levels are compared


def open_guide(model: Model, options: Run, size: int) -> Model | None:
    """The weaker model that guides, if there is one. Raises FolderError."""
    found = guiding(model.bundle, options)
    if found is None:
        return None
    bundle, checkpoint = found
    objective = bundle.read().objective()
    with importable(bundle.texts):
        guide = open_model(bundle, objective, checkpoint, size)
    codecs = (guide.parts.codec, model.parts.codec)
    if len({codec.fingerprint() for codec in codecs if hasattr(codec, "fingerprint")}) > 1:
        raise FolderError(
            f"`{options['guide']}` cannot guide this run: it has another codec; give a run of the"
            " same one"
        )
    return guide


# ---- drawing


def draw(model: Model, options: Run, size: int, texts: Sequence[str], path: Path) -> Path:
    """Writes one sample a text into a file."""
    made, settings = making(model, options, size, texts)
    return write(_fit(made, path), settings, texts, path)


def making(
    model: Model, options: Run, size: int, texts: Sequence[str]
) -> tuple[Iterator[Tensor], dict]:
    """One sample a text, in batches [B, ...] as they are drawn, and the settings they are made
    with."""
    guide = open_guide(model, options, size)
    made = evaluate.batches(model, options, list(texts), size, guide)
    return made, _settings(model, options, size, guide)


def _fit(made: Iterable[Tensor], path: Path) -> Iterable[Tensor]:
    """The batches as a file of this name holds them: pictures as bytes."""
    return map(to_bytes, made) if path.suffix == PICTURES else made


def _counted(made: Iterable[Tensor], count: int, path: Path) -> Iterator[Tensor]:
    """The batches, with a bar of the samples that are drawn."""
    unit = "picture" if path.suffix == PICTURES else "sample"
    with tqdm(total=count, unit=unit, file=sys.stderr, dynamic_ncols=True) as bar:
        for batch in made:
            yield batch
            bar.update(len(batch))


def _settings(model: Model, options: Run, size: int, guide: Model | None) -> dict[str, object]:
    """All that a sample depends on beside its prompt and number."""
    manifest = model.bundle.manifest
    weaker = {"guide": guide.bundle.manifest["spec"], "guide_step": guide.step} if guide else {}
    return {
        "spec": manifest["spec"],
        "graph": manifest["graph"],
        "step": model.step,
        **({"width": model.width} if model.width else {}),
        "size": size,
        "solver": written(options["solver"]),
        **{name: options[name] for name in GUIDANCE},
        **weaker,
        "seed": options["seed"],
        "versions": {"difftrain": difftrain.__version__, **versions()},
    }


GUIDANCE = ("guidance", "guidance_interval", "guidance_rescale")
