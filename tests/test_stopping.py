"""Programs that are asked to end leave nothing half written, and an exit code that says so."""

import contextlib
import os
import signal
import sys
import time
from functools import partial
from importlib import import_module

import pytest

from difftrain.cli import guarded
from difftrain.commands import stopping
from difftrain.compiler.executable import replaced
from difftrain.sampling.pictures import whole
from difftrain.training.sources import DataError


def stopped_while_writing(write, number: int) -> int:
    """The exit code of a program that gets a signal in the middle of a file."""

    def half(place) -> None:
        place.write_bytes(b"half")
        os.kill(os.getpid(), number)
        place.write_bytes(b"whole")

    return guarded(lambda: 0 if write(half) else 1)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_program_that_is_asked_to_end_leaves_the_file_of_before(tmp_path, capsys, number, code):
    (tmp_path / "it").write_bytes(b"before")

    def sample(half) -> None:
        with whole(tmp_path / "it") as beside:
            half(beside)

    for write in (partial(replaced, tmp_path / "it"), sample):
        before = signal.getsignal(number)
        assert stopped_while_writing(write, number) == code
        assert signal.getsignal(number) is before
        assert capsys.readouterr().err == "stopped\n"
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("it", b"before")]


def test_a_signal_that_is_ignored_still_is(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        code = stopped_while_writing(partial(replaced, tmp_path / "it"), signal.SIGHUP)
        assert code == 0
        assert (tmp_path / "it").read_bytes() == b"whole"
    finally:
        signal.signal(signal.SIGHUP, before)


class Interrupting:
    """A descriptor that is interrupted while its class is being made: a RuntimeError up to 3.11."""

    def __set_name__(self, owner, name):
        os.kill(os.getpid(), signal.SIGINT)


def in_a_class() -> None:
    type("Made", (), {"it": Interrupting()})


def wrapped() -> None:
    try:
        in_a_class()
    except BaseException as cause:
        raise DataError("a file cannot be read") from cause


def lost(error: Exception) -> None:
    """Another error in place of the interruption, as libraries leave that are being loaded."""
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    raise error


@pytest.mark.parametrize(
    "program", [in_a_class, wrapped, partial(lost, ImportError("multiarray failed to import"))]
)
def test_an_interruption_that_became_another_error_is_one(capsys, program):
    before = signal.getsignal(signal.SIGINT)
    assert guarded(program) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err == "stopped\n"


def test_an_error_that_can_be_told_is_told_though_a_signal_came_before(capsys):
    assert guarded(partial(lost, DataError("there is no picture"))) == 4
    assert capsys.readouterr().err == "error: there is no picture\n"


def test_without_a_signal_our_own_bug_is_one(capsys):
    def broken() -> int:
        raise ImportError("multiarray failed to import")

    assert guarded(broken) == 70
    assert capsys.readouterr().err.startswith("error: difftrain itself failed")


# ---- while a module is loaded

ASKED = f"import os, signal\nos.kill(os.getpid(), {signal.SIGTERM:d})\n"


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """The name of a module that a signal comes in the middle of."""
    (tmp_path / "asked.py").write_text(ASKED + "DONE = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "asked"
    sys.modules.pop("asked", None)


@pytest.mark.parametrize("rest", [0.0, 5.0])
def test_an_import_is_finished_before_a_program_ends(loaded, capsys, rest):
    before, begun = signal.getsignal(signal.SIGALRM), time.monotonic()

    def program() -> int:
        import_module(loaded)
        time.sleep(rest)
        return 0

    assert guarded(program) == 143
    assert sys.modules[loaded].DONE and time.monotonic() - begun < 4
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert capsys.readouterr().err == "stopped\n"


def test_an_import_that_does_not_end_is_not_waited_for(loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "PATIENCE", 0.05)
    (tmp_path / "asked.py").write_text(ASKED + "import time\ntime.sleep(5)\n")
    begun = time.monotonic()
    assert guarded(lambda: import_module(loaded) and 0) == 143
    assert loaded not in sys.modules and time.monotonic() - begun < 4
