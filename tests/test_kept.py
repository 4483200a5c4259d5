"""Compiled steps: what they are good for, the executable that holds them, where they come from."""

import json
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


def test_a_step_comes_back_as_it_was(shelf, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    step, wanted = Step(gradient, update), _args()
    logged = step(*wanted)
    made = Keeping(shelf, store=True).compiled(step, _args(), FACTS, False)
    assert made(*_args())["norm"].allclose(logged["norm"]) and logged["norm"] > 0
    args, threads = _args(), torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # a step of a GPU is for any number of them
    try:
        again = Keeping(shelf).compiled(step, args, FACTS, False)
        assert again(*args)["norm"].allclose(logged["norm"])
    finally:
        torch.set_num_threads(threads)
    assert args[0]["sum"].allclose(wanted[0]["sum"])
    assert [page["device"] for page in shelf.pages()] == ["a GPU"]


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
