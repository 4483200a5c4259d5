"""Programs that are asked to end leave nothing half written, and an exit code that says so."""

import os
import signal
from functools import partial

import pytest

from difftrain.cli import guarded
from difftrain.compiler.executable import replaced
from difftrain.sampling.pictures import whole


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
