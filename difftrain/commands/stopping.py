"""Signals that end a program, as exceptions: whatever it had begun to write is cleared away."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from difftrain.commands.failure import BUG, failure

ENDING = ("SIGINT", "SIGTERM", "SIGHUP")  # not every system has all
USUAL = (signal.SIG_DFL, signal.default_int_handler)
FIRST = 128  # exit codes of signals count from here
PATIENCE = 10.0  # seconds that the import of a module may take when it is time to end
PAUSE = 0.02  # seconds until it is looked at again


class Stopped(KeyboardInterrupt):
    """The program was asked to end by the signal of this `number`."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(number)


def code(stop: KeyboardInterrupt) -> int:
    """The exit code of a program that was asked to end."""
    return FIRST + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, a signal that asks to end raises Stopped; one that is ignored (`nohup`) still is.

    Where what is being called makes another error of it, that one leaves as Stopped too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = _Asked()
    known = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    taken = {n: signal.getsignal(n) for n in known if signal.getsignal(n) in USUAL}
    for number in taken:
        signal.signal(number, asked)
    try:
        yield
        asked.wait_no_longer()
    except Exception as error:
        if asked.number and _follows(error):
            raise Stopped(asked.number) from error
        raise
    finally:
        asked.close()
        for number, before in taken.items():
            signal.signal(number, before)


class _Asked:
    """A handler of signals that raises Stopped; but not inside an import, as libraries that are
    loaded while an exception comes lose it, fail or abort: as soon as that is done."""

    def __init__(self):
        self.number, self.until, self.waiting = 0, 0.0, False
        self.outside = _imports(sys._getframe())
        alarm = getattr(signal, "SIGALRM", None)
        self.alarm = alarm if alarm and signal.getsignal(alarm) is signal.SIG_DFL else None
        if self.alarm:
            signal.signal(self.alarm, lambda _, frame: self(self.number, frame))

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self.until = number, time.monotonic() + PATIENCE
        inside = _imports(frame) > self.outside and time.monotonic() < self.until
        self.waiting = bool(inside and self.alarm)
        if self.alarm:
            signal.setitimer(signal.ITIMER_REAL, PAUSE if self.waiting else 0)
        if not self.waiting:
            raise Stopped(number)

    def wait_no_longer(self) -> None:
        """Raises Stopped where a signal still waits for an import that was the last thing done."""
        if self.waiting:
            raise Stopped(self.number)

    def close(self) -> None:
        if self.alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(self.alarm, signal.SIG_DFL)


def _imports(frame: FrameType | None) -> int:
    """How many frames from this one on belong to an import."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename.startswith("<frozen importlib")
        frame = frame.f_back
    return count


def _follows(error: Exception) -> bool:
    """Whether an error comes of an interruption: it says so, or says nothing that we know."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return cause is not None or failure(error).code == BUG
