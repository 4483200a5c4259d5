"""Signals that end a program, as exceptions: whatever it had begun to write is cleared away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = ("SIGTERM", "SIGHUP")  # not every system has both
FIRST = 128  # exit codes of signals count from here


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
    """Inside, a signal that asks to end raises Stopped; one that is ignored (`nohup`) still is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    known = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    taken = [number for number in known if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, frame: object) -> None:
    raise Stopped(number)
