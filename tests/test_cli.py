"""The command line: arguments, messages, exit codes, streams."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from difftrain.cli import COMMANDS, main, usage
from difftrain.commands.check import summary
from difftrain.commands.failure import EXTRAS, failure
from difftrain.language.codes import CODES

ROOT = Path(__file__).parent.parent
GOOD = """\
diff 1

objective a {
  process         = linear
  prediction_type = flow
  backbone        = custom
}
"""
BAD = GOOD.replace("prediction_type = flow", "prediction_type = flwo")
LOOSE = GOOD.replace("  process ", " process ")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of its own to run in, with one good spec."""
    (tmp_path / "good.diff").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def process(*argv: str, cwd, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "difftrain", *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)


# ---- the program


def test_the_program(home):
    (home / "bad.diff").write_text(BAD)
    clean, broken = process("lint", "good.diff", cwd=home), process("lint", cwd=home)
    assert (clean.returncode, clean.stdout, clean.stderr) == (0, "", "no findings in 1 file\n")
    assert broken.returncode == 1
    assert broken.stdout.startswith(
        "error[DIF119]: there is no prediction `flwo`\n --> bad.diff:5:"
    )
    assert "= help: write `flow`" in broken.stdout
    assert broken.stderr == "1 error in 2 files\n"


def test_a_closed_pipe_is_quiet(home):
    command = f"{sys.executable} -m difftrain explain good.diff | head -1"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=home, env=env)
    assert done.stdout == "objective a  in good.diff\n" and done.stderr == ""


def test_nothing_to_do(capsys):
    assert run(capsys) == (2, "", usage())
    assert run(capsys, "--help") == (0, usage(), "")
    code, out, err = run(capsys, "--version")
    assert (code, err) == (0, "") and out.startswith("difftrain 0.")


@pytest.mark.parametrize("name", COMMANDS)
def test_help(capsys, name):
    code, out, err = run(capsys, name, "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: difftrain {name}")


# ---- what is said about arguments


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["lnt"], "there is no command `lnt`: did you mean `lint`?"),
        (["quux"], "there is no command `quux`: `difftrain --help` lists them"),
        (["--verson"], "there is no option `--verson`: did you mean `--version`?"),
        (["fmt", "--chek"], "`difftrain fmt` has no option `--chek`: did you mean `--check`?"),
        (
            ["fmt", "--quux"],
            "`difftrain fmt` has no option `--quux`: `difftrain fmt --help` lists them",
        ),
        (
            ["lint", "--formt=json"],
            "`difftrain lint` has no option `--formt`: did you mean `--format`?",
        ),
        (["graph", "a", "b"], "`difftrain graph` does not know what to do with `b`"),
        (
            ["lint", "--format", "xml"],
            "there is no format `xml`: it is one of `text`, `github`, `json`",
        ),
        (["lint", "--format"], "`--format` expects one argument"),
        (["train", "--steps", "x"], "`x` is not a whole number"),
        (["diff", "a"], "`difftrain diff` needs B"),
        (["lint", "--set", "gamma"], "`--set gamma` sets nothing: write `--set name=value`"),
        (["lint", "missing.diff"], "`missing.diff`: no such file or directory"),
        (["explain", "missing.diff"], "`missing.diff`: no such file or directory"),
        (["import", "missing.yaml"], "`missing.yaml`: no such file or directory"),
        (["explain", "DIF999"], "there is no code `DIF999`"),
        (["graph", "--after", "cancle"], "there is no pass `cancle`: did you mean `cancel`?"),
    ],
)
def test_usage(home, capsys, argv, says):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {says}") and err.count("\n") == 1


def test_folders(home, capsys):
    (home / "empty").mkdir()
    code, _, err = run(capsys, "lint", "empty")
    assert (code, err) == (2, "error: there is no `.diff` file in `empty`\n")
    (home / "deep" / ".hidden").mkdir(parents=True)
    (home / "deep" / ".hidden" / "bad.diff").write_text(BAD)
    (home / "deep" / "other.diff").write_text(GOOD)
    assert run(capsys, "lint") == (0, "", "no findings in 2 files\n")
    assert run(capsys, "lint", "good.diff", "./good.diff", ".")[2] == "no findings in 3 files\n"
    code, _, err = run(capsys, "graph")
    assert (
        code == 2 and "`.` holds 2 specs, and one is needed: `deep/other.diff`, `good.diff`" in err
    )


# ---- lint and fmt


def test_lint_for_programs(home, capsys):
    (home / "bad.diff").write_text(BAD)
    code, out, _ = run(capsys, "lint", "--format", "json")
    (finding,) = json.loads(out)
    assert code == 1 and (finding["code"], finding["path"], finding["line"]) == (
        "DIF119",
        "bad.diff",
        5,
    )
    code, out, _ = run(capsys, "lint", "--format=github")
    assert code == 1 and out.startswith("::error file=bad.diff,line=5,")
    assert run(capsys, "lint", "--format=json", "good.diff")[:2] == (0, "[]\n")


def test_lint_with_settings(home, capsys):
    (home / "good.diff").write_text(GOOD + "\ntrain { steps = 10 }\n")
    assert run(capsys, "lint", "--set", "train.steps=20")[0] == 0
    code, out, _ = run(capsys, "lint", "--set", "train.steps=-1")
    assert code == 1 and "--set train.steps" in out


def test_odd_files(home, capsys):
    (home / "empty.diff").write_text("")
    (home / "binary.diff").write_bytes(bytes(range(256)))
    code, out, err = run(capsys, "lint", "empty.diff", "binary.diff")
    assert code == 1 and "DIF001" in out and "DIF002" in out and err == "2 errors in 2 files\n"
    assert run(capsys, "fmt", "binary.diff")[0] == 1
    assert (home / "binary.diff").read_bytes() == bytes(range(256))


def test_counts(home, capsys):
    (home / "bad.diff").write_text(BAD.replace("linear", "lineer"))
    assert run(capsys, "lint")[2] == "2 errors in 2 files\n"
    assert summary([], 1) == "no findings in 1 file"


def test_fmt(home, capsys):
    (home / "loose.diff").write_text(LOOSE)
    assert run(capsys, "fmt", "--check") == (1, "loose.diff would change\n", "")
    assert (home / "loose.diff").read_text() == LOOSE
    assert run(capsys, "fmt") == (0, "loose.diff formatted\n", "")
    assert (home / "loose.diff").read_text() == GOOD
    assert run(capsys, "fmt", "--check") == (0, "", "")


def test_fmt_line_ends(home, capsys):
    (home / "good.diff").write_bytes(GOOD.replace("\n", "\r\n").encode())
    assert run(capsys, "fmt")[:2] == (0, "good.diff formatted\n")
    assert (home / "good.diff").read_bytes() == GOOD.encode()


def test_fmt_leaves_what_it_cannot_read(home, capsys):
    (home / "good.diff").write_text(GOOD + "a = = 1\n")
    code, out, err = run(capsys, "fmt")
    assert (code, out) == (1, "") and err.startswith("error[DIF0")
    assert (home / "good.diff").read_text().endswith("a = = 1\n")


def test_colour(home):
    (home / "bad.diff").write_text(BAD)
    assert "\x1b" not in process("lint", cwd=home).stdout


# ---- explain, graph, diff, import


def test_explain_a_code(capsys):
    code, out, err = run(capsys, "explain", "dif203")
    assert (code, err) == (0, "") and out.startswith(f"DIF203: {CODES['DIF203'].title}\n\n")


def test_explain(home, capsys):
    code, out, err = run(capsys, "explain")
    assert (code, err) == (0, "") and out.startswith("objective a  in good.diff\n")
    code, out, _ = run(capsys, "explain", "--passes")
    assert code == 0 and "  cancel" in out and "Ensures:" in out


def test_a_spec_with_errors_is_told_and_not_explained(home, capsys):
    (home / "bad.diff").write_text(BAD)
    for command in (["explain"], ["graph"], ["diff", "good.diff"]):
        code, out, err = run(capsys, *command, "bad.diff")
        assert (code, out) == (1, "") and err.startswith("error[DIF119]")
    code, _, err = run(capsys, "explain", "good.diff", "--objective", "b")
    assert code == 1 and "there is no objective `b`" in err


def test_graph(home, capsys):
    code, out, err = run(capsys, "graph")
    assert (code, err) == (0, "") and out.rstrip().splitlines()[-1].startswith("-> loss = %")
    before, after = (run(capsys, "graph", f"--{side}", "widen")[1] for side in ("before", "after"))
    assert "widen" not in before and "widen" in after
    assert "-> xt = %" in run(capsys, "graph", "--quantity", "xt")[1]
    told = "error: there is no quantity `los`: did you mean `loss`?\n"
    assert run(capsys, "graph", "--quantity", "los") == (2, "", told)
    told = "error: there is no quantity `zzz@0`: `difftrain explain` shows them\n"
    assert run(capsys, "graph", "--quantity", "zzz@0") == (2, "", told)


def test_diff(home, capsys):
    (home / "other.diff").write_text(GOOD.replace("custom\n", "custom\n  t ~ logit_normal(0, 1)\n"))
    assert run(capsys, "diff", "good.diff", "good.diff") == (0, "`a`: the same equations\n", "")
    code, out, _ = run(capsys, "diff", "good.diff", "other.diff")
    assert code == 1 and out.startswith("`a`: another objective")


def test_import(home, capsys):
    (home / "old.yaml").write_text("train: {seed: 3}\n")
    code, out, err = run(capsys, "import", "old.yaml", "-o", "new.diff")
    assert (code, out, err) == (0, "", "")
    assert run(capsys, "lint", "new.diff")[0] == 0
    assert run(capsys, "import", "old.yaml")[1] == (home / "new.diff").read_text()
    code, _, err = run(capsys, "import", "good.diff")
    assert code == 2 and err.startswith("error: `good.diff` is no configuration")


def test_training_needs_its_blocks(home):
    for command in ("train", "compile"):
        done = process(command, "good.diff", cwd=home)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"error[DIF320]: `difftrain {command}` needs a `data` block" in done.stderr
        assert "`train` block" in done.stderr


# ---- when things go wrong


def test_an_absent_package(home, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    for name in [m for m in sys.modules if m.startswith("difftrain.graph")]:
        monkeypatch.delitem(sys.modules, name)
    code, out, err = run(capsys, "graph")
    assert (code, out) == (3, "")
    assert err == "error: `networkx` is not installed here: install it and try again\n"


def test_every_extra_names_its_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    every = [one for extra in extras if extra != "test" for one in extras[extra]]
    named = {re.match(r"[\w-]+", one)[0].replace("-", "_") for one in every}
    assert named - {"difftrain"} == EXTRAS.keys()
    for package, extra in EXTRAS.items():
        assert any(re.match(rf"{package.replace('_', '-')}\b", wanted) for wanted in extras[extra])
        told = failure(ModuleNotFoundError(f"No module named '{package}'", name=package))
        assert (str(told), told.code) == (
            f"`{package}` is not installed here: install difftrain with its extra `{extra}`",
            3,
        )


def test_our_own_bug(home):
    crash = "import difftrain.commands.check as c; c.specs = lambda paths: 1 / 0; "
    crash += "from difftrain.cli import main; raise SystemExit(main(['lint']))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for extra, shown in (({}, False), ({"DIFFTRAIN_TRACEBACK": "1"}, True)):
        done = subprocess.run(
            [sys.executable, "-c", crash], capture_output=True, text=True, env=env | extra, cwd=home
        )
        assert done.returncode == 70 and done.stdout == ""
        assert done.stderr.startswith("error: difftrain itself failed, which is our fault")
        assert "please report it with the spec" in done.stderr
        assert ("ZeroDivisionError" in done.stderr) == shown


def test_errors_of_other_stages():
    from difftrain.models.errors import PartError
    from difftrain.training.run import RunFailed
    from difftrain.training.sources import DataError

    told = [failure(kind("a sentence")) for kind in (DataError, PartError, RunFailed)]
    assert [(str(t), t.code) for t in told] == [("a sentence", c) for c in (4, 2, 4)]
    assert failure(PermissionError(13, "Permission denied", "x")).code == 2


def test_times_that_fit_no_grid_are_told():
    """The rules cannot always tell: then the sampler is the first that can."""
    from difftrain.language.spacing import Misfit
    from difftrain.sampling.grids import grid

    class Levels:
        """sigma / alpha = 80 at 80 / 81."""

        sigma = staticmethod(lambda t: t)
        alpha = staticmethod(lambda t: 1 - t)

    options = {"steps": 1, "grid": "power", "times": [0.99]}
    with pytest.raises(Misfit) as caught:
        grid(("real", 0.0, 1.0), options, Levels)
    told = failure(caught.value)
    assert (str(told), told.code) == (
        "`times = [0.99]` begin above where sampling begins: write times below 0.987654, or a"
        " larger `high`",
        2,
    )


def test_interrupted(home, capsys, monkeypatch):
    from difftrain.commands import check

    def stop(paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "specs", stop)
    assert run(capsys, "lint") == (130, "", "stopped\n")
