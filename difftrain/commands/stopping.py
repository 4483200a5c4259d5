"""Signals that end a program, as exceptions: whatever it had begun to write is cleared away."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from difftrain.commands.failure import BUG, failure

ENDING = ("SIGINT", "SIGTERM", "SIGHUP")  # not every system has all
USUAL = (signal.SIG_DFL, signal.default_int_handler)
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
    """Inside, a signal that asks to end raises Stopped; one that is ignored (`nohup`) still is.

    What is being called may make another error of it, as a class that is being made and a library
    that is being loaded do: that one leaves as Stopped too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: list[int] = []

    def stop(number: int, frame: object) -> None:
        seen.append(number)
        raise Stopped(number)

    known = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    taken = {n: signal.getsignal(n) for n in known if signal.getsignal(n) in USUAL}
    for number in taken:
        signal.signal(number, stop)
    try:
        yield
    except Exception as error:
        if seen and _follows(error):
            raise Stopped(seen[0]) from error
        raise
    finally:
        for number, before in taken.items():
            signal.signal(number, before)


def _follows(error: Exception) -> bool:
    """Whether an error comes of an interruption: it says so, or says nothing that we know."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return cause is not None or failure(error).code == BUG
