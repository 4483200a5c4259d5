"""The one file that trains: what is in it, and that it needs nothing else."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
import tiny

from difftrain.cli import main
from difftrain.commands import launch
from difftrain.compiler import texts
from difftrain.compiler.executable import Damaged, Shelf, pack, place, unpack
from difftrain.language.options import schema
from difftrain.training.bundle import RUNTIME, compile_spec

FORMATS = {"py", "diff", "json", "txt", "lark", "md", "zip", "xz", "safetensors", "LICENSE"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a compiled spec, `tiny`; tests only read it."""
    folder = tiny.home(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["compile", "tiny.diff"]) == 0
    return folder


def alone(*argv: str, cwd) -> subprocess.CompletedProcess:
    """A Python process that sees no checkout."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [sys.executable, "-I", *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


# ---- what is in it


def test_contents(home):
    with zipfile.ZipFile(home / "tiny") as archive:
        names = archive.namelist()
    assert {name.rpartition("/")[2].rpartition(".")[2] for name in names} <= FORMATS
    assert {"bundle/spec.diff", "bundle/graph.txt", "difftrain/grammars/diff.lark"} <= set(names)
    assert len(names) == len(set(names)) and names[0] == "__main__.py"
    assert (home / "tiny").read_bytes().startswith(b"#!/usr/bin/env python3\n")
    assert os.access(home / "tiny", os.X_OK)


def test_the_manifest(home):
    manifest = json.loads(unpack(home / "tiny")["manifest.json"])
    assert manifest["versions"] == texts.versions()
    assert manifest["shapes"] == {"batch": 4, "picture": [3, 64, 64], "latents": [4, 8, 8]}
    assert manifest["streams"] == ["drop_condition.drop", "eps", "t"]
    weights = manifest["state"]["weights"]
    assert weights["student"] == 92_372
    assert weights["text"] == "3472, and 16 for each token of the captions"
    # a forward and its backward passes, each about as much as a forward
    assert 2.5 < manifest["flops"]["per sample"] / 7_200_000 < 3.5


def test_the_same_spec_gives_the_same_bytes(home, tmp_path):
    again = pack(unpack(home / "tiny"), tmp_path / "again")
    assert again.read_bytes() == (home / "tiny").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def damaged(path, name) -> None:
    """Writes zeros over what lies in an executable under a name."""
    with zipfile.ZipFile(path) as archive:
        item = archive.getinfo(name)
    with path.open("r+b") as file:
        file.seek(item.header_offset + 30 + len(name))  # a zip's local header
        file.write(bytes(item.compress_size))


def test_what_is_damaged_is_told(home, tmp_path, capsys):
    file = pack(unpack(home / "tiny"), tmp_path / "file")
    damaged(file, "bundle/step.py")
    assert launch.main([str(file), "--steps", "1"]) == 2
    assert capsys.readouterr().err == (
        f"error: `bundle/step.py` in `{file}` is not what was written there: compile the spec"
        " again\n"
    )


@pytest.mark.parametrize("part", ["json", "step"])
def test_a_damaged_step_is_not_used(tmp_path, part):
    shelf = Shelf(pack({"spec.diff": "diff 1\n"}, tmp_path / "file"))
    shelf.put({"batch": 4}, bytes(range(256)) * 4)
    damaged(shelf.path, f"{place({'batch': 4})}.{part}")
    with pytest.raises(Damaged, match="is not what was written there: compile the spec again"):
        shelf.take({"batch": 4})


def test_a_damaged_executable_is_compiled_anew(home, tmp_path, monkeypatch):
    file = pack(unpack(home / "tiny"), tmp_path / "file")
    damaged(file, "bundle/step.py")
    monkeypatch.chdir(home)
    assert main(["compile", "tiny.diff", "--target", "none", "-o", str(file)]) == 0
    assert unpack(file) == unpack(home / "tiny")


# ---- what it does


def test_it_trains_where_nothing_else_is(home, tmp_path):
    data, out = str(home / "photos"), tmp_path / "out"
    done = alone(
        str(home / "tiny"), "--data", data, "--steps", "2", "--out", str(out), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert f"training `tiny` on 8 pictures of `{data}`" in done.stderr
    assert (out / "checkpoints" / "step-000000002.safetensors").exists()
    code = f"import sys; sys.path.insert(0, {str(home / 'tiny')!r}); import difftrain; "
    where = alone("-c", code + "print(difftrain.__file__)", cwd=tmp_path).stdout.strip()
    assert where == str(home / "tiny" / "difftrain" / "__init__.py")


def test_without_packages(home, tmp_path):
    done = alone("-S", str(home / "tiny"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "error: `lark` is not installed here: install it and try again\n"


def test_it_tells_about_itself(home, capsys):
    assert launch.main([str(home / "tiny"), "--inspect"]) == 0
    out = capsys.readouterr().out
    assert out.startswith('{\n  "name": "tiny",')
    assert "objective tiny  in tiny.diff" in out and "weight of each squared error" in out
    assert "def gradient(read, state, batch, modules, plan, tables):" in out
    assert launch.main([str(home / "tiny"), "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: tiny ")


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (
            ["--set", "train.precision=bf16"],
            2,
            "`train.precision` is part of the compiled step: compile the spec again with"
            " `--set train.precision=bf16`",
        ),
        (
            ["--set", "drop_condition.rate=0.5"],
            2,
            "`drop_condition.rate` is part of the compiled step: compile the spec again with"
            " `--set drop_condition.rate=0.5`",
        ),
        (["--stesp", "3"], 2, "`tiny` has no option `--stesp`: did you mean `--steps`?"),
        (["--steps", "x"], 2, "`x` is not a whole number"),
        (["photos"], 2, "`tiny` does not know what to do with `photos`"),
    ],
)
def test_what_it_refuses(home, capsys, argv, code, says):
    assert launch.main([str(home / "tiny"), *argv]) == code
    assert capsys.readouterr().err == f"error: {says}\n"


def test_an_unknown_setting_is_a_finding(home, capsys):
    assert launch.main([str(home / "tiny"), "--set", "train.stesp=3"]) == 1
    assert "error[DIF150]: this spec has nothing called `train.stesp` to set" in (
        capsys.readouterr().err
    )


def test_what_may_be_set_leaves_the_step_as_it_is(home):
    step = {"precision", "products", "optimizer", "warmup", "decay", "clip", "ema"}
    for kind in ("data", "train", "sample"):
        assert set(schema(kind)) == {*RUNTIME[kind], *(step if kind == "train" else ())}
    values = {"data.size": "32px", "data.batch": "2", "train.steps": "9", "train.seed": "3"}
    values |= {"data.captions": "any", "sample.guidance": "3", "train.resume_from": "auto"}
    changed = compile_spec(home / "tiny.diff", values)
    assert changed.texts["step.py"] == unpack(home / "tiny")["step.py"]


def test_another_machine_is_told():
    here = texts.versions()
    assert texts.differences({"versions": here}) == ""
    assert texts.differences({"versions": {**here, "torch": "2.0.0"}}) == (
        f"this machine is not the one of the compilation: torch {here['torch']} instead of 2.0.0"
    )


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("photos", "`photos` is a folder: say with `-o` how to call the executable"),
        ("tiny.diff", "`tiny.diff` is the spec itself: say with `-o` another file"),
    ],
)
def test_nothing_is_packed_over(home, capsys, monkeypatch, out, says):
    monkeypatch.chdir(home)
    assert main(["compile", "tiny.diff", "-o", out]) == 2
    assert capsys.readouterr().err == f"error: {says}\n"
    assert (home / "tiny.diff").read_text() == tiny.spec()
