"""Work on GPUs, each piece in a process of its own, as many side by side as there is room for.

Compiling takes minutes of a processor and hardly a GPU; measuring takes seconds, and the GPU alone.
So a process that is about to measure stops itself (`gauge.alone`). Its turn is when nobody else
measures on that GPU: the others are stopped, it goes on, and they go on when it ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path

HERE = Path(__file__).parent
TURN = "BENCH_TURN"  # names the file that appears when it is a process's turn
SETTLED = 1.0  # seconds in which a GPU finishes what a stopped process had asked of it
SPARE = 4.0  # GB of a GPU that nobody plans with
LATE = "not done when the time was up"


@dataclass(frozen=True)
class Work:
    """One process: what Python is told, where it writes its result and what it says, the GB that it
    may take of a GPU. It runs where the work with the result `beside` does, if that has begun, at
    most the seconds of `limits` until its turn and from then on; waiting is not counted."""

    command: tuple[str, ...]
    result: Path
    memory: float = 0.0
    beside: Path | None = None
    limits: tuple[float, float] = (inf, inf)

    @property
    def log(self) -> Path:
        return self.result.with_suffix(".log")

    @property
    def turn(self) -> Path:
        return self.result.with_suffix(".turn")


@dataclass(eq=False)
class Running:
    """A work that has begun, what follows it on the same GPU, and when it was made to wait."""

    work: Work
    rest: list[Work]
    gpu: str
    process: subprocess.Popen
    pauses: list[list[float]] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)  # when it began, or its turn did
    error: str = ""  # why it was ended

    @property
    def asks(self) -> bool:
        """Whether it has stopped itself, or was made to wait."""
        options = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
        try:
            return os.waitid(os.P_PID, self.process.pid, options) is not None
        except ChildProcessError:  # it has ended meanwhile
            return False

    @property
    def limit(self) -> float:
        """The seconds that it may run now."""
        return self.work.limits[self.work.turn.exists()]

    @property
    def late(self) -> bool:
        """Whether it runs for longer than it may."""
        now = time.monotonic()
        ran = now - self.since - self.waited(self.since, now)
        return ran > self.limit and not self.asks

    def pause(self) -> None:
        self.pauses.append([time.monotonic(), float("inf")])
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.pauses[-1][1] = time.monotonic()
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Ends it and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def waited(self, start: float, end: float) -> float:
        """Seconds from `start` to `end` in which it was made to wait."""
        return sum(max(0.0, min(b, end) - max(a, start)) for a, b in self.pauses)


Told = Callable[[Running, str], None]  # what is done with a work that ended, and its error if any


class Crew:
    """GPUs that take the next piece of work, a list of works one after the other, when they have
    room; at most `together` pieces each."""

    def __init__(self, gpus: Sequence[str], together: int, limit: float, told: Told):
        self.gpus, self.together, self.told = gpus, together, told
        self.end = time.monotonic() + limit
        self.room = {gpu: size(gpu) - SPARE for gpu in gpus}
        self.running: list[Running] = []
        self.places: dict[Path | None, str] = {}  # the GPUs of works that began, by their results
        self.holders: dict[str, tuple[Running, list[Running]]] = {}  # and who waits for them

    def run(self, pieces: Sequence[Sequence[Work]]) -> None:
        """Until everything ended or the time is up."""
        waiting = [list(piece) for piece in pieces]
        try:
            while (waiting or self.running) and time.monotonic() < self.end:
                self._end_late()
                self._collect()
                self._grant()
                while started := self._start(waiting):
                    waiting.remove(started)
                time.sleep(0.05)
        finally:  # sessions of their own do not hear when this one is interrupted
            for one in self.running:
                one.kill()
        for one in self.running:
            self.told(one, LATE)
        self.running.clear()

    def stop(self, *_) -> None:
        """The time is up, as a handler of signals says it."""
        self.end = 0.0

    def _end_late(self) -> None:
        """Ends what hangs, so that others have their turn."""
        for one in [r for r in self.running if r.late]:
            doing = "measured" if one.work.turn.exists() else "ready to be measured"
            one.error = f"not {doing} after {one.limit:.0f} s"
            one.kill()

    def _collect(self) -> None:
        """Takes leave of processes that ended; what waited for them goes on."""
        for one in [r for r in self.running if r.process.poll() is not None]:
            self.running.remove(one)
            holder, others = self.holders.get(one.gpu, (None, []))
            if holder is one:
                del self.holders[one.gpu]
                for other in others:
                    other.resume()
            self.told(one, one.error or failure(one))
            if one.rest:
                self._begin(one.rest, one.gpu)

    def _grant(self) -> None:
        """Gives every GPU that nobody measures on to one that asks."""
        asking = {r.gpu: r for r in reversed(self.running) if r.gpu not in self.holders and r.asks}
        for gpu, holder in asking.items():
            others = [r for r in self.running if r.gpu == gpu and not r.asks]
            for other in others:
                other.pause()
            time.sleep(SETTLED * bool(others))
            self.holders[gpu] = holder, others
            holder.since = time.monotonic()
            holder.work.turn.touch()
            holder.process.send_signal(signal.SIGCONT)

    def _start(self, waiting: Sequence[list[Work]]) -> list[Work] | None:
        """Begins the first piece that some GPU has room for, and returns it. What waits for room
        beside something is not overtaken there: it would wait until nothing smaller is left."""
        promised: set[str] = set()
        for piece in waiting:
            free = (gpu for gpu in self._quiet() if gpu not in promised)
            gpu = next((gpu for gpu in free if self._fits(gpu, piece)), None)
            if gpu is not None:
                self._begin(piece, gpu)
                return piece
            promised |= {self.places[w.beside] for w in piece if w.beside in self.places}
        return None

    def _quiet(self) -> Iterator[str]:
        """GPUs that nobody measures on, those with the least to do first."""
        free = [gpu for gpu in self.gpus if gpu not in self.holders]
        yield from sorted(free, key=lambda gpu: len(self._on(gpu)))

    def _on(self, gpu: str) -> list[Running]:
        return [r for r in self.running if r.gpu == gpu]

    def _fits(self, gpu: str, piece: Sequence[Work]) -> bool:
        if any(self.places.get(work.beside, gpu) != gpu for work in piece):
            return False
        there, most = self._on(gpu), max(work.memory for work in piece)
        taken = sum(r.work.memory for r in there)
        return not there or (len(there) < self.together and taken + most <= self.room[gpu])

    def _begin(self, piece: Sequence[Work], gpu: str) -> None:
        work, *rest = piece
        self.places[work.result] = gpu
        with work.log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, *work.command],
                env=self._surroundings(gpu, work),
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.running.append(Running(work, rest, gpu, process))

    def _surroundings(self, gpu: str, work: Work) -> dict[str, str]:
        """One GPU, this checkout, and a share of the cores for compiling."""
        paths = [str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        shares = len(self.gpus) * self.together
        return {
            "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // shares)),
            **os.environ,
            TURN: str(work.turn),
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            "CUDA_VISIBLE_DEVICES": gpu,
            "TEARDOWN_CUPTI": "0",  # else a profile and a CUDA graph meet badly
        }


def size(gpu: str) -> float:
    """The GB of a GPU; without one there is no end of room."""
    query = ["--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(["nvidia-smi", f"--id={gpu}", *query], capture_output=True)
    except FileNotFoundError:
        return float("inf")
    return float(told.stdout) * 2**20 / 1e9 if told.returncode == 0 else float("inf")


def failure(ended: Running) -> str:
    """Why a process did not succeed: what it said last, and the signal that ended it, if any."""
    code = ended.process.returncode
    said = last_line(ended.work.log) if code else ""
    return f"{signal.strsignal(-code)}: {said}" if code < 0 else said


def last_line(log: Path) -> str:
    """The last line that a process said, which may have been killed inside a character."""
    said = log.read_text(errors="replace").splitlines()
    lines = [line.strip() for line in said if line.strip()]
    return lines[-1][:160] if lines else "it said nothing"
