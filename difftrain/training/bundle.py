"""A compiled spec: everything that training, sampling and validation run, as text.

`difftrain compile` packs it into one file; `difftrain train` uses it as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch

import difftrain
from difftrain.compiler.emit import emit
from difftrain.compiler.program import load
from difftrain.compiler.step import Inputs, Recipe, emit_step
from difftrain.graph.build import build
from difftrain.graph.passes import run as run_passes
from difftrain.language.check import check
from difftrain.language.finding import SpecError
from difftrain.language.format import format_text
from difftrain.language.numbers import draws, points, values
from difftrain.language.options import Run, defaults
from difftrain.language.part import Part
from difftrain.language.spec import Objective, Spec, read_text
from difftrain.language.term import Term
from difftrain.language.tree import Source

ESTIMATES = ("x0_hat", "eps_hat")
LEVELS = ("alpha", "sigma", "row_a")


@dataclass(frozen=True, eq=False)
class Bundle:
    """The resolved spec, its manifest, and the emitted sources by file name."""

    name: str
    spec: str
    manifest: dict
    sources: Mapping[str, str]
    settings: Mapping[str, str] = field(default_factory=dict)

    def module(self, file: str):
        """An emitted source, loaded."""
        return load(self.sources[file], file.removesuffix(".py"))

    def read(self, settings: Mapping[str, str] | None = None) -> Spec:
        """The spec, with further settings. Raises SpecError."""
        spec, found = check(Source(f"{self.name}.diff", self.spec), settings)
        if any(f.severity == "error" for f in found):
            raise SpecError(found)
        return spec

    def files(self) -> dict[str, str]:
        """The texts of the bundle by the names they have in a run folder and in an executable."""
        manifest = json.dumps(self.manifest, indent=2) + "\n"
        return {"spec.diff": self.spec, "manifest.json": manifest, **self.sources}


def open_bundle(files: Mapping[str, str]) -> Bundle:
    """The bundle of texts that `Bundle.files` gave."""
    manifest = json.loads(files["manifest.json"])
    sources = {n: t for n, t in files.items() if n not in ("spec.diff", "manifest.json")}
    return Bundle(manifest["name"], files["spec.diff"], manifest, sources, manifest["settings"])


def compile_spec(path: str | Path, settings: Mapping[str, str] | None = None) -> Bundle:
    """The bundle of a spec file. Raises SpecError, and OSError for a file that cannot be read."""
    return compile_source(read_text(path), settings)


def compile_text(name: str, text: str) -> Bundle:
    """The bundle of a spec's text. Raises SpecError."""
    return compile_source(Source(f"{name}.diff", text))


def compile_source(source: Source, settings: Mapping[str, str] | None = None) -> Bundle:
    """The bundle of a source, with settings applied. Raises SpecError."""
    spec, found = check(source, settings)
    if any(f.severity == "error" for f in found):
        raise SpecError(found)
    objective, name = spec.objective(), Path(source.path).stem
    step = emit_step(objective, recipe(spec), step_inputs(objective))
    estimates = run_passes(build(objective, ESTIMATES, fixed=("xt", "t")))
    levels = run_passes(build(objective, LEVELS, fixed=("t",)))
    sources = {
        "step.py": step.source,
        "estimates.py": emit(estimates, f"What `{objective.name}` estimates from xt at t."),
        "levels.py": emit(levels, f"The levels of `{objective.name}` at t."),
        "graph.txt": f"{step.derived}\n\nafter the passes\n\n{step.graph}\n",
    }
    text = resolved(spec)
    manifest = describe(name, text, objective, sources, settings or {})
    return Bundle(name, text, manifest, sources, dict(settings or {}))


def resolved(spec: Spec) -> str:
    """The text of the spec, formatted."""
    return format_text(spec.tree.source)


def describe(name, text: str, objective: Objective, sources, settings) -> dict:
    """What a bundle says of itself: names, hashes, versions, streams."""
    derivation = objective.derivation()
    derivation.read("loss")
    return {
        "name": name,
        "objective": objective.name,
        "spec": digest(text),
        "graph": digest(sources["graph.txt"]),
        "settings": {k: str(v) for k, v in settings.items()},
        "difftrain": difftrain.__version__,
        "torch": torch.__version__.partition("+")[0],
        "streams": [d["name"] for d in draws(derivation.read("loss"))],
        "time": time_range(derivation.read("t")),
    }


def time_range(t: Term) -> tuple[str, float, float]:
    """("index", 0, N) for an index 0 .. N - 1, or ("real", low, high) with the ends of t's law."""
    seen = sorted(row[0] for row in values([t], points(t)))
    if any(d["law"] == "integer" for d in draws(t)):
        return "index", 0, seen[-1] + 1
    return "real", seen[0], seen[-1]


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
        train["ema"],
    )


def text_part(objective: Objective) -> Part | None:
    """The declared text encoder."""
    part = objective.backbone.part.options.get("text") if objective.backbone else None
    return part if isinstance(part, Part) else None


def step_inputs(objective: Objective, given: tuple[str, ...] = ()) -> Inputs:
    """What the step reads from a batch of ours."""
    text = text_part(objective)
    trained = bool(text and text.options.get("train"))
    return Inputs(given, text is not None, trained)
