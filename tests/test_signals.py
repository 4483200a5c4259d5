"""Data of any shape with a user's own Python: linted, compiled, trained, sampled, validated."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from difftrain.cli import main
from difftrain.models.raw import raw
from difftrain.training.arrays import open_arrays
from difftrain.training.bundle import compile_spec
from difftrain.training.sources import DataError

RECIPES = Path(__file__).parent.parent / "specs" / "recipes"
SHORT = ("--steps", "2")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the recipe's data and a run of two steps, and the recipe beside it."""
    folder = tmp_path_factory.mktemp("home")
    spec = folder / "spec"
    spec.mkdir()
    for name in ("signals.diff", "signals.py"):
        shutil.copy(RECIPES / name, spec / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        runpy.run_path(str(spec / "signals.py"), run_name="__main__")
        assert main(["train", "spec/signals.diff", *SHORT]) == 0
    return folder


# ---- the recipe


def test_a_run_leaves_arrays_and_losses(home):
    run = home / "runs" / "signals"
    with np.load(run / "samples.npz") as file:
        assert file["x"].shape == (12, 1, 64) and file["x"].dtype == np.float32
        assert set(file["captions"]) == {"saw", "sine", "square"}
        settings = json.loads(str(file["settings"]))
    assert settings["step"] == 2 and settings["solver"].startswith("euler")
    losses = json.loads((run / "validation.json").read_text())
    assert set(losses) == {"loss", "shuffled", "mean"} and all(v > 0 for v in losses.values())


def test_prompts_are_classes(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    out = tmp_path / "drawn.npz"
    drawn = ["sample", "runs/signals", "--prompt", "saw", "-n", "3", "-o", str(out)]
    assert main(drawn) == 0
    with np.load(out) as file:
        assert file["x"].shape == (3, 1, 64) and list(file["captions"]) == ["saw"] * 3
    assert main(["sample", "runs/signals", "--prompt", "cosine", "-o", str(out)]) == 2
    told = capsys.readouterr().err.strip().split("\n")[-1]
    assert told == "error: `cosine` is no class of `shape`: did you mean `sine`?"


def test_a_resumed_run_equals_an_uninterrupted_one(home, monkeypatch):
    monkeypatch.chdir(home)
    train = ["train", "spec/signals.diff", "--set", "train.decay=constant"]
    assert main([*train, "--steps", "3", "--out", "whole"]) == 0
    assert main([*train, "--steps", "1", "--out", "begun"]) == 0
    assert main([*train, "--steps", "3", "--out", "begun", "--resume", "auto"]) == 0
    name = "checkpoints/step-000000003.safetensors"
    whole, begun = (load_file(home / run / name) for run in ("whole", "begun"))
    assert all(torch.equal(whole[n], begun[n]) for n in whole)


def test_the_executable_carries_the_python(home, tmp_path):
    made, data = tmp_path / "made", str(home / "signals.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(["compile", "spec/signals.diff", "-o", str(made)]) == 0
    manifest = json.loads(compile_spec(home / "spec" / "signals.diff").texts["manifest.json"])
    assert "picture" not in manifest["shapes"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [sys.executable, "-I", str(made), "--data", data, *SHORT, "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "parts" / "signals.py").is_file()


def test_compiling_without_the_data_is_told(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compile", str(home / "spec" / "signals.diff"), "-o", "made"]) == 0
    assert "there is no file `signals.npz`" in capsys.readouterr().err


# ---- Python of the user's

SPEC = """diff 1
backbone own(width = 4) {{ module = {module} }}
objective o {{
  process         = linear
  prediction_type = flow
  backbone        = own{options}
}}
data   {{ source = arrays("data.npz"), batch = 2 }}
train  {{ steps = 1 }}
sample {{ solver = euler(steps = 2), count = 2 }}
"""
NETWORK = """
import torch
from torch import nn
{head}

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, t, cond):
        return {answer}


def network({takes}):
    return {made}
"""
PLAIN = {"head": "", "answer": "self.weight * x", "takes": "width", "made": "Scaled()"}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder to train in, with a spec and a network; what is named differs from the plain one."""
    monkeypatch.chdir(tmp_path)

    def make(module='"blocks:network"', options="", shape=(4, 3), **parts):
        Path("own.diff").write_text(SPEC.format(module=module, options=options))
        Path("blocks.py").write_text(NETWORK.format(**{**PLAIN, **parts}))
        values = np.random.default_rng(0).normal(size=shape)
        np.savez("data.npz", x=values)
        return tmp_path

    return make


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 5), (4, 1, 3, 2, 2)])
def test_arrays_of_any_shape_without_condition(own, shape):
    folder = own(shape=shape)
    assert main(["train", "own.diff"]) == 0
    with np.load(folder / "runs" / "own" / "samples.npz") as file:
        assert file["x"].shape == (2, *(shape[1:] if len(shape) > 2 else (1, 3)))


def test_reading_a_spec_runs_nobodys_code(own):
    own(head="raise SystemExit(99)")
    assert main(["lint", "own.diff"]) == main(["explain", "own.diff"]) == 0


def test_files_may_import_each_other(own):
    folder = own(head="import lengths.all")
    (folder / "lengths").mkdir()
    (folder / "lengths" / "__init__.py").write_text("")
    (folder / "lengths" / "all.py").write_text("from further import ONE\n")
    (folder / "further.py").write_text("ONE = 1\n")
    assert main(["train", "own.diff"]) == 0
    run = folder / "runs" / "own" / "parts"
    kept = {p.relative_to(run).as_posix() for p in run.rglob("*.py")}
    assert kept == {"blocks.py", "further.py", "lengths/__init__.py", "lengths/all.py"}
    assert not {"blocks", "further", "lengths"} & sys.modules.keys()


def test_two_files_of_one_name_stay_apart(own):
    folder = own()
    other = folder / "other"
    other.mkdir()
    (other / "own.diff").write_text(Path("own.diff").read_text())
    wide = {**PLAIN, "answer": "self.weight * 2 * x", "made": "nn.Sequential(Scaled())[0]"}
    (other / "blocks.py").write_text(NETWORK.format(**wide))
    for spec, out in (("own.diff", "a"), ("other/own.diff", "b"), ("own.diff", "c")):
        assert main(["train", spec, "--out", out]) == 0
    losses = [(folder / run / "checkpoints/step-000000001.safetensors") for run in "abc"]
    a, b, c = (load_file(path)["first/student.weight"] for path in losses)
    assert torch.equal(a, c) and not torch.equal(a, b)


OWN_PARTS = """
from torch import nn


class Halves(nn.Module):
    def encode(self, x, noise=None):
        return x / 2

    def decode(self, latents):
        return latents * 2

    def shape(self, size):
        return 1, 3


class Names(nn.Module):
    length = 1

    def __init__(self, names):
        super().__init__()
        self.names = ["", *names]
        self.table = nn.Embedding(len(self.names), 3)

    def ids(self, texts):
        return torch.tensor([[self.names.index(text)] for text in texts])

    def forward(self, ids):
        return self.table(ids)


def codec():
    return Halves()


def encoder(vocabulary):
    return Names(vocabulary)
"""


DECLARED = """codec halves { module = "blocks:codec" }
encoder names(field = "kind", train = true) { module = "blocks:encoder" }
backbone own(width = 4, text = names, codec = halves)"""


def test_codecs_and_encoders_are_as_welcome(own):
    folder = own(head=OWN_PARTS, answer="self.weight * x + cond")
    spec = Path("own.diff").read_text().replace("backbone own(width = 4)", DECLARED)
    Path("own.diff").write_text(spec)
    np.savez("data.npz", x=np.ones((4, 3)), kind=np.array(["a", "b", "c", "b"]))
    assert main(["train", "own.diff"]) == 0
    tensors = load_file(folder / "runs/own/checkpoints/step-000000001.safetensors")
    assert tensors["weights/text.table.weight"].shape == (4, 3)
    assert main(["sample", "runs/own", "--prompt", "c", "-n", "2", "-o", "c.npz"]) == 0


PICTURED = """
  vision = vision.dinov2(weights = "", layers = 1, width = 16, heads = 2)
  loss   = fit + norm(vision(image))
"""


def test_arrays_are_no_pictures(own, capsys):
    own(options=PICTURED, made="tapped(Scaled())", head=TAPPED)
    spec = Path("own.diff").read_text().replace("diff 1", "diff 1\nimport std.vision")
    Path("own.diff").write_text(spec)
    assert main(["train", "own.diff"]) == 4
    told = "error: the objective reads `image`, and `data.npz` holds no pictures"
    assert capsys.readouterr().err.strip().split("\n")[-1] == told


TAPPED = """
def tapped(network):
    network.tap_grid = (1, 1)
    return network
"""


WRONG = [
    (
        {"module": '"block:network"'},
        "there is no Python module `block` for `block:network`: put `block.py` beside the spec, or"
        " install the package",
    ),
    (
        {"module": '"blocks:netwerk"'},
        "`blocks` has no function `netwerk`: did you mean `network`?",
    ),
    (
        {"module": "nothing_like_it"},
        "there is no backbone called `nothing_like_it`: use one of ",
    ),
    (
        {"takes": "widht"},
        "`blocks:network` has no option `width`: did you mean `widht`?",
    ),
    (
        {"takes": "width, depth"},
        "`blocks:network` needs `depth`: add it to the parameters of its block",
    ),
    (
        {"head": "import surely_absent"},
        "`blocks` imports `surely_absent`, which is not installed here: install it",
    ),
    (
        {"head": "1 / 0"},
        "`blocks` cannot be imported (ZeroDivisionError: division by zero): mend that file",
    ),
    ({"head": "def ("}, "`blocks.py` line 4 is not Python (invalid syntax): mend that file"),
    (
        {"made": "Scaled(width)"},
        "`blocks:network` fails (TypeError: Scaled.__init__() takes 1 positional argument but 2"
        " were given): mend that function",
    ),
    ({"made": "3"}, "`blocks:network` gives a int: return a `torch.nn.Module`"),
    (
        {"answer": "x.no_such"},
        "the network of `blocks:network` fails for x [2, 1, 3], t [2], cond none (AttributeError:"
        " 'Tensor' object has no attribute 'no_such'): mend it",
    ),
    (
        {"answer": "x.sum(-1)"},
        "the network of `blocks:network` answers with [2, 1] for x [2, 1, 3], t [2], cond none: it"
        " must answer with the shape of x",
    ),
]


@pytest.mark.parametrize(("parts", "says"), WRONG)
def test_what_is_wrong_is_one_sentence(own, capsys, parts, says):
    folder = own(**parts)
    assert main(["train", "own.diff"]) == 2
    told = capsys.readouterr().err.strip().split("\n")[-1]
    assert told.startswith(f"error: {says}")
    assert not (folder / "runs").exists()


def test_installed_packages_offer_parts(own, tmp_path, monkeypatch):
    own(module="scaled")
    site = tmp_path / "site"
    info = site / "ours-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ours\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[difftrain.parts]\nscaled = ours:network\n")
    shutil.move("blocks.py", site / "ours.py")
    monkeypatch.syspath_prepend(str(site))
    assert main(["train", "own.diff"]) == 0


# ---- arrays


def test_fields_and_splits(tmp_path):
    path = tmp_path / "data.npz"
    labels, split = np.array(["a", "b", "a"]), np.array(["train", "test", "train"])
    np.savez(path, x=np.arange(6).reshape(3, 2), kind=labels, n=np.array([7, 8, 9]), split=split)
    seen = open_arrays(path, caption="n")
    assert seen.values.tolist() == [[[0, 1]], [[4, 5]]] and list(seen.texts) == ["7", "9"]
    assert [record.fields["kind"] for record in seen.records] == ["a", "a"]
    assert list(open_arrays(path, caption="kind", split="held_out").texts) == ["b"]
    assert repr(seen) == f"2 arrays [1, 2] of `{path}`"


@pytest.mark.parametrize(
    ("arrays", "asked", "says"),
    [
        ({"y": np.ones((2, 3))}, {}, 'has no `x`, only `y`: say which, as in x = "y"'),
        ({"x": np.ones(3)}, {}, "`x` in `data.npz` is float64 [3]: give numbers [N, C, ...]"),
        ({"x": np.ones((2, 3), bool)}, {}, "is bool [2, 3]: give numbers"),
        ({"x": np.array([[1.0, np.nan]])}, {}, "row 0 of `x` in `data.npz` is not finite (1 of 1"),
        ({"x": np.ones((2, 3))}, {"caption": "kind"}, "row 0 of `data.npz` has no `kind`"),
        ({"x": np.ones((2, 3)), "k": np.array([{}, {}])}, {}, "`k` in `data.npz` holds Python obj"),
    ],
)
def test_wrong_arrays_are_told(tmp_path, monkeypatch, arrays, asked, says):
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", **arrays)
    with pytest.raises(DataError) as problem:
        open_arrays("data.npz", **asked)
    assert says in str(problem.value)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 cut"])
def test_what_is_no_npz_is_told(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    Path("data.npz").write_bytes(content)
    with pytest.raises(DataError, match="`data.npz` is no whole `.npz`"):
        open_arrays("data.npz")
    np.save("alone.npy", np.ones((2, 3)))
    with pytest.raises(DataError, match="`alone.npy` is no whole `.npz`"):
        open_arrays("alone.npy")


def test_standardised_data_have_deviation_one_and_come_back():
    x = torch.randn(50, 2, 7) * torch.tensor([[3.0], [0.5]]) + torch.tensor([[1.0], [-4.0]])
    channels = x.transpose(0, 1).flatten(1)
    mean, std = (s.tolist() for s in (channels.mean(1), channels.std(1, correction=0)))
    codec = raw(standardise=True, shape=(2, 7), mean=mean, std=std)
    z = codec.encode(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std(1, correction=0), torch.ones(2))
    torch.testing.assert_close(codec.decode(codec.encode(x)), x)
    assert codec.channels == 2 and codec.shape(64) == (2, 7)
