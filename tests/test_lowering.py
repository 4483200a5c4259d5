"""Whether a step is compiled, and what is said of it."""

import pytest

from difftrain.compiler import lowering

SECONDS = lowering.CPU_SECONDS / lowering.CPU_GAIN  # of steps, from which on compiling pays


@pytest.fixture
def bare(monkeypatch):
    """A machine without a C++ compiler."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)


@pytest.mark.parametrize(
    ("asked", "device", "steps", "seconds", "compiled", "because"),
    [
        ("on", "cpu", 1, None, True, "compiled: `compile = on`"),
        ("off", "cuda", 9, None, False, "not compiled: `compile = off`"),
        ("auto", "cuda", 1, None, True, "compiled: the step runs on a GPU"),
        ("auto", "cpu", 100, SECONDS / 50, True, "compiled: 100 steps would gain about 240 s"),
        ("auto", "cpu", 100, SECONDS / 200, False, "not compiled: 100 steps of 3.00 s would gain"),
        ("auto", "cpu", 0, None, False, "not compiled: 0 steps of 0.00 s would gain about 0 s"),
    ],
)
def test_a_choice_says_why(monkeypatch, asked, device, steps, seconds, compiled, because):
    monkeypatch.setattr(lowering, "cxx", lambda: "/usr/bin/g++")
    choice = lowering.choose(asked, device, steps, seconds)
    assert choice.compiled == compiled and choice.because.startswith(because)


def test_without_a_compiler_nothing_is_compiled_unless_it_must_be(bare):
    choice = lowering.choose("auto", "cuda", 9, None)
    assert not choice.compiled
    assert choice.because == "not compiled: there is no C++ compiler on this machine"
    with pytest.raises(lowering.NoCompiler, match="`compile = on` needs a C\\+\\+ compiler"):
        lowering.choose("on", "cpu", 9, None)


def test_a_compiler_may_be_named(bare, monkeypatch, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("")
    mine.chmod(0o755)
    monkeypatch.setenv("CXX", str(mine))
    assert lowering.cxx() == str(mine)
