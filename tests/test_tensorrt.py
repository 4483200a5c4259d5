"""Engines, the cache of engines, and the file that draws with them.

Engines are built for real: TensorRT-RTX needs no GPU for that. To open one it needs a GPU, and its
inspector asks for an open engine: without one, what is looked at is the network that was parsed
(the layers that a manifest lists) and the first bytes of an engine. Torch-TensorRT cannot be had
without a GPU, so that what it is called with is looked at on a stand-in.
"""

import json
import os
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import exported
import numpy as np
import onnx
import pytest
import tiny
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from difftrain.commands.failure import failure
from difftrain.export import cache, engine, loader, package, tensorrt
from difftrain.export.engine import LIBRARIES, Profile, Source, build, library
from difftrain.export.errors import ExportError
from difftrain.export.manifest import tabled
from difftrain.export.modules import Piece, pieces
from difftrain.export.opened import Opened
from difftrain.export.parity import Report
from difftrain.export.png import png, sheet
from difftrain.export.running import Refused, Runner, Walk, gpu, log, profile_for, runtime
from difftrain.export.tokens import BytePairs, UnknownWords, words
from difftrain.models.encoders import t5
from difftrain.models.errors import PartError
from difftrain.models.joined import Joined
from difftrain.models.labels import label
from difftrain.models.text import clip
from difftrain.models.tokenizer import clip_tokenizer
from difftrain.training import evaluate
from difftrain.training.bundle import Bundle, block, compile_spec, compile_text
from difftrain.training.folder import FolderError
from difftrain.training.known import Known
from difftrain.training.parts import build_parts

RTX = LIBRARIES[-1]
EVERY = Profile()
QUICKSTART = Path(__file__).parent.parent / "specs" / "quickstart.diff"


def convolution(path: Path, weight: float = 0.5, name: str = "conv") -> Source:
    """x [batch, 4, 8, 8] fp32 plus its convolution in fp16, as an ONNX file."""
    kernel = np.full((4, 4, 3, 3), weight, np.float16)
    nodes = [
        helper.make_node("Cast", ["x"], ["low"], to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["low", "kernel"], ["made"], name=name, pads=[1] * 4),
        helper.make_node("Cast", ["made"], ["high"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "high"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4, 8, 8]) for n in ("x", "y")
    ]
    held = [numpy_helper.from_array(kernel, "kernel")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], held)
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), str(path))
    return Source("conv", path, None)


@pytest.fixture
def source(tmp_path):
    return convolution(tmp_path / "a.onnx")


# ---- engines


def test_an_engine_is_built_without_a_gpu(source):
    made = build(source, EVERY, RTX)
    assert made.data[:4] == b"vtrt" and tuple(made.data[24:28]) == (1, 4, 0, 76)
    assert b'name="x.1"' in made.data and b"accelerators={sm80 }" in made.data
    assert made.about == {
        "library": "tensorrt-rtx",
        "runtime": "tensorrt_rtx",
        "version": metadata.version("tensorrt-rtx"),
        "gpu": "8.0 or later",
        "batch": [1, 8],
        "profiles": [[1, 1], [8, 8], [1, 8]],
        "refit": False,
        "inputs": {"x": ("float32", ["batch", 4, 8, 8])},
        "outputs": {"y": ("float32", ["batch", 4, 8, 8])},
        "layers": {
            "cast float16": 1,
            "cast float32": 1,
            "convolution float16": 1,
            "elementwise float32": 1,
        },
    }


@pytest.mark.parametrize(
    ("low", "high", "ranges"),
    [(1, 1, [[1, 1]]), (1, 2, [[1, 1], [2, 2]]), (2, 8, [[2, 2], [8, 8], [2, 8]])],
)
def test_which_kernels_are_for_a_batch(source, low, high, ranges):
    about = build(source, Profile(low, high), RTX).about
    assert about["profiles"] == ranges
    chosen = [profile_for(about, {"x": torch.empty(n, 4, 8, 8)}) for n in range(1, 10)]
    for count, number in enumerate(chosen, 1):
        first, last = ranges[number]
        inside = low <= count <= high
        assert first <= count <= last if inside else number == len(ranges) - 1
    assert chosen[low - 1] == 0 and chosen[high - 1] == min(1, high - low)


def test_what_no_engine_is_made_of(tmp_path):
    path = tmp_path / "b.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(
        ExportError, match=r"`b` has no engine \(.+\): export to another target, such as"
    ):
        build(Source("b", path, None), EVERY, RTX)


def test_all_parts_of_the_library_are_given_one_logger(source):
    trt = runtime(build(source, EVERY, RTX).about)
    said = log(trt)
    first, second = trt.Runtime(said), trt.Builder(log(trt))
    assert second.logger is said and not first.deserialize_cuda_engine(b"no engine")
    assert said.errors and said.first() != "the library does not say why"
    assert log(trt) is said and not said.errors


# ---- the library


def packages(monkeypatch, *names: str, gpu: bool = False):
    monkeypatch.setattr(engine, "installed", lambda name: name in names)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)


ALL = [it.package for it in LIBRARIES]


@pytest.mark.parametrize(
    ("here", "gpu", "wanted", "chosen"),
    [
        (ALL, True, "auto", "torch-tensorrt"),
        (ALL[1:], True, "auto", "torch-tensorrt-rtx"),
        (ALL[1:], False, "auto", "tensorrt-rtx"),
        (ALL, True, "tensorrt-rtx", "tensorrt-rtx"),
    ],
)
def test_the_first_library_that_builds_here(monkeypatch, here, gpu, wanted, chosen):
    packages(monkeypatch, *here, gpu=gpu)
    assert library(wanted).package == chosen


@pytest.mark.parametrize(
    ("here", "wanted", "code", "says"),
    [
        (
            [],
            "auto",
            3,
            "`tensorrt_rtx` is not installed here: install difftrain with its extra `tensorrt-rtx`",
        ),
        (
            ALL[2:],
            "torch-tensorrt",
            3,
            "`torch_tensorrt` is not installed here: install it and try again",
        ),
        (
            ALL[:1],
            "auto",
            3,
            "`torch-tensorrt` builds engines on a machine with a GPU, and here is none: install"
            " difftrain with its extra `tensorrt-rtx`, which needs none to build",
        ),
        (
            ALL,
            "trt",
            2,
            "`trt` is no engine library: use `torch-tensorrt`, `torch-tensorrt-rtx`,"
            " `tensorrt-rtx`",
        ),
    ],
)
def test_no_library(monkeypatch, here, wanted, code, says):
    packages(monkeypatch, *here)
    with pytest.raises(Exception) as problem:
        library(wanted)
    told = failure(problem.value)
    assert (told.code, str(told)) == (code, says)


class Linear(torch.nn.Module):
    def forward(self, x, t):
        return 2 * x + t[:, None]


def test_what_torch_tensorrt_is_called_with(monkeypatch):
    calls = []

    def convert(program, **options):
        calls.append((program, options))
        return b"engine"

    dynamo = SimpleNamespace(convert_exported_program_to_serialized_trt_engine=convert)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", SimpleNamespace(dynamo=dynamo, Input=dict))
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.15"))
    batch = torch.export.Dim("batch")
    inputs = {"x": torch.zeros(2, 3), "t": torch.zeros(2, dtype=torch.float16)}
    shapes = {name: {0: batch} for name in inputs}
    program = torch.export.export(Linear(), (), inputs, dynamic_shapes=shapes)
    made = build(Source("linear", Path(), lambda: program), Profile(1, 4), LIBRARIES[0])
    ((asked, options),) = calls
    assert asked is program and made.data == b"engine"
    assert options["kwarg_inputs"] == {
        "x": {
            "min_shape": (1, 3),
            "opt_shape": (4, 3),
            "max_shape": (4, 3),
            "dtype": torch.float32,
        },
        "t": {"min_shape": (1,), "opt_shape": (4,), "max_shape": (4,), "dtype": torch.float16},
    }
    assert options["immutable_weights"] and options["hardware_compatible"]
    assert made.about["library"] == "torch-tensorrt" and made.about["version"] == "10.15"


# ---- the cache


def test_engines_are_kept(source, tmp_path, monkeypatch):
    said, folder = [], tmp_path / "kept"
    first = cache.engine(source, EVERY, RTX, folder=folder, say=said.append)
    again = cache.engine(source, EVERY, RTX, folder=folder, say=said.append)
    assert again.data == first.data and again.about["inputs"]["x"][0] == "float32"
    assert [line.split(":")[0] for line in said] == [
        "building the engine of `conv`",
        "built the engine of `conv`",
        "the engine of `conv` was built before",
    ]
    other = convolution(tmp_path / "b.onnx", 0.25)
    cache.engine(other, EVERY, RTX, folder=folder, say=said.append)
    cache.engine(source, Profile(1, 2), RTX, folder=folder, say=said.append)
    monkeypatch.setattr(cache, "FORM", cache.FORM + 1)  # built in another way
    cache.engine(source, EVERY, RTX, folder=folder, say=said.append)
    assert len(list(folder.glob("*.engine"))) == 4 and len(list(folder.iterdir())) == 8


def test_an_engine_that_cannot_be_kept_is_made_all_the_same(source, tmp_path):
    said, place = [], tmp_path / "file"
    place.touch()
    made = cache.engine(source, EVERY, RTX, folder=place / "kept", say=said.append)
    assert made.data[:4] == b"vtrt" and made.about["weights"]
    assert (
        said[1] == f"the engine is not kept for other exports: `{place / 'kept'}`: not a directory"
    )


def test_kernels_that_cannot_be_kept_are_told(tmp_path, capsys):
    """What is drawn is not lost by it."""
    (place := tmp_path / "file").touch()
    part = Runner.__new__(Runner)
    part.compiled, part.kernels = SimpleNamespace(serialize=bytes), place / "kernels" / "key"
    sampler = loader.Sampler.__new__(loader.Sampler)
    sampler.parts = {"step": part}
    sampler._keep_kernels()
    says = f"compiled kernels are not kept: `{place / 'kernels'}`: not a directory\n"
    assert capsys.readouterr().err == says


def test_what_an_engine_is_found_by(source, tmp_path):
    graph, weights = cache.hashes(source.onnx)
    other = convolution(tmp_path / "b.onnx", 0.25).onnx
    assert cache.hashes(other)[0] == graph and cache.hashes(other)[1] != weights
    model = onnx.load(str(source.onnx))
    model.graph.node[0].doc_string = "a place in a source"
    onnx.save(model, str(other), save_as_external_data=True, size_threshold=0)
    assert cache.hashes(other) == (graph, weights)
    model.graph.node[1].attribute[0].ints[0] = 2
    onnx.save(model, str(other))
    assert cache.hashes(other)[0] != graph


@pytest.fixture
def anywhere(monkeypatch):
    """Engines for one GPU and those that take new weights are built on a GPU alone: a plain one
    stands in for them."""
    monkeypatch.setattr(cache, "build", lambda source, _, maker: build(source, EVERY, maker))


@pytest.mark.usefixtures("anywhere")
def test_an_engine_for_one_gpu_is_no_other_s(source, tmp_path, monkeypatch):
    said, folder = [], tmp_path / "kept"
    for profile in (EVERY, replace(EVERY, portable=False)):
        for capability in ((9, 0), (8, 9), (9, 0)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda it=capability: it)
            cache.engine(source, profile, RTX, folder=folder, say=said.append)
    kept = [line == "the engine of `conv` was built before" for line in said if "KiB" not in line]
    assert kept == [False, True, True, False, False, True]


@pytest.mark.usefixtures("anywhere")
def test_an_engine_that_takes_no_new_weights_is_built_again(source, tmp_path):
    said, folder, profile = [], tmp_path / "kept", Profile(refit=True)
    cache.engine(source, profile, RTX, folder=folder, say=said.append)
    (place,) = folder.glob("*.engine")
    place.write_bytes(b"no engine")
    other = convolution(tmp_path / "b.onnx", 0.25)
    data, why = engine.refitted(cache._read(place), other)
    assert data is None and why
    made = cache.engine(other, profile, RTX, folder=folder, say=said.append)
    assert said[-1] == f"`conv` is built again, as its engine takes no new weights: {why}"
    assert made.data[:4] == b"vtrt" and place.read_bytes() == made.data
    assert cache.engine(other, profile, RTX, folder=folder, say=said.append).data == made.data
    assert said[-1] == "the engine of `conv` was built before"


# ---- tokens without the packages of training


@pytest.fixture(scope="module")
def carried():
    """What a file knows of a small encoder with all of CLIP's tokens, and its files."""
    encoder = clip(layers=1, width=16, heads=2, length=8)
    (about,), data = package.encoders(encoder, "`clip`", ["a prompt of the run"])
    return about, data


ODD = [
    "",
    "a red apple",
    "It's 2024, they'll've",
    "GRÜẞE ΣΟΣ café 猫 😀",
    "a\tb\n\x1cc_d-e",
    "²½Ⅷ",
    "''s",
]


def test_tokens_are_those_of_the_tokenizer(carried):
    about, data = carried
    ours = BytePairs(about, data[about["file"]])
    assert ours.ids(ODD) == clip_tokenizer(say=list)(ODD, 8).tolist()
    assert about["vocabulary"] == [] and list(words("don't go")) == ["don", "'t", "go"]


def test_words_that_were_not_trained(carried):
    about, data = carried
    known = clip_tokenizer().used(["a red apple"])
    encoder = clip(layers=1, width=16, heads=2, length=8, vocabulary=known)
    ours = BytePairs({**about, "vocabulary": encoder.vocabulary}, data[about["file"]])
    assert ours.ids(["a red apple"]) == encoder.ids(["a red apple"]).tolist()
    with pytest.raises(UnknownWords, match="`blue`, `pear` never occurred in training"):
        ours.ids(["a red apple", "a blue pear"])


def test_encoders_that_a_file_carries():
    labels = label(count=3, vocabulary=["cat", "dog"])
    assert package.encoders(None, "nothing") == ([], {})
    about = {"kind": "labels", "classes": 3, "names": ["cat", "dog"], "field": "label"}
    assert package.encoders(labels, "`label`") == ([about], {})
    sizes = {"layers": 1, "width": 16, "heads": 2}
    both = Joined([clip(**sizes, length=8), t5(**sizes, length=6)])
    abouts, data = package.encoders(both, "`clip` and `t5`")
    assert [a["length"] for a in abouts] == [8, 6] and list(data) == ["text/0", "text/1"]


def test_an_encoder_that_no_file_carries():
    class Own(torch.nn.Module):
        tokens = None

    with pytest.raises(ExportError) as problem:
        package.encoders(Own(), "`own:words`")
    assert str(problem.value) == (
        "`own:words` encodes the prompts of this run, and the file carries the tokens of `sd.clip`,"
        " `t5.encoder` and `label.classes` alone: train with one of these, or export to `onnx`,"
        " which leaves tokens to the caller"
    )


# ---- pictures


def test_a_sheet_of_pictures(tmp_path):
    pictures = np.arange(5 * 6 * 7 * 3, dtype=np.uint8).reshape(5, 6, 7, 3)
    path = tmp_path / "a.png"
    path.write_bytes(png(sheet(pictures), {"seed": "3", "prompts": '["é"]'}))
    with Image.open(path) as image:
        assert image.text == {"seed": "3", "prompts": '["é"]'}
        pixels = np.asarray(image)
    assert pixels.shape == (4 + 3 * 10, 4 + 2 * 11, 3)
    assert (pixels[14:20, 15:22] == pictures[3]).all() and (pixels[24:, 15:] == 255).all()


# ---- the walk from noise to data


def untrained(solver: str, guidance: float = 2, device: str = "cpu", **parts) -> Opened:
    """A run of the tiny spec that was never trained."""
    text = tiny.spec(**parts).replace("ddim(steps = 2)", solver)
    text = text.replace("guidance = 2", f"guidance = {guidance}")
    return started(compile_text("tiny", text), device)


def started(bundle: Bundle, device: str = "cpu") -> Opened:
    """A run of a compiled spec, with the weights that training begins with."""
    spec = bundle.read()
    objective, options = spec.objective(), block(spec, "sample")
    target, data = block(spec, "tensorrt"), block(spec, "data")
    parts = build_parts(objective, Known(), 0, device, size=data["size"], sampling=True)
    model = evaluate.Model(bundle, evaluate.programs(bundle, device), parts, parts.weights, 7)
    return Opened(model, objective, options, target, data)


class Eager:
    """A piece as `Walk` calls an engine."""

    def __init__(self, piece: Piece):
        self.piece = piece

    def __call__(self, *inputs):
        made = self.piece.module(**dict(zip(self.piece.inputs, inputs, strict=True)))
        return made if isinstance(made, tuple) else (made,)


@torch.no_grad()
@pytest.mark.parametrize(
    ("solver", "guidance", "unrolled"),
    [
        ("ddim(steps = 3)", 2, 8),
        ("ddim(steps = 3, eta = 1)", 1, 8),
        ("ddim(steps = 3, eta = 1)", 2, 0),
        ("dpm_solver_pp(steps = 4)", 2, 0),
        ("multistep(steps = 2)", 1, 8),
    ],
)
def test_the_file_draws_what_sample_draws(solver, guidance, unrolled):
    run, texts = untrained(solver, guidance), ["a red apple", "a tree", "two cats"]
    made = pieces(run, "fp32", unrolled=unrolled)
    table = json.loads(json.dumps(tabled(run)))
    inputs = None if unrolled else list(made["step"].inputs)
    walk = Walk(Eager(made["sampler" if unrolled else "step"]), table, inputs, run.shape, "cpu")
    told = [made["text"].module(run.parts.text.ids(texts))]
    told += [made["text"].module(run.parts.null_ids("cpu"))] * run.guided
    latents = walk(run.sampling["seed"], torch.arange(3), told)
    pictures = made["decode"].module(latents)
    theirs = evaluate.sample(run.model, run.sampling, texts, 64)
    assert torch.allclose(pictures, (theirs.clamp(-1, 1) + 1) / 2, atol=1e-5)
    alone = walk(run.sampling["seed"], torch.tensor([2]), [told[0][2:], *told[1:]])
    assert torch.allclose(alone[0], latents[2], atol=1e-5)


# ---- the file


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The file of the quickstart, and what was said when it was made."""
    folder, said = tmp_path_factory.mktemp("file"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        run = started(compile_spec(QUICKSTART))
        return tensorrt.export(run, folder / "emoji", said.append), said


def test_the_file_holds_engines_and_a_loader(made):
    file, said = made
    with zipfile.ZipFile(file) as archive:
        manifest = json.loads(archive.read("manifest.json"))
        names = archive.namelist()
        sizes = {n: archive.getinfo(n).file_size for n in names if n.startswith("engines/")}
        assert archive.read("engines/step-64.engine")[:4] == b"vtrt"
    assert file.read_bytes().startswith(b"#!/usr/bin/env python3\n") and os.access(file, os.X_OK)
    assert sorted(sizes) == [f"engines/{n}.engine" for n in ("decode-64", "step-64", "text")]
    source = {n for n in names if n.endswith(".py") and not n.endswith("__init__.py")}
    assert source == {"__main__.py", *(f"difftrain/{n}" for n in package.CARRIED)}
    assert [e["piece"] for e in manifest["engines"]] == ["text", "step", "decode"]
    step = manifest["engines"][1]
    assert step["layers"]["convolution float16"] > 9 and "convolution float32" not in step["layers"]
    assert step["inputs"]["x"] == ["float32", ["batch", 4, 8, 8]]
    assert manifest["sizes"] == [64] and manifest["errors"]["latents"] < 1e-2
    assert said[-1].startswith("ONNX files, as here is no GPU: relative errors against the run")


def test_only_a_file_of_engines_is_written_over(made, tmp_path):
    run, photo = untrained("ddim(steps = 2)"), tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(photo)
    zipfile.ZipFile(other := tmp_path / "other.zip", "w").close()
    for path, says in (
        (photo, "is there already and holds no engines: give the name of another file"),
        (other, "is there already and holds no engines: give the name of another file"),
        (tmp_path, "is a folder: give the name of another file"),
    ):
        with pytest.raises(FolderError) as problem:
            tensorrt.export(run, path)
        assert str(problem.value) == f"`{path}` {says}"
    assert package.holds_engines(made[0]) and Image.open(photo).size == (8, 8)


def test_a_file_gets_the_folders_that_it_lies_in(tmp_path):
    path = package.pack(tmp_path / "new" / "deep" / "file", {}, {})
    assert package.holds_engines(path)


SIDES = [16, 32]


@pytest.fixture(scope="module")
def sided(tmp_path_factory):
    """A run of two evaluations, and its file for pictures of two sizes."""
    folder = tmp_path_factory.mktemp("sided")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        plain = exported.UNET.replace("attention = [0]", "attention = []")
        run, file, _ = drawing(folder, "ddim(steps = 2)", True, "cpu", SIDES, plain)
        return run, file


def inspected(file: Path) -> dict:
    """The manifest of a file."""
    with zipfile.ZipFile(file) as archive:
        return json.loads(archive.read("manifest.json"))


def test_an_engine_of_a_whole_sampler(sided):
    """It asks its network twice: of layers, those of the network that was parsed are counted."""
    run, file = sided
    with zipfile.ZipFile(file) as archive:
        assert archive.read("engines/sampler-16.engine")[:4] == b"vtrt"
    (told,) = (e for e in inspected(file)["engines"] if e["file"] == "engines/sampler-16.engine")
    once = sum(isinstance(m, torch.nn.Conv2d) for m in run.parts.modules["student"].modules())
    assert once > 9 and len(run.table.rows) == 2
    counts = {name: n for name, n in told["layers"].items() if name.startswith("convolution")}
    assert counts == {"convolution float16": 2 * once}
    assert told["inputs"]["noise"] == ["float32", ["batch", 3, 16, 16]]


def test_a_file_of_two_sizes(sided):
    manifest, sides = inspected(sided[1]), {side: f"-{side}.engine" for side in SIDES}
    with zipfile.ZipFile(sided[1]) as archive:
        names = sorted(n for n in archive.namelist() if n.startswith("engines/"))
    both = [f"engines/{piece}{end}" for piece in ("decode", "sampler") for end in sides.values()]
    assert names == [*both, "engines/text.engine"]
    assert manifest["sizes"] == SIDES
    assert manifest["shapes"] == {str(side): [3, side, side] for side in SIDES}
    for side, end in sides.items():
        chosen = loader.engines_of(manifest, side)
        assert sorted(e["file"] for e in chosen) == [*(n for n in names if end in n), names[-1]]
        noise = next(e["inputs"]["noise"] for e in chosen if e["piece"] == "sampler")
        assert noise[1] == ["batch", 3, side, side]


def test_each_size_of_a_file_has_times_of_its_own(monkeypatch):
    """As they are shifted by the size; and the errors of a file are the worst of its sizes."""
    shifted = {"backbone": exported.UNET, "more": "  t' = shift(t, sqrt(numel(x0) / 192))\n"}
    text = tiny.spec(**shifted).replace("ddim(steps = 2)", "euler(steps = 10)")
    text = text.replace("ddpm(beta = scaled_linear(0.00085, 0.012))", "linear")
    run = started(compile_text("tiny", text.replace("v_prediction", "flow")))
    every = []
    for i, side in enumerate(SIDES):
        own = replace(run, data=replace(run.data, values={**run.data.values, "size": side}))
        report = Report(1e-2, backbone=0.003 - i / 1000, latents=i / 1000, decode=0.0)
        every.append(tensorrt.Sized(own, pieces(own, "fp32"), {}, report))
    about = json.loads(json.dumps(tensorrt._described(every, EVERY)))
    about |= {"encoders": [], "sizes": SIDES}
    about["engines"] = [{"piece": "step", "size": side} for side in SIDES]
    for name in ("runtime", "gpu", "_runner"):  # there is neither a GPU nor an engine
        monkeypatch.setattr(loader, name, lambda *given: None)
    monkeypatch.setattr(loader, "Walk", partial(Walk, device="cpu"))
    for side, k in zip(SIDES, (2, 4), strict=True):
        times = loader.Sampler(None, about, side, None).walk.times
        assert times[1][0].item() == pytest.approx(0.9 * k / (0.9 * k + 0.1))
    assert about["errors"]["backbone"] == 0.003 and about["errors"]["latents"] == 0.001


def test_a_size_that_a_file_of_two_has_not(sided, capsys):
    assert loader.main([str(sided[1]), "--prompt", "a", "--size", "24"]) == 2
    assert capsys.readouterr().err == (
        "error: this file holds engines for a size of 16 or 32, not 24: export again with that"
        " size\n"
    )


def test_an_engine_that_does_not_run_is_told(sided):
    run, damaged = sided[0], engine.Engine(b"no engine", about(batch=[1, 8]))
    made = pieces(run, "fp16")
    with pytest.raises(ExportError) as problem:
        tensorrt._held(run, made, tensorrt.running(made, dict.fromkeys(made, damaged)), {})
    says = str(problem.value)
    assert says.startswith("the engine `sampler` does not run here: ")
    assert says.endswith("; export to another target, such as `onnx`")


def run_file(file: Path, *argv: str, cwd: Path) -> subprocess.CompletedProcess:
    """The file, run in a process that does not see this checkout."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(file), *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


REFUSED = {
    "unrecognized arguments: --bogus: `emoji --help` lists what it takes": ["--bogus"],
    **{
        f"argument {option}: `{value}` is no whole number from {between}: `emoji --help` lists what"
        " it takes": [option, value]
        for option, between, values in (
            ("-n", "1 to 100000", ("x", "0", "-3", "100001")),
            ("--seed", "0 to 4294967295", ("-1", "4294967296")),
            ("--size", "1 to 100000", ("0",)),
            ("--batch", "1 to 100000", ("0",)),
        )
        for value in values
    },
    "argument --prompt: it has bytes that are no UTF-8: `emoji --help` lists what it takes": [
        *("--prompt", os.fsdecode(b"\xff")),
    ],
    "`a.jpg` must end in .png or .npz": ["-o", "a.jpg"],
    "`file/a.png` cannot be written: give another file with `-o`": ["-o", "file/a.png"],
    "`folder.png` cannot be written: give another file with `-o`": ["-o", "folder.png"],
    'say with `--prompt "..."` what to draw': [],
    "this file holds engines for a size of 64, not 96: export again with that size": [
        *("--prompt", "a", "--size", "96"),
    ],
    "this file draws batches of 1 to 8, not 16: export again with `batch = 1..16`": [
        *("--prompt", "a", "--batch", "16"),
    ],
}


@pytest.mark.parametrize(("says", "argv"), REFUSED.items())
def test_what_the_file_refuses(made, tmp_path, monkeypatch, capsys, says, argv):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    assert loader.main([str(made[0]), *argv]) == 2
    assert capsys.readouterr().err == f"error: {says}\n"


def test_the_file_refuses_in_a_process_of_its_own(made, tmp_path):
    done = run_file(made[0], "--prompt", "a", "--size", "96", cwd=tmp_path)
    says = "error: this file holds engines for a size of 64, not 96: export again with that size\n"
    assert (done.returncode, done.stderr) == (2, says)


SIZES = {
    "`sizes` is a list of sides of pictures: write `sizes = [256, 512]`": 40,
    "`sizes` lists [40], and each is the side of pictures in pixels: list whole numbers, as in"
    " `sizes = [256, 512]`": [[40]],
    "`sizes` lists 40.5, and each is the side of pictures in pixels: list whole numbers, as in"
    " `sizes = [256, 512]`": [40.5],
    "`sizes` lists -4, and each is the side of pictures in pixels: list whole numbers, as in"
    " `sizes = [256, 512]`": [64, -4],
    "the codec takes pictures whose sides are multiples of 8, not 63 x 63: change `size`": [63],
}


@pytest.mark.parametrize(("says", "sizes"), SIZES.items())
def test_sizes_that_cannot_be_drawn(tmp_path, says, sizes):
    run = untrained("ddim(steps = 2)")
    run.target.values["sizes"] = sizes
    with pytest.raises((ExportError, PartError)) as problem:
        tensorrt.export(run, tmp_path / "a")
    assert str(problem.value) == says


def test_a_size_that_the_network_does_not_take(tmp_path):
    class Picky(torch.nn.Module):
        def forward(self, x, t, cond=None, null=None):
            return x.reshape(2, 7)

    backbone = pieces(untrained("ddim(steps = 2)"), "fp32")["backbone"]
    with pytest.raises(ExportError) as problem:
        tensorrt._takes(replace(backbone, module=Picky()), 64)
    assert str(problem.value).startswith("the network takes no samples of size 64 (RuntimeError: ")
    assert str(problem.value).endswith("): export with other `sizes`")


@pytest.mark.parametrize("ending", loader.SAVED)
def test_what_is_drawn_says_of_which_file_it_is(made, tmp_path, ending):
    manifest, out = inspected(made[0]), tmp_path / f"drawn{ending}"
    pictures = np.zeros((1, 8, 8, 3), np.uint8)
    loader._write(out, manifest, ["a \u732b"], SimpleNamespace(seed=3), pictures)
    shown = ending == ".png"
    said = Image.open(out).text if shown else json.loads(str(np.load(out)["settings"]))
    assert said.pop("seed") == "3" and json.loads(said.pop("prompts")) == ["a \u732b"]
    assert (said["step"], said["guidance"]) == ("7", "3")
    assert said == {n: str(manifest[n]) for n in ("spec", "graph", "step", "solver", "guidance")}


def test_the_file_tells_about_itself(made, tmp_path):
    done = run_file(made[0], "--inspect", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["name"] == "quickstart"


def about(**changed) -> dict:
    """What a manifest says of an engine."""
    version = metadata.version("tensorrt-rtx")
    return {"runtime": "tensorrt_rtx", "version": version, "gpu": "8.0 or later", **changed}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"runtime": "tensorrt_none"}, "these engines run under tensorrt-none "),
        ({"version": "1.3.0"}, "these engines were built by tensorrt-rtx 1.3.0, and here is "),
    ],
)
def test_another_library(changed, says):
    with pytest.raises(Refused, match=says) as problem:
        runtime(about(**changed))
    assert problem.value.code == 3


@pytest.mark.parametrize(
    ("built", "here", "says"),
    [
        ("8.0 or later", (7, 5), "compute capability 8.0 or later, and `T4` has 7.5"),
        ("9.0", (8, 0), "compute capability 9.0, and `T4` has 8.0: export again on this machine"),
        ("9.0", None, "compute capability 9.0, and here is none"),
        ("8.0 or later", (9, 0), ""),
        ("9.0", (9, 0), ""),
    ],
)
def test_another_gpu(monkeypatch, built, here, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: here)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    with pytest.raises(Refused, match=says) if says else nullcontext():
        gpu(about(gpu=built))


def test_noise_of_another_law(tmp_path):
    run = untrained("ddim(steps = 2)")
    own = replace(run.model, programs=replace(run.model.programs, noise=object()))
    with pytest.raises(ExportError, match="the noise of `tiny` has a law of its own"):
        tensorrt.export(replace(run, model=own), tmp_path / "a")


# ---- on a GPU


TEXTS = ["a red apple", "a tree", "two cats"]
ASKED = [*(word for text in TEXTS for word in ("--prompt", text)), "--seed", "3"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """One place for the engines of a few exports, which share some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def drawing(
    folder: Path, solver: str, portable: bool, device="cuda", sizes=(), backbone=exported.UNET
):
    """(run, file, what was said) of the smallest network with convolutions, attention and norms."""
    run, said = untrained(solver, device=device, backbone=backbone, size=16), []
    run.target.values.update(portable=portable, sizes=list(sizes))
    return run, tensorrt.export(run, folder / "emoji", said.append), said


@pytest.mark.gpu
@pytest.mark.usefixtures("kept")
@torch.no_grad()
@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("solver", ["ddim(steps = 2)", "dpm_solver_pp(steps = 12)"])
def test_the_file_draws_as_the_run(tmp_path, capsys, monkeypatch, solver, portable):
    monkeypatch.chdir(tmp_path)
    run, file, said = drawing(tmp_path, solver, portable)
    assert said[-1].startswith("engines: relative errors against the run in fp32")
    assert loader.main([str(file), *ASKED, "-o", "a.npz"]) == 0
    ours = np.load("a.npz")["x"].astype(float)
    assert np.abs(ours - drawn(run)).mean() < 2
    assert loader.main([str(file), *ASKED, "--batch", "1", "-o", "b.npz"]) == 0
    assert np.abs(ours - np.load("b.npz")["x"]).mean() < 2
    assert loader.main([str(file), *ASKED, "--batch", "9"]) == 2
    assert "draws batches of 1 to 8, not 9" in capsys.readouterr().err


def drawn(run: Opened) -> np.ndarray:
    """What the run itself draws of the texts, [3, H, W, 3] in 0..255."""
    options = replace(run.sampling, values={**run.sampling.values, "seed": 3})
    made = evaluate.sample(run.model, options, TEXTS, run.data["size"])
    return ((made.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()


@pytest.mark.gpu
@pytest.mark.usefixtures("kept")
@torch.no_grad()
def test_the_file_draws_in_a_process_of_its_own(tmp_path):
    run, file, _ = drawing(tmp_path, "ddim(steps = 2)", True)
    done = run_file(file, *ASKED, "-o", "a.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert np.abs(np.load(tmp_path / "a.npz")["x"].astype(float) - drawn(run)).mean() < 2


@pytest.mark.gpu
@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("size", SIDES)
def test_a_file_draws_at_each_of_its_sizes(tmp_path, monkeypatch, size):
    monkeypatch.chdir(tmp_path)
    _, file, _ = drawing(tmp_path, "ddim(steps = 2)", True, sizes=SIDES)
    assert loader.main([str(file), *ASKED, "--size", str(size), "-o", "a.npz"]) == 0
    assert np.load("a.npz")["x"].shape == (3, size, size, 3)


@pytest.mark.gpu
def test_new_weights_by_refit(source, tmp_path):
    said, folder = [], tmp_path / "kept"
    profile = Profile(1, 8, refit=True)
    cache.engine(source, profile, RTX, folder=folder, say=said.append)
    other = convolution(tmp_path / "b.onnx", 0.25)
    made = cache.engine(other, profile, RTX, folder=folder, say=said.append)
    assert len(list(folder.glob("*.engine"))) == 1
    assert said[-1] == "gave the engine of `conv` new weights"
    x = torch.randn(2, 4, 8, 8, device="cuda")
    kernel = torch.full((4, 4, 3, 3), 0.25, device="cuda")
    expected = x + torch.nn.functional.conv2d(x, kernel, padding=1)
    ours = Runner("conv", made.data, made.about)(x)[0]
    assert torch.allclose(ours, expected, atol=2e-2)


@pytest.mark.gpu
def test_a_shape_outside_the_profile(source):
    made = build(source, Profile(1, 4), RTX)
    runner = Runner("conv", made.data, made.about)
    with pytest.raises(Refused, match="takes `x` in batches of 1 to 4 as .* not .5, 4, 8, 8."):
        runner(torch.zeros(5, 4, 8, 8, device="cuda"))
