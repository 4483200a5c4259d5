"""How fast a training step is, beside the loops that people use today, in one table.

    python tools/bench_step.py                          every row on one GPU, or on all with --gpu
    python tools/bench_step.py --gpu 0,1 --spread --limit 560 --json table.json
    python tools/bench_step.py --rows dit,dit:128 --only '^ours$' --set train.compile=off
    python tools/bench_step.py --tiny                   the small table, on any machine

A row is a network at a batch (`dit:128` is `dit` at batch 128): peers of tools/peers and specs of
tools/bench, each measured in a process of its own, on one GPU after the other. With `--spread` each
goes to the next free GPU instead, several side by side on each as its memory allows, and whoever
measures has the GPU alone (`bench/crew.py`): so compiling takes the least time. A second run finds
the compiled code in torch's cache, and without `--spread` measures what belongs together on the
same GPU. What is wanted most comes first, and what had no time costs its own line alone.

`share` is of the machine's own rate, taken in the same process: bf16 products of 8192 x 8192 (on a
CPU fp32 ones of 1024 x 1024); the arithmetic of a step counts 3 forwards, and 4 where an objective
needs one more. `first` is the first step with all its compiling, `cached` says that it was found in
the cache. `outside` counts kernels beyond the network's forward and backward; ours are known where
the network and its update were measured alone.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import report
from bench.crew import Crew, Running, Work
from bench.rows import ROWS, TINY_BATCH, WHOLE, Key, Row, rank

HERE = Path(__file__).parent
ONE = HERE / "bench" / "one.py"
SMALL = ("sd15", "dit")  # the rows of the small table
TOGETHER = 3  # processes side by side on a GPU with `--spread`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help=f"of {', '.join(ROWS)}, each with :BATCH or not")
    parser.add_argument("--only", default="", help="a pattern that labels of contenders match")
    parser.add_argument("--gpu", default="0", help="numbers of the GPUs to use, as 0,1,2")
    parser.add_argument("--spread", action="store_true", help="any contender on any of the GPUs")
    parser.add_argument("--together", type=int, help="how many side by side on each GPU")
    parser.add_argument("--set", action="append", default=[], help="BLOCK.OPTION=VALUE of ours")
    parser.add_argument("--tiny", action="store_true", help="tiny networks in fp32, for a CPU")
    parser.add_argument("--steps", type=int, default=30, help="steps that are timed")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for everything")
    parser.add_argument("--json", type=Path, help="where all numbers go")
    args = parser.parse_args()
    asked = args.rows.split(",") if args.rows else list(SMALL if args.tiny else WHOLE)
    args.together = args.together or (TOGETHER if args.spread else 1)
    rows = {name: chosen(name, args.only, args.tiny) for name in asked}
    bench = Bench(rows, args)
    bench.run()
    print(report.table(rows, bench.results, args.set))


def chosen(name: str, only: str, tiny: bool) -> Row:
    """The row of `NAME` or `NAME:BATCH`, with the contenders that are wanted."""
    kind, _, batch = name.partition(":")
    if kind not in ROWS:
        sys.exit(f"there is no row `{kind}`: use one of {', '.join(ROWS)}")
    row = ROWS[kind]
    wanted = tuple(c for c in row.contenders if re.search(only, c.label))
    size = int(batch) if batch else TINY_BATCH if tiny else row.batch
    title = "tiny " + row.title.partition(",")[0] if tiny else row.title  # of other sizes
    return replace(row, title=title, batch=size, contenders=wanted)


class Bench:
    """Measures rows on some GPUs; `results` has the numbers of every contender, or its error."""

    def __init__(self, rows: Mapping[str, Row], args: argparse.Namespace):
        self.rows, self.args, self.results = rows, args, {}
        self.more = dict(change.split("=", 1) for change in args.set)
        self.keys: dict[Path, list[Key]] = {}
        self.crew = Crew(args.gpu.split(","), args.together, args.limit, self._keep)

    def run(self) -> None:
        signal.signal(signal.SIGTERM, self.crew.stop)
        with TemporaryDirectory() as folder:
            self.crew.run(self._pieces(Path(folder)))

    def _pieces(self, folder: Path) -> list[list[Work]]:
        """What is measured on one GPU together: a row, and with `--spread` each contender alone and
        once, in the order in which they are wanted."""
        if not self.args.spread:
            each = [[([key], task, gb) for key, task, gb in self._jobs(n)] for n in self.rows]
        else:
            each = [[one] for one in self._merged()]
        numbers = count()
        return [[self._work(folder / f"{next(numbers)}", *one) for one in piece] for piece in each]

    def _merged(self) -> list[tuple[list[Key], str, float]]:
        """Every different task once, with all the contenders that it measures."""
        shared: dict[str, tuple[list[Key], str, float]] = {}
        for key, task, gb in chain.from_iterable(map(self._jobs, self.rows)):
            shared.setdefault(task, ([], task, gb))[0].append(key)
        return sorted(shared.values(), key=lambda one: min(map(rank, one[0])))

    def _jobs(self, name: str) -> Iterator[tuple[Key, str, float]]:
        """A row's contenders, each with its task and the GB that it may take."""
        row = self.rows[name]
        for contender in row.contenders:
            told = contender.task(row.batch, self.args.tiny, self.more)
            task = json.dumps({**told, "steps": self.args.steps}, sort_keys=True)
            yield (name, contender.label), task, contender.memory(row.batch)

    def _work(self, place: Path, keys: list[Key], told: str, memory: float) -> Work:
        task, result = place.with_suffix(".task"), place.with_suffix(".json")
        task.write_text(told)
        self.keys[result] = keys
        near = [(row, self.rows[row].beside(label)) for row, label in keys]
        beside = next((r for r, others in self.keys.items() if {*near} & {*others}), None)
        return Work((str(ONE), str(task), str(result)), result, memory, beside)

    def _keep(self, running: Running, error: str) -> None:
        """What is written down of a process that ended."""
        work = running.work
        found = {"error": error, "log": work.log.read_text(errors="replace")[-20_000:]}
        if not error:
            found = {"gpu": running.gpu, **json.loads(work.result.read_text())}
            began, ended = found["first"]
            found["first"] = ended - began - running.waited(began, ended)
        said = error or f"{1000 * found['seconds']:.1f} ms a step"
        for key in self.keys[work.result]:
            self.results[key] = found
            print(f"{key[0]}, {key[1]}: {said}", file=sys.stderr, flush=True)
        if self.args.json:
            named = {" | ".join(k): v for k, v in self.results.items()}
            self.args.json.write_text(json.dumps(named, indent=1))


if __name__ == "__main__":
    main()
