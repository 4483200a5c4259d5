"""Steps are compiled once: ahead, for a process that has nothing, and as long as a run lasts."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_kept import FACTS, called
from torch._dynamo.utils import counters

from difftrain.cli import main
from difftrain.commands import launch
from difftrain.compiler import kept, lowering, texts
from difftrain.compiler.executable import Shelf, pack, unpack
from difftrain.training import run
from difftrain.training.bundle import open_bundle
from difftrain.training.keeping import Keeping, facts

ROOT = Path(__file__).parent.parent
SPEC = """diff 1

backbone wave(codec = raw) {
  module = "waves:network"
  times  = [t]
}

objective waves {
  process         = linear
  prediction_type = flow
  backbone        = wave
}

data   { source = arrays("waves.npz"), batch = 4 }
train  { steps = 6, log_every = 1, compile = on, save_every = 0, sample_every = 3 }
sample { solver = euler(steps = 2), count = 2 }
"""
NETWORK = """from torch import nn


class Network(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x, t, cond=None):
        return self.linear(x) + t[:, None, None]


def network(shape):
    return Network(shape[-1])
"""


def _python(home: Path, cache: str, *argv: str) -> str:
    """What a new process says that finds nothing compiled in its cache."""
    env = {"TORCHINDUCTOR_CACHE_DIR": str(home / cache), "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **env, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=env)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def home(tmp_path):
    """A folder with the spec, its network and its data."""
    (tmp_path / "waves.diff").write_text(SPEC)
    (tmp_path / "waves.py").write_text(NETWORK)
    values = np.random.default_rng(0).standard_normal((8, 1, 4), dtype=np.float32)
    np.savez(tmp_path / "waves.npz", x=values)
    return tmp_path


LAST = "step-000000008.safetensors"


def near(kept, plain):
    """Of all that a checkpoint holds of a kept step and of one that was never compiled, in fp32.

    Sums are in another order; 1 - beta2 alone may be 1e-5 of itself away.
    """
    moved = plain["weights/student.linear.weight"] - plain["average/student.linear.weight"]
    assert kept.keys() == plain.keys() and moved.abs().mean() > 1e-4
    torch.testing.assert_close(kept, plain, rtol=1e-4, atol=1e-7)


DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.mark.parametrize("device", DEVICES)
def test_a_fresh_process_finds_its_step_in_the_file(home, monkeypatch, device):
    there = ("--set", f"train.device={device}")
    said = _python(home, "one", "-m", "difftrain", "compile", "waves.diff", *there)
    assert "the step is compiled for " in said
    said = _python(home, "two", "-I", "waves", "--out", "run")
    assert (
        f"20 weights, {device}, in run" in said
        and "the compiled step is out of this file: " in said
    )
    said = _python(home, "two", "-I", "waves", "--out", "run", "--resume", "auto", "--steps", "8")
    assert "resumed at step 6" in said and "the compiled step is out of this file: " in said
    monkeypatch.chdir(home)
    options = ("--set", "train.compile=off", *there, "--steps", "8", "--out", "plain")
    assert main(["train", "waves.diff", *options]) == 0
    near(*(load_file(home / path / "checkpoints" / LAST) for path in ("run", "plain")))


@pytest.mark.parametrize("device", DEVICES)
def test_a_resumed_run_finds_its_step_compiled(home, device):
    argv = ("-m", "difftrain", "train", "waves.diff", "--set", f"train.device={device}")
    assert "the step was compiled: " in _python(home, "one", *argv)
    said = _python(home, "one", *argv, "--resume", "auto", "--steps", "8")
    assert "resumed at step 6" in said and "the step was found compiled on this machine: " in said


def test_on_a_cpu_a_run_is_compiled_once_it_is_seen_to_pay(home, monkeypatch, capsys):
    monkeypatch.setattr(lowering, "CPU_SECONDS", 0.0)
    monkeypatch.chdir(home)
    there = ("--steps", "8", "--set", "train.device=cpu", "--set")
    assert main(["train", "waves.diff", *there, "train.compile=auto", "--out", "run"]) == 0
    told = capsys.readouterr().err
    assert "compiled: 8 steps would gain about 0 s on this CPU" in told
    assert "s to the first step" in told
    assert main(["train", "waves.diff", *there, "train.compile=off", "--out", "plain"]) == 0
    near(*(load_file(home / path / "checkpoints" / LAST) for path in ("run", "plain")))


def test_a_long_run_compiles_once_and_holds_no_more_memory(home, monkeypatch):
    """Pictures are drawn all along; the first time is when libraries fetch what they need."""
    seen = []

    def drawn(session, done, draw=run.grid):
        path = draw(session, done)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seen.append((done, counters["stats"]["unique_graphs"], peak))
        return path

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.chdir(home)
    monkeypatch.setattr(run, "grid", drawn)
    options = ("--set", "train.sample_every=50", "--set", "train.log_every=20")
    assert main(["train", "waves.diff", "--steps", "300", *options]) == 0
    steps, graphs, peaks = zip(*seen, strict=True)
    assert steps == (50, 100, 150, 200, 250, 300) and set(graphs) == {2}  # gradient and update
    assert torch._dynamo.config.error_on_recompile
    assert peaks[-1] - peaks[1] < 4096  # kilobytes


# ---- what a file does not keep, and what is not read out of it

KEPT = "this file has the compiled step, and `--set train.compile=on` reads it"
NOTHING = "`--store` keeps nothing, since the step is not compiled"


@pytest.fixture
def file(home, monkeypatch):
    """An executable, without a compiled step."""
    monkeypatch.chdir(home)
    assert main(["compile", "waves.diff", "--target", "none"]) == 0
    return home / "waves"


def said(capsys, file: Path, asked: str, *argv: str) -> list[str]:
    """The lines of a run that ends well, without the progress bar."""
    assert launch.main([str(file), "--set", f"train.compile={asked}", *argv]) == 0
    return [line.strip() for line in capsys.readouterr().err.replace("\r", "\n").split("\n")]


@pytest.mark.parametrize("asked", ["off", "auto"])
def test_a_step_that_is_not_compiled_is_not_kept(file, capsys, monkeypatch, asked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert NOTHING in said(capsys, file, asked, "--store") and Shelf(file).pages() == []
    assert NOTHING not in said(capsys, file, asked)


@pytest.mark.parametrize("steps", ["2", "6"])
def test_a_kept_step_that_does_not_pay_is_told(file, capsys, monkeypatch, steps):
    """Its kernels would be compiled again for a CPU, so `auto` counts as ever."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    good_for = _facts(file)
    assert KEPT not in said(capsys, file, "auto", "--steps", steps)
    Shelf(file).put(good_for, b"a step")
    assert KEPT in said(capsys, file, "auto", "--steps", steps)
    assert KEPT not in said(capsys, file, "off", "--steps", steps)


def _facts(file: Path) -> kept.Facts:
    """What a step of the file would be good for here."""
    read = {"x0": torch.empty(4, 1, 4), "index": torch.arange(4)}
    return facts(open_bundle(unpack(file)), torch.empty(20), read)


@pytest.mark.parametrize("package", ["diffusers", "transformers"])
def test_a_step_is_for_the_packages_that_it_was_compiled_with(file, monkeypatch, package):
    """Networks come of them, and may be others in a later one."""
    before, versions = _facts(file), texts.versions()
    assert before == _facts(file)
    monkeypatch.setattr(texts, "version", lambda name: versions[name] + "1" * (name == package))
    assert _facts(file) != before


def test_a_step_that_cannot_be_kept_is_run_all_the_same(tmp_path):
    shelf = Shelf(pack({"spec.diff": "diff 1\n"}, tmp_path / "file"))
    (tmp_path / f".file.{os.getpid()}").mkdir()  # where it would be written first
    keeping, (step, args, *rest) = Keeping(shelf, store=True), called("cpu")
    assert keeping.compiled(step, args, *rest)(*args)["norm"] > 0
    assert keeping.told(FACTS, had=False, seconds=2.0, reading=0.5).endswith(
        " 2.0 s to the first step; it cannot be kept in `file`: is a directory"
    )


def test_a_file_that_cannot_be_written_is_told_before_anything_is_compiled(
    file, capsys, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever is root may write
    assert launch.main([str(file), "--store"]) == 2
    assert capsys.readouterr().err == (
        f"error: nothing can be written in `{file.parent}`: give another place for `{file}`\n"
    )


# ---- what cannot be compiled


@pytest.fixture
def branching(home, monkeypatch):
    """The folder with a network that does what depends on what it computed."""
    branch = "self.linear(x * (2 if float(x.sum()) > 0 else 1))"
    (home / "waves.py").write_text(NETWORK.replace("self.linear(x)", branch))
    monkeypatch.chdir(home)
    return home


def test_a_network_that_torch_cannot_compile_is_told(branching, capsys):
    assert main(["train", "waves.diff"]) == 4
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: torch's compiler fails at this step (") and told.endswith(
        "): mend the network, or train without the compiler by `--set train.compile=off`"
    )
    assert main(["compile", "waves.diff"]) == 0
    warned = capsys.readouterr().err.splitlines()[-1]
    assert warned.startswith("warning: torch's compiler fails at this step (")
    assert warned.endswith("; the step is not compiled ahead")
    assert Shelf(branching / "waves").pages() == []


@pytest.mark.parametrize("device", DEVICES)
def test_a_network_that_torch_cannot_compile_is_trained_as_it_is(branching, device):
    """No CUDA graph could hold it either."""
    options = ("--set", "train.compile=off", "--set", f"train.device={device}")
    assert main(["train", "waves.diff", *options]) == 0


@pytest.mark.parametrize("cause", [torch.OutOfMemoryError("full"), OSError("cut off")])
def test_what_is_not_the_compiler_s_fault_is_told_as_it_is(cause):
    wrapped = torch._inductor.exc.InductorError(cause, None)
    with pytest.raises(torch._inductor.exc.InductorError), lowering.compiling():
        raise wrapped


def test_on_a_cpu_a_run_goes_on_if_it_cannot_be_compiled(branching, monkeypatch, capsys):
    monkeypatch.setattr(lowering, "CPU_SECONDS", 0.0)
    there = ("--steps", "8", "--set", "train.device=cpu", "--set")
    assert main(["train", "waves.diff", *there, "train.compile=auto", "--out", "run"]) == 0
    assert "not compiled after all: torch's compiler fails at this" in capsys.readouterr().err
    assert main(["train", "waves.diff", *there, "train.compile=off", "--out", "plain"]) == 0
    kept, plain = (load_file(branching / path / "checkpoints" / LAST) for path in ("run", "plain"))
    assert kept.keys() == plain.keys() and all(kept[n].equal(plain[n]) for n in plain)
