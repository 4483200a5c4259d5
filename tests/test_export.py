"""`difftrain export`: files that sample as the run does, or no files."""

import json
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import exported
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from difftrain.cli import main
from difftrain.export import parity, pt2
from difftrain.export.errors import ExportError, Parted
from difftrain.export.inlined import closed
from difftrain.export.modules import PRECISIONS, Piece, pieces
from difftrain.export.onnx import SOLVERS, write
from difftrain.export.opened import opened
from difftrain.export.trace import batches, traced
from difftrain.models.attention import CrossAttention, SelfAttention


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with every spec; runs are trained when they are asked for."""
    folder = tmp_path_factory.mktemp("home")
    exported.write(folder)
    return folder


@pytest.fixture
def run(home, monkeypatch):
    """The folder of a finished run by the name of its spec."""
    monkeypatch.chdir(home)
    return exported.train


@contextmanager
def made(run: str, precision: str = "fp32", **changes: str):
    """(the opened run, its pieces) with other options of `sample`."""
    asked = {f"sample.{name}": value for name, value in changes.items()}
    with opened(run, "onnx", asked) as it:
        yield it, pieces(it, precision)


def told(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


# ---- modules against the solver


STEPPED = {"unet": "dpm_solver_pp(steps = 20)", "classes": "heun(steps = 6)"}
STEPPED |= {"arrays": "euler_maruyama(steps = 12)", "shown": "ddim(steps = 10)"}


@pytest.mark.parametrize("name", ["unet", "classes", "jump", "arrays", "shown"])
def test_an_unrolled_sampler_is_the_run(run, name):
    with made(run(name)) as (it, parts):
        assert {"text"} & parts.keys() == ({"text"} if name in ("unet", "jump") else set())
        assert "sampler" in parts and "step" not in parts
        report = parity.gate(it, parts, parity.bare(parts), "fp32")
    assert report.backbone < 1e-5 and report.latents < 1e-5 and report.decode < 1e-5


@pytest.mark.parametrize("name", STEPPED)
def test_a_loop_of_steps_is_the_run(run, name):
    with made(run(name), solver=STEPPED[name]) as (it, parts):
        assert "step" in parts and "sampler" not in parts
        assert len(it.table.rows) > 8
        call = parity.bare(parts)
        report = parity.gate(it, parts, call, "fp32")
        assert report.latents < 2e-5
        assert parity.gate(it, parts, parity.by_step(parts, call), "fp32") == report


def test_guidance_is_inside(run):
    """In an interval of noise levels, and rescaled."""
    ways = {"guidance_interval": "0.1..3", "guidance_rescale": "0.7"}
    with made(run("unet"), **ways) as (it, parts):
        asked = parts["backbone"].inputs
        assert parity.gate(it, parts, parity.bare(parts), "fp32").latents < 1e-5
    with made(run("unet"), guidance="1") as (_, plain):
        assert "null" in asked and "null" not in plain["backbone"].inputs


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_schedule_stays_in_single_precision(run, precision):
    with made(run("unet"), precision) as (it, parts):
        network = parts["backbone"].module.network.network
        assert {p.dtype for p in network.parameters()} == {PRECISIONS[precision]}
        assert all(b.dtype == torch.float32 for b in parts["backbone"].module.tables.buffers())
        report = parity.gate(it, parts, parity.bare(parts), precision)
    assert 1e-6 < report.latents < parity.TOLERANCE[precision]


def test_pictures_are_those_of_sample(run, tmp_path):
    """The exported noise is that of `difftrain sample`, and so are the pictures."""
    where = tmp_path / "all.npz"
    drawn = ["sample", run("unet"), "--save", str(where), "-o", str(tmp_path / "grid.png")]
    assert main([*drawn, "--prompt", "picture a", "-n", "2"]) == 0
    with made("runs/unet") as (it, parts), torch.no_grad():
        eager = parity.sampled(it)
        (latents,) = parity.bare(parts)("sampler", sampler_inputs(it, eager))
        pictures = parts["decode"].module(latents)
    with np.load(where) as file:
        theirs = torch.from_numpy(file["pictures"]).float() / 255
    assert (pictures - theirs).abs().max() < 0.51 / 255


def sampler_inputs(it, eager) -> dict:
    noises = [eager.noise(draw) for draw in it.table.draws]
    more = {"noises": torch.stack(noises)} if noises else {}
    return {"noise": eager.noise(0), **eager.told, **more}


# ---- ONNX


@pytest.mark.parametrize("name", ["classes", "jump", "arrays"])
def test_onnx_files_sample_in_any_batch(run, name, tmp_path, capsys):
    folder = tmp_path / "made"
    assert main(["export", run(name), "--to", "onnx", "-o", str(folder)]) == 0
    assert capsys.readouterr().out.strip().endswith(str(folder))
    about = json.loads((folder / "manifest.json").read_text())
    assert {f"{p}.onnx" for p in about["pieces"]} | {"manifest.json", "README.md"} == {
        p.name for p in folder.iterdir()
    }
    assert shown(folder, about)["x"].shape == (2, *about["latents"])
    assert about["errors"]["latents"] < 1e-4 and about["precision"] == "fp32"
    with made(run(name)) as (_, parts):
        assert_same(folder / "sampler.onnx", parts["sampler"])


def shown(folder: Path, about: dict) -> dict:
    """What the code of a README makes, which is run as it stands there."""
    code, made = (folder / "README.md").read_text().split("```")[1].removeprefix("python\n"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(code, made)
    output = about["pieces"]["decode"]["outputs"][0]
    assert len(made[output]) == 2 and bool((made[output] == made[output]).all())
    return made


@pytest.mark.parametrize(
    ("layer", "given"), [(SelfAttention, ["x"]), (CrossAttention, ["x", "text"])]
)
def test_heads_are_parted_behind_the_batch(tmp_path, layer, given):
    """An engine makes one product of q, k and v then, and not three."""
    inputs = {name: torch.randn(2, 5, 16) for name in given}
    piece = Piece(layer(16, 2, fused=True).eval(), inputs, dict.fromkeys(given, 0), ("y",))
    file = write({"text": piece, "backbone": piece}, tmp_path, (1, 4), str)["backbone"]
    nodes = [n for n in onnx.load(file).graph.node if n.op_type == "Transpose"]
    moves = [list(node.attribute[0].ints) for node in nodes]
    assert max(map(len, moves)) == 5
    assert all(move[0] == 0 for move in moves if len(move) > 2)


def test_a_sampler_holds_its_weights_once(run):
    """However often it asks its network; what its condition alone makes is made once."""
    with made(run("unet")) as (it, parts), TemporaryDirectory() as folder:
        assert len(it.table.rows) == 2
        files = write(parts, Path(folder), (1, 8), print)
        backbone, sampler = (onnx.load(files[name]).graph for name in ("backbone", "sampler"))
    large = [v.raw_data for v in sampler.initializer if len(v.raw_data) > 64]
    assert len(large) == len(set(large)) > 20
    once, twice = (Counter(n.op_type for n in graph.node) for graph in (backbone, sampler))
    assert twice["Conv"] == 2 * once["Conv"] and twice["Softmax"] == 2 * once["Softmax"]
    assert twice["MatMul"] < 2 * once["MatMul"] and twice["Backbone"] == 0, (once, twice)


@pytest.mark.parametrize("name", ["unet", "classes", "jump"])
@pytest.mark.parametrize("solver", [{}, {"solver": "ddim(steps = 20)"}], ids=["whole", "step"])
def test_pieces_are_traced_on_any_device(run, name, solver):
    """`meta` stands for a GPU: what is made on the CPU in between would be told."""
    if name == "jump" and solver:
        solver = {"solver": "jump(steps = 12)"}
    with made(run(name), **solver) as (_, parts):
        for kind, piece in parts.items():
            own = closed(piece, parts["backbone"]) if kind in SOLVERS else piece
            inputs = {n: value.to("meta") for n, value in own.inputs.items()}
            away = replace(own, module=own.module.to("meta"), inputs=inputs)
            program = traced(kind, away, batches(kind, (1, 8)))
            values = [n.meta["val"] for n in program.graph.nodes if "val" in n.meta]
            found = {v.device.type for v in values if isinstance(v, torch.Tensor) and v.dim()}
            assert found <= {"meta", "cpu"} and "meta" in found


@torch.no_grad()
def assert_same(file, piece) -> None:
    """Asserts that a file answers as its module does, for one sample and for three."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        inputs = piece.example(count)
        theirs = piece.module(**inputs)
        ours = session.run(None, {n: v.numpy() for n, v in inputs.items()})
        for a, b in zip(ours, theirs if isinstance(theirs, tuple) else (theirs,), strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-4, atol=1e-4)


def test_a_long_solver_is_one_step_and_a_table(run, tmp_path):
    folder = tmp_path / "made"
    solver = "sample.solver=dpm_solver_pp(steps = 20)"
    assert main(["export", run("unet"), "--to", "onnx", "-o", str(folder), "--set", solver]) == 0
    with made("runs/unet", solver="dpm_solver_pp(steps = 20)") as (_, parts):
        assert_same(folder / "step.onnx", parts["step"])
    about = json.loads((folder / "manifest.json").read_text())
    assert "step" in about["pieces"] and len(about["table"]["rows"]) == 20
    assert about["table"]["columns"] == ["x", "x0_hat", "eps_hat", "x0_hat 1 ago", "noise"]
    assert about["pieces"]["step"]["inputs"]["kept"]["shape"] == [1, "batch", 3, 16, 16]
    assert about["condition"]["kind"] == "text" and about["condition"]["length"] == 8
    assert shown(folder, about)["pictures"].shape == (2, 3, 16, 16)


def test_noise_of_another_law_is_told(run, tmp_path):
    """The code of the README draws what is not that."""
    plain, law = Path("arrays.diff").read_text(), "flow\n  eps ~ uniform_noise(x0, -1, 1)\n"
    run("arrays"), Path("lawful.diff").write_text(plain.replace("flow\n", law))
    for name, said in (("arrays", "standard normal"), ("lawful", "of a law of its own")):
        folder = tmp_path / name
        assert main(["export", run(name), "--to", "onnx", "-o", str(folder)]) == 0
        about = json.loads((folder / "manifest.json").read_text())
        assert about["noise"] == said and about["errors"]["latents"] < 1e-4
        told = "has a law of its own" in (folder / "README.md").read_text()
        assert told == (name == "lawful")


# ---- packages


def test_packages_sample_as_the_run(run, tmp_path):
    folder = tmp_path / "made"
    assert main(["export", run("arrays"), "--to", "pt2", "-o", str(folder)]) == 0
    about = json.loads((folder / "manifest.json").read_text())
    assert about["device"] == "cpu" and about["errors"]["latents"] < 1e-4
    assert shown(folder, about)["arrays"].shape == (2, 2, 12)
    loaded = torch._inductor.aoti_load_package(str(folder / "sampler.pt2"))
    with made(run("arrays")) as (_, parts), torch.no_grad():
        inputs = parts["sampler"].example(5)
        torch.testing.assert_close(loaded(**inputs), parts["sampler"].module(**inputs))


def test_packages_of_a_network_with_text_sample_as_the_run(run, tmp_path):
    """In a fixed batch; the sampler holds the network, which is packaged once only."""
    with opened(run("unet"), "pt2", {"export.pt2.batch": "2"}) as it:
        parts, batch = pieces(it, "fp32"), it.batch
        files = {n: pt2.write(n, parts[n], tmp_path, batch, print) for n in ("text", "sampler")}
        calls = {True: pt2.packages(parts, files), False: parity.bare(parts)}
        report = parity.gate(it, parts, lambda n, asked: calls[n in files](n, asked), "fp32")
    assert batch == (2, 2) and 0 < report.latents < 1e-5 and 0 < report.text < 1e-5


# ---- refusals


def test_what_parts_from_the_run_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(parity.TOLERANCE, "fp32", 0.0)
    folder = tmp_path / "made"
    assert main(["export", run("arrays"), "--to", "onnx", "-o", str(folder)]) == 4
    line = told(capsys)
    assert line.startswith("error: what was exported parts from the run: the relative error of")
    assert line.endswith("and 0e+00 is allowed in fp32; export to another target")
    assert not list(tmp_path.iterdir())


def test_a_batch_that_has_kernels_of_its_own_is_held_against_the_run(run):
    with made(run("unet")) as (_, parts):
        own = parity.bare(parts)

        def wrong_alone(name, inputs):
            return tuple(value * (1 + (len(value) == 1)) for value in own(name, inputs))

        parity.every_size(parts, wrong_alone, {"backbone": [2, 8], "decode": [8]}, "fp32")
        with pytest.raises(Parted, match="in a batch of 1 the relative error of `decode` is 1.0e"):
            parity.every_size(parts, wrong_alone, {"backbone": [2], "decode": [8, 1]}, "fp32")


@pytest.mark.parametrize("piece", ["text", "backbone", "sampler", "decode"])
def test_every_piece_is_held_against_the_run(run, piece):
    with made(run("unet")) as (it, parts):
        own = parity.bare(parts)

        def call(name, inputs):
            return tuple(value * (1 + 0.01 * (name == piece)) for value in own(name, inputs))

        told = {"sampler": "latents"}.get(piece, piece)
        with pytest.raises(Parted, match=f"the relative error of `{told}` is 1.0e-02"):
            parity.gate(it, parts, call, "fp32")


def test_the_evaluation_where_they_part_is_named(run):
    """A network that goes wrong from the third evaluation on."""
    with made(run("arrays"), solver="euler(steps = 12)") as (it, parts):
        ask, wrong = parity.bare(parts), it.table.rows[2].t

        def call(name, inputs):
            found = ask(name, inputs)
            bad = name == "step" and inputs["t"].item() == pytest.approx(wrong)
            return (found[0] * 1.1, *found[1:]) if bad else found

        with pytest.raises(Parted, match=r"`latents` is .*, from evaluation 3 of 12 on"):
            parity.gate(it, parts, call, "fp32")


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--to", "toaster"], "error: there is no target `toaster`: it is one of `onnx`, `pt2`,"),
        (["--to", "onnx", "-o", "photos"], "error: `photos` is there already: say with `-o` where"),
        (
            ["--to", "onnx", "--set", "train.steps=3"],
            "error: `train.steps` is not read here: set an option of `sample` or `data` or",
        ),
        (["--to", "onnx", "--weights", "w"], "error: there is no file `w`: give a checkpoint, or"),
        (
            ["--to", "onnx", "--set", "sample.guide=runs/arrays"],
            "error: `guide = runs/arrays` is a second network, and what is exported has one: leave",
        ),
        (
            ["--to", "onnx", "--set", "export.tensorrt.batch=3"],
            "error: `export.tensorrt.batch` is an option of another target than `onnx`: leave it",
        ),
        (
            ["--to", "pt2", "--set", "data.size=32"],
            "error: `data.size` is the side of pictures, and this run draws arrays: leave it out",
        ),
        *(
            (
                ["--to", target, "--set", changed],
                f"error: `{changed.partition('=')[0]}` changes nothing of what is exported: leave",
            )
            for target, changed in (
                ("onnx", "sample.count=3"),
                ("tensorrt", "data.batch=3"),
                ("diffusers", 'data.source=folder("photos")'),
                ("pt2", "data.captions=any"),
            )
        ),
        (
            ["--to", "tensorrt", "--set", "export.tensorrt.sizes=[32]"],
            "error: `sizes` lists sides of pictures, and this run draws arrays of 2 x 12: leave it",
        ),
    ],
)
def test_bad_input_is_one_sentence(run, capsys, more, line):
    capsys.readouterr()
    assert main(["export", run("arrays"), *more]) == 2
    assert told(capsys).startswith(line)


def test_what_the_settings_make_doubtful_is_told(run, capsys):
    asked = ["--set", "sample.guidance=1", "--set", "sample.guidance_interval=0.1..3"]
    assert main(["export", run("unet"), "--to", "onnx", *asked, "-o", "photos"]) == 2
    assert "warning[DIF314]: `guidance_interval` changes nothing here" in capsys.readouterr().err


TARGETS = ["diffusers", "onnx", "pt2", "tensorrt"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_place_in_a_file_is_told_first(run, capsys, target):
    assert main(["export", run("unet"), "--to", target, "-o", "unet.diff/x"]) == 2
    line = told(capsys)
    assert line.startswith("error: `unet.diff/x` lies in `") and "which is no folder" in line


@pytest.mark.parametrize("target", ["onnx", "tensorrt"])
def test_a_missing_package_is_told_first(run, capsys, monkeypatch, target):
    name = run("arrays")
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", name, "--to", target, "-o", "made"]) == 3
    assert capsys.readouterr().err == (
        "error: `onnxruntime` is not installed here: install difftrain with its extra `onnx`\n"
    )


@pytest.mark.parametrize("target", TARGETS)
def test_a_checkpoint_of_another_spec_is_told(run, capsys, target):
    run("arrays"), run("shown")
    other = "runs/shown/checkpoints/step-000000003.safetensors"
    assert main(["export", "runs/arrays", "--to", target, "--weights", other]) == 2
    theirs, ours = (
        json.loads(Path(f"runs/{name}/manifest.json").read_text())["graph"]
        for name in ("shown", "arrays")
    )
    assert told(capsys).startswith(
        f"error: the checkpoint `{other}` belongs to another objective (graph {theirs}, and this"
        f" spec is {ours}): "
    )


@pytest.mark.parametrize("target", ["onnx", "pt2", "tensorrt"])
def test_a_size_that_the_network_does_not_take_is_told(run, capsys, target):
    changed = ["--set", "data.size=18"]
    assert main(["export", run("classes"), "--to", target, *changed]) == 2
    assert told(capsys) == (
        "error: latents of 18 x 18 cannot be cut into patches of 4: choose another `size` or"
        " another `patch`"
    )


def test_a_network_that_cannot_be_traced_is_told(run, monkeypatch):
    class Reads(torch.nn.Module):
        def forward(self, latents):
            return latents if latents.sum().item() > 0 else -latents

    with made(run("arrays")) as (_, parts), pytest.raises(ExportError) as problem:
        traced("decode", replace(parts["decode"], module=Reads()), (1, 4))
    assert str(problem.value).startswith("`decode` cannot be traced for batches of 1 to 4 (")


# ---- the block


def test_targets_have_options(run):
    asked = {"export.onnx.precision": "fp16", "export.onnx.batch": "2..4"}
    with opened(run("arrays"), "onnx", asked) as it:
        assert it.target["precision"] == "fp16" and it.batch == (2, 4)
    with opened(run("arrays"), "onnx", {"export.onnx.batch": "3"}) as it:
        assert it.batch == (3, 3)
        parts = pieces(it, "fp32")
        assert parity.gate(it, parts, parity.bare(parts), "fp32").latents < 1e-5
        assert len(parity.sampled(it).latents) == 3
        assert takes(traced("backbone", parts["backbone"], it.batch), "x") == 3
    with opened(run("jump"), "onnx", {"export.onnx.batch": "3"}) as it:
        program = traced("text", pieces(it, "fp32")["text"], batches("text", it.batch))
        assert not isinstance(takes(program, "ids"), int)


def takes(program, name: str):
    """The size of the first dimension that a program takes."""
    (node,) = (n for n in program.graph.nodes if n.name == name)
    return node.meta["val"].shape[0]
