"""A compiled spec: everything that training, sampling and validation run, as text.

`difftrain compile` packs it into one file; `difftrain train` uses it as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import difftrain
from difftrain.compiler.emit import emit
from difftrain.compiler.program import load
from difftrain.compiler.step import Inputs, Recipe, emit_step, inputs_read
from difftrain.compiler.texts import (
    MANIFEST,
    PARTS,
    SPEC,
    Texts,
    checked,
    imported,
    read_spec,
    versions,
)
from difftrain.graph.build import build
from difftrain.graph.passes import run as run_passes
from difftrain.language.adopt import written_out
from difftrain.language.format import format_text
from difftrain.language.forms import clock
from difftrain.language.guidance import own_guidance
from difftrain.language.horizon import horizon
from difftrain.language.meaning import gaussian
from difftrain.language.names import TARGETS
from difftrain.language.numbers import draws
from difftrain.language.options import Run, decays, defaults
from difftrain.language.part import Part, told
from difftrain.language.spec import Objective, Spec, read_text
from difftrain.language.term import is_const, walk
from difftrain.language.tree import Source
from difftrain.training import own

ESTIMATES = ("x0_hat", "eps_hat")
ARRAYS = "arrays"  # the source of what is no picture
LEVELS = ("alpha", "sigma", "row_a", "row_b", "c_out")
GUESS = "guess"  # an earlier estimate that the network is shown
NOISE = "eps@0"  # as drawn: what a strategy adds to it is for training alone
RUNTIME = {  # what may be set without compiling again
    "data": ("source", "size", "batch", "captions"),
    "train": (
        "steps", "device", "compile", "resume_from", "start_from", "teacher", "seed", "keep",
        "save_every", "sample_every", "snapshots_every", "log_every",
    ),
    "export": TARGETS,
    "sample": (
        "solver", "guidance", "guidance_interval", "guidance_rescale", "guide", "prompts", "count",
        "seed",
    ),
}  # fmt: skip


class SettingError(Exception):
    """A setting that comes too late; the message says what to do."""


@dataclass(frozen=True)
class Bundle:
    """The texts of a compiled spec by file name: see `compiler.texts`."""

    texts: Texts

    @cached_property
    def manifest(self) -> dict:
        return json.loads(self.texts[MANIFEST])

    @property
    def name(self) -> str:
        return self.manifest["name"]

    def module(self, file: str):
        """An emitted source, loaded."""
        return load(self.texts[file], file.removesuffix(".py"))

    def read(self, settings: Mapping[str, str] | None = None, kinds=tuple(RUNTIME)) -> Spec:
        """The spec, with settings that leave the emitted step as it is, of the blocks that are
        read. Raises SpecError and SettingError."""
        spec = read_spec(self.texts, settings)
        for path, value in (settings or {}).items():
            kind, option = [*path.split("."), ""][:2]
            if option not in RUNTIME.get(kind, ()):
                raise SettingError(
                    f"`{path}` is part of the compiled step: compile the spec again with"
                    f" `--set {path}={value}`"
                )
            if kind not in kinds:
                named = " or ".join(f"`{k}`" for k in kinds)
                raise SettingError(f"`{path}` is not read here: set an option of {named}")
        return spec

    def saying(self, more: Mapping[str, object]) -> Bundle:
        """The bundle with more in its manifest."""
        manifest = json.dumps({**self.manifest, **more}, indent=2) + "\n"
        return Bundle({**self.texts, MANIFEST: manifest})


def open_bundle(texts: Texts) -> Bundle:
    """The bundle of texts out of an executable or a run folder."""
    return Bundle(texts)


def compile_spec(path: str | Path, settings: Mapping[str, str] | None = None) -> Bundle:
    """The bundle of a spec file. Raises SpecError, and OSError for a file that cannot be read."""
    return compile_source(read_text(path), settings)


def compile_text(name: str, text: str) -> Bundle:
    """The bundle of a spec's text. Raises SpecError."""
    return compile_source(Source(f"{name}.diff", text))


def compile_source(source: Source, settings: Mapping[str, str] | None = None) -> Bundle:
    """The bundle of a source, with settings applied. Raises SpecError."""
    spec = checked(source, settings)
    objective = spec.objective()
    step = emit_step(objective, recipe(spec), step_inputs(objective))
    time = clock(objective.equations)
    estimates = run_passes(build(objective, ESTIMATES, fixed=moment(objective)))
    levels = run_passes(build(objective, LEVELS, fixed=(time,)))
    texts = {
        SPEC: format_text(written_out(source)),
        **imported(spec.names, Path(source.path).parent),
        **own.sources(objective, Path(source.path).parent, spec.names),
        "step.py": step.source,
        "estimates.py": emit(estimates, f"What `{objective.name}` estimates from xt at t."),
        "levels.py": emit(levels, f"The levels of `{objective.name}` at t."),
        "graph.txt": f"{step.derived}\n\nafter the passes\n\n{step.graph}\n",
    }
    if not gaussian(objective):
        noise = run_passes(build(objective, (NOISE,)))
        texts["noise.py"] = emit(noise, f"The law of the noise of `{objective.name}`.")
    manifest = describe(spec, objective, texts)
    return Bundle({**texts, MANIFEST: json.dumps(manifest, indent=2) + "\n"})


def moment(objective: Objective) -> list[str]:
    """What a solver decides: xt, the time, the earlier one where there is one, the last estimate
    where the network is shown it, and the guidance that the network is given."""
    later = ["r"] if "r" in objective.equations.versions else []
    earlier = [n for n in (GUESS,) if n in objective.backbone.interface.inputs]
    return ["xt", clock(objective.equations), *later, *earlier, *own_guidance(objective)]


def describe(spec: Spec, objective: Objective, texts: Texts) -> dict:
    """What a bundle says of itself: names, hashes, versions, streams."""
    derivation = objective.derivation()
    loss = derivation.read("loss")
    data, train = block(spec, "data"), block(spec, "train")
    return {
        "name": Path(spec.path).stem,
        "objective": objective.name,
        "spec": spec_hash(texts, spec.settings),
        "graph": digest(texts["graph.txt"]),
        "network": told(objective.backbone.part) if objective.backbone else {},
        "settings": dict(spec.settings),
        "difftrain": difftrain.__version__,
        "versions": versions(),
        "precision": f"{train['precision']} forwards, fp32 weights, moments and average",
        "shapes": {"batch": data["batch"], **picture_shape(data)},
        "streams": [d["name"] for d in draws(loss)],
        "forward": differentiated(objective),
        "baseline": is_plain(objective),
        "dropping": [d["name"] for d in draws(derivation.read("dropped"))],
        "time": horizon(objective),
        "guidance": own_guidance(objective),
    }


def spec_hash(texts: Texts, settings: Mapping[str, str]) -> str:
    """A hash of all that somebody wrote: the spec, what it imports, Python of its own, settings."""
    names = [n for n in sorted(texts) if n.endswith(".diff") or n.startswith(PARTS)]
    return digest("".join([*map(texts.get, names), json.dumps(dict(settings), sort_keys=True)]))


def differentiated(objective: Objective) -> bool:
    """Whether the step differentiates the network forward."""
    return any(t.op == "jvp" for t in walk(objective.quantity("loss")))


def is_plain(objective: Objective) -> bool:
    """Whether what the network returns is its prediction, up to a constant, at the time that it is
    told: then one that always returns the mean of its target can be compared with."""
    derivation = objective.derivation()
    time, told, skip, out = (
        derivation.read(n) for n in (clock(objective.equations), "c_noise", "c_skip", "c_out")
    )
    return told is time and is_const(skip, 0) and is_const(out)


def picture_shape(data: Run) -> dict[str, list[int]]:
    """The shape of a picture, where the data are pictures."""
    if data["source"].module == ARRAYS:
        return {}
    return {"picture": [3, data["size"], data["size"]]}


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]


def block(spec: Spec, kind: str) -> Run:
    """The options of `data`, `train` or `sample`, defaults where the spec has no such block."""
    return spec.runs.get(kind) or defaults(kind)


def recipe(spec: Spec) -> Recipe:
    """What the step takes from the `train` block."""
    train = block(spec, "train")
    return Recipe(
        train["precision"],
        train["optimizer"],
        train["clip"],
        train["warmup"],
        train["decay"],
        decays(train),
    )


def text_part(objective: Objective) -> Part | tuple[Part, ...] | None:
    """The declared encoder of conditions, or several that are joined."""
    part = objective.backbone.part.options.get("text") if objective.backbone else None
    return part if each_part(part) else None


def each_part(part: object) -> tuple[Part, ...]:
    """The parts that an option's value holds."""
    values = part if isinstance(part, tuple) else (part,)
    return tuple(value for value in values if isinstance(value, Part))


def step_inputs(objective: Objective, given: tuple[str, ...] = ()) -> Inputs:
    """What the step reads from a batch of ours."""
    text = text_part(objective)
    trained = any(part.options.get("train") for part in each_part(text))
    return Inputs(given, text is not None, trained, "image" in inputs_read(objective))
