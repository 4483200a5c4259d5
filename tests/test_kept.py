"""Compiled steps: what they are good for, the executable that holds them, where they come from."""

import gc
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tiny
import torch

from difftrain.compiler import kept
from difftrain.compiler.executable import Damaged, Shelf, pack, place
from difftrain.compiler.layout import gather, layout
from difftrain.compiler.whole import Step
from difftrain.training.ahead import NoTarget, target
from difftrain.training.bundle import compile_text
from difftrain.training.keeping import Keeping

FACTS = {"device": "a GPU", "torch": "2.11.0", "batch": 4}
CPU = torch.device("cpu")


@pytest.fixture
def shelf(tmp_path):
    return Shelf(pack({"spec.diff": "diff 1\n"}, tmp_path / "file"))


# ---- on the shelf


def test_it_is_there_as_it_was_put(shelf):
    assert not shelf.has(FACTS) and shelf.pages() == []
    shelf.put(FACTS, b"first")
    shelf.put({**FACTS, "batch": 8}, b"second")
    assert shelf.take(FACTS) == b"first"
    assert shelf.take({**FACTS, "batch": 8}) == b"second"
    assert not shelf.has({**FACTS, "device": "another"})
    assert [(page["batch"], page["bytes"]) for page in shelf.pages()] == [(4, 5), (8, 6)]
    assert [p.name for p in shelf.path.parent.iterdir()] == ["file"]
    assert shelf.path.stat().st_mode & 0o111


def test_what_runs_out_of_the_file_keeps_its_place(shelf):
    before = _places(shelf.path)
    shelf.put(FACTS, b"data")
    assert {n: p for n, p in _places(shelf.path).items() if n in before} == before


def _places(path: Path) -> dict[str, int]:
    with zipfile.ZipFile(path) as archive:
        return {item.filename: item.header_offset for item in archive.infolist()}


def test_what_was_changed_is_not_used(shelf):
    page = {**FACTS, "sha256": "0" * 64, "bytes": 4}
    with zipfile.ZipFile(shelf.path, "a") as archive:
        archive.writestr(f"{place(FACTS)}.json", json.dumps(page))
        archive.writestr(f"{place(FACTS)}.step", b"data")
    with pytest.raises(Damaged, match="is not what was written there: compile the spec again"):
        shelf.take(FACTS)


# ---- from torch, and back


def gradient(read, state, batch, modules, plan, tables):
    loss = plan.bind(modules, read["weights"])["student"](batch["x0"]).sum()
    found = {"student": {n: loss * view for n, view in read["weights"]["student"].items()}}
    return plan.flat(found, cut=False), {"sum": state["sum"] * 2}


def update(state, parts):
    state["sum"].add_(parts[0].sum())
    return {"norm": parts[0].norm()}


def _args() -> tuple:
    torch.manual_seed(0)
    modules = {"student": torch.nn.Linear(3, 3)}
    plan = layout(modules)
    state = {"sum": torch.zeros(()), "weights": gather(modules, plan, "cpu")}
    return state, {"x0": torch.ones(2, 3)}, modules, plan, {}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A step as it was compiled, the file that it is kept in, and the cache beside it."""
    folder = tmp_path_factory.mktemp("made")
    kept_in = Shelf(pack({"spec.diff": "diff 1\n"}, folder / "file"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "cache"))
        yield Keeping(kept_in, store=True).compiled(*called("cpu")), kept_in, folder / "cache"


def called(device: str) -> tuple:
    """What a step on a device is compiled with, as `Keeping.compiled` takes it."""
    state, batch, modules, plan, tables = _args()
    moved = {name: value.to(device) for name, value in state.items()}
    args = (moved, {"x0": batch["x0"].to(device)}, modules, plan, tables)
    return Step(gradient, update), args, FACTS, False


def test_a_step_comes_back_as_it_was(made):
    compiled, shelf, _ = made
    step, wanted = Step(gradient, update), _args()
    logged = step(*wanted)
    assert compiled(*_args())["norm"].allclose(logged["norm"]) and logged["norm"] > 0
    args, threads = _args(), torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # a step of a GPU is for any number of them
    try:
        again = Keeping(shelf).compiled(step, args, FACTS, False)
        assert again(*args)["norm"].allclose(logged["norm"])
    finally:
        torch.set_num_threads(threads)
    assert args[0]["sum"].allclose(wanted[0]["sum"])
    assert [page["device"] for page in shelf.pages()] == ["a GPU"]


# ---- in another process

HERE = Path(__file__).parent
COMPILE = """
import sys
from test_kept import *
Keeping(Shelf(Path(sys.argv[1])), store=True).compiled(*called(sys.argv[2]))
"""
READ = """
import sys
from test_kept import *
kept.load(torch.device(sys.argv[2]))
loaded = set(sys.modules)
step = Keeping(Shelf(Path(sys.argv[1]))).compiled(*called(sys.argv[2]))
print(*(n for n in set(sys.modules) - loaded if n.startswith(("torch._dynamo", "sympy"))))
print(torch._inductor.async_compile.AsyncCompile.process_pool.cache_info().currsize)
print(step(*called(sys.argv[2])[1])["norm"].item())
"""


def process(code: str, shelf: Shelf, device: str, cache: Path) -> list[str]:
    """The lines of a new process that runs this code, its caches being in a folder."""
    where = {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    where |= {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", code, str(shelf.path), device]
    done = subprocess.run(command, env=os.environ | where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_once_the_compiler_is_loaded_reading_a_step_loads_no_more_of_it(made):
    compiled, shelf, cache = made
    more, workers, norm = process(READ, shelf, "cpu", cache)
    assert (more, workers) == ("", "0")
    assert float(norm) == pytest.approx(compiled(*_args())["norm"].item())


@pytest.mark.gpu
def test_a_step_of_a_gpu_is_kept_as_binaries_and_read_without_workers(shelf, tmp_path):
    process(COMPILE, shelf, "cuda", tmp_path / "first")
    made, held = [b"cubin", b"ptx", b"llir", b"ttir"], shelf.take(FACTS)
    assert [kind for kind in made if b"." + kind in held] == [b"cubin"]  # this file is in it too
    more, workers, norm = process(READ, shelf, "cuda", tmp_path / "second")
    assert (more, workers) == ("", "0")
    assert float(norm) == pytest.approx(Step(gradient, update)(*_args())["norm"].item(), rel=1e-3)


def test_what_was_loaded_is_not_looked_through_for_garbage():
    kept.load(CPU)
    assert gc.isenabled() and gc.get_freeze_count() > 100_000
    gc.unfreeze()
    assert gc.get_freeze_count() < 1000


def test_what_a_gpu_fails_at_while_the_compiler_is_loaded_is_raised():
    with pytest.raises(Exception, match="CUDA|NVIDIA"):
        kept.load(torch.device("cuda:99"))


@pytest.mark.parametrize("before", [None, "0"])
def test_what_triton_keeps_is_as_it_was(monkeypatch, before):
    monkeypatch.delenv(kept.BINARIES, raising=False)
    if before is not None:
        monkeypatch.setenv(kept.BINARIES, before)
    with kept._binaries():
        assert os.environ[kept.BINARIES] == "1"
    assert os.environ.get(kept.BINARIES) == before


# ---- what is said of it


def test_where_a_step_came_from_is_said(shelf, monkeypatch):
    monkeypatch.setattr(kept, "found", lambda: False)
    line = "the step was compiled: 2.0 s to the first step"
    absent = "this file has none for a GPU, torch 2.11.0 and these shapes"
    said = {"had": False, "seconds": 2.0, "reading": 0.5}
    assert Keeping().told(FACTS, **said) == line
    assert Keeping(shelf).told(FACTS, **said) == f"{line}; {absent}, and `--store` puts it there"
    assert Keeping(shelf, store=True).told(FACTS, **said) == f"{line}; it is now kept in `file`"
    whence = "the compiled step is out of this file: 2.0 s to the first step, 0.5 of them reading"
    assert Keeping(shelf).told(FACTS, **{**said, "had": True}) == whence


def test_a_machine_is_known_by_what_a_step_depends_on():
    facts = kept.machine(CPU)
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(facts)) == facts


# ---- for which machine


@pytest.mark.parametrize(
    ("asked", "option", "device"),
    [
        ("none", "on", None),
        ("cpu", "auto", CPU),
        ("auto", "auto", None),
        ("auto", "off", None),
        ("auto", "on", CPU),
    ],
)
def test_targets_without_a_gpu(monkeypatch, asked, option, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert target(asked, _bundle(f"compile = {option}")) == device


def test_a_target_that_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoTarget) as problem:
        target("h100", _bundle("compile = auto"))
    assert str(problem.value) == (
        "`--target h100` cannot be compiled for on this machine, since it has no GPU: compile the"
        " spec there, or run the executable there with `--store`"
    )


def _bundle(train: str):
    return compile_text("tiny", tiny.spec(train=train))
