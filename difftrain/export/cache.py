"""Engines that were built before: found by what they were built from.

An engine holds the weights of its graph, so the key is both, beside what builds it and the GPU that
it is built for; one that can be refitted is found without its weights, and gets those that are
wanted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

from difftrain.export.engine import Engine, Library, Profile, Source, build, built_for, refitted

Say = Callable[[str], object]
CHUNK = 1 << 24  # bytes of weights that are read at a time
FORM = 2  # how engines are built; what was built in another way is not found


def home() -> Path:
    """Where engines are kept between exports."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "difftrain", "engines")


def engine(
    source: Source, profile: Profile, maker: Library, *, folder: Path | None = None, say: Say
) -> Engine:
    """The engine of a piece: as it was built before, refitted, or built now and kept."""
    folder = folder or home()
    graph, weights = hashes(source.onnx)
    named = {**built_for(maker, profile), "graph": graph, "form": FORM}
    named |= {} if profile.refit else {"weights": weights}
    place = folder / f"{_digest(json.dumps(named, sort_keys=True).encode())}.engine"
    if (found := _read(place)) is None:
        say(f"building the engine of `{source.name}`")
        found = _keep(build(source, profile, maker), weights, place, say)
        say(f"built the engine of `{source.name}`: {len(found.data) >> 10} KiB")
    elif found.about["weights"] != weights:
        found = _refit(found, source, profile, maker, weights, place, say)
    else:
        say(f"the engine of `{source.name}` was built before")
    return found


def _refit(
    old: Engine,
    source: Source,
    profile: Profile,
    maker: Library,
    weights: str,
    place: Path,
    say: Say,
) -> Engine:
    """The engine with the weights of the piece: refitted, or where the library will not, built."""
    data, why = refitted(old, source)
    if data is None:
        say(f"`{source.name}` is built again, as its engine takes no new weights: {why}")
        return _keep(build(source, profile, maker), weights, place, say)
    say(f"gave the engine of `{source.name}` new weights")
    return _keep(Engine(data, old.about), weights, place, say)


def hashes(onnx: Path) -> tuple[str, str]:
    """Hashes of the graph of an ONNX file, without what names places in sources, and of its
    weights: whole numbers are shapes and places, and belong to the graph."""
    import onnx as format

    model, held = format.load(str(onnx), load_external_data=False), sha256()
    weights = [it for it in model.graph.initializer if it.data_type in _reals(format.TensorProto)]
    for tensor in sorted(weights, key=lambda it: it.name):
        held.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}".encode())
        for chunk in _bytes(tensor, onnx.parent):
            held.update(chunk)
        for field in ("raw_data", "float_data", "double_data", "external_data", "data_location"):
            tensor.ClearField(field)
    _strip(model)
    return _digest(model.SerializeToString(deterministic=True)), held.hexdigest()[:32]


def _reals(kinds) -> tuple[int, ...]:
    return kinds.FLOAT, kinds.FLOAT16, kinds.BFLOAT16, kinds.DOUBLE


def _bytes(tensor, folder: Path) -> Iterator[bytes]:
    """The bytes of a tensor, also where they lie in a file of their own."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    if not where:
        from onnx import numpy_helper

        yield numpy_helper.to_array(tensor).tobytes()
        return
    left = int(where["length"])
    with (folder / where["location"]).open("rb") as file:
        file.seek(int(where.get("offset", 0)))
        while left > 0 and (chunk := file.read(min(left, CHUNK))):
            left -= len(chunk)
            yield chunk


def _strip(model) -> None:
    """Takes out of a model where its sources lay."""
    nodes = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    for part in (model, model.graph, *nodes, *values):
        del part.metadata_props[:]
        part.doc_string = ""


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()[:32]


def _read(place: Path) -> Engine | None:
    """The engine at a place, with what is known of it."""
    about = place.with_suffix(".json")
    if not about.is_file() or not place.is_file():
        return None
    return Engine(place.read_bytes(), json.loads(about.read_text()))


def _keep(made: Engine, weights: str, place: Path, say: Say) -> Engine:
    """The engine, written to its place, where that can be."""
    kept = Engine(made.data, {**made.about, "weights": weights})
    try:
        _save(kept, place)
    except OSError as problem:
        why = (problem.strerror or str(problem)).lower()
        say(f"the engine is not kept for other exports: `{problem.filename}`: {why}")
    return kept


def _save(made: Engine, place: Path) -> None:
    """Writes an engine: what is known of it last, so that it is whole."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.with_suffix(".json").unlink(missing_ok=True)
    _write(place, made.data)
    _write(place.with_suffix(".json"), json.dumps(dict(made.about), indent=1).encode())


def _write(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
