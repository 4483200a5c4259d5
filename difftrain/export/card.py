"""The README of a folder of ONNX files or packages: code that draws with them, and runs as it is.

The files take ids where others would take texts: the code draws with those of the empty text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from difftrain.export.modules import Piece

SHOWN = 2  # samples that the code draws, where batches may be of so many
OPENED = {  # how files are opened and asked, and how arrays are made, by what runs them
    "onnx": """import json
import numpy as np
import onnxruntime

about = json.load(open("manifest.json"))
files = {name: onnxruntime.InferenceSession(f"{name}.onnx") for name in about["pieces"]}
array = np.array
def normal(*shape):
    return np.random.standard_normal(shape).astype("float32")
def ask(name, **inputs):
    return files[name].run(None, inputs)""",
    "pt2": """import json
import torch

about = json.load(open("manifest.json"))
files = {name: torch._inductor.aoti_load_package(f"{name}.pt2") for name in about["pieces"]}
def array(values, kind):
    return torch.tensor(values, dtype=getattr(torch, kind), device=about["device"])
def normal(*shape):
    return torch.randn(shape, device=about["device"])
def ask(name, **inputs):  # keywords alone
    made = files[name](**inputs)
    return made if isinstance(made, tuple) else (made,)""",
}
NORMAL = "standard normal"  # noise of most runs
OTHER = """Its noise has a law of its own, which the spec tells. The code here draws standard normal
noise instead: draw yours in its place.
"""
RUNS = {"onnx": "ONNX files", "pt2": "Packages of AOTInductor"}
TOLD = {  # by the kind of condition
    None: "",
    "text": "The files take ids, not texts: those here are of the empty text.\n",
    "label": "The files take numbers of classes: that here is the one of no class.\n",
}


def card(about: Mapping, made: Mapping[str, Piece]) -> str:
    """The README for the manifest and pieces of an export."""
    low, high = about["batch"]
    lines = [OPENED[about["target"]], "", *_code(about, made, min(max(low, SHOWN), high))]
    said = TOLD[(about["condition"] or {}).get("kind")]
    said += OTHER if about["noise"] != NORMAL else ""
    return f"""# {about["name"]}

{RUNS[about["target"]]}, exported by difftrain {about["versions"]["difftrain"]} from step \
{about["step"]} of the spec {about["spec"]} (graph {about["graph"]}).
`manifest.json` lists their inputs and outputs, where `batch` is {low} to {high}.
{said}
```python
{chr(10).join(lines)}
```
"""


def _code(about: Mapping, made: Mapping[str, Piece], count: int) -> Iterator[str]:
    """Lines that draw `count` samples."""
    shape = ", ".join(map(str, [count, *about["latents"]]))
    yield 'draws = [0, *about["table"]["draws"]]  # their numbers'
    yield f"noise = normal(len(draws), {shape})"
    yield from _told(about, made, count)
    yield from _sampled(made["sampler"]) if "sampler" in made else _stepped(made["step"], shape)
    (output,) = made["decode"].outputs
    yield f'{output} = ask("decode", latents=x)[0]{"  # in 0..1" if output == "pictures" else ""}'


def _told(about: Mapping, made: Mapping[str, Piece], count: int) -> Iterator[str]:
    """The conditions, and the empty one where guidance reads it."""
    if about["condition"] is None:
        return
    name = "ids" if "text" in made else "cond"
    yield f'{name} = array([about["condition"]["null"]] * {count}, "int64")'
    if "text" in made:
        yield 'cond = ask("text", ids=ids)[0]'
    if "null" in made["backbone"].inputs:
        yield "null = cond[:1]"


def _sampled(sampler: Piece) -> Iterator[str]:
    values = {"noise": "noise[0]", "noises": "noise[1:]"}
    yield f'x = ask("sampler", {_given(sampler, values)})[0]'


def _stepped(step: Piece, shape: str) -> Iterator[str]:
    kind = str(step.inputs["t"].dtype).removeprefix("torch.")
    values = {n: f'array([row["{n}"]], "{kind}")' for n in "tr"}
    values |= {"row": 'array(row["weights"], "float32")'}
    values |= {"noise": 'noise[draws.index(row["draw"] or 0)]'}
    yield 'x = sum(weight * noise[draws.index(n)] for weight, n in about["table"]["start"])'
    if "kept" in step.inputs:
        yield f"kept = 0 * normal({len(step.inputs['kept'])}, {shape})"
    yield 'for row in about["table"]["rows"]:'
    taken = "x, kept" if "kept" in step.inputs else "(x,)"
    yield f'    {taken} = ask("step", {_given(step, values)})'


def _given(piece: Piece, values: Mapping[str, str]) -> str:
    """The inputs of a piece as keywords."""
    return ", ".join(f"{name}={values.get(name, name)}" for name in piece.inputs)
