"""How fast a training step is, beside the loops that people use today, in one table.

    python tools/bench_step.py                          every row on one GPU, or on all with --gpu
    python tools/bench_step.py --rows sd15,dit:128 --gpu 0,1,2,3 --spread --limit 560
    python tools/bench_step.py --tiny                   the small table, on any machine

A row is a network at a batch (`dit:128` is `dit` at batch 128): peers of tools/peers and specs of
tools/bench, each measured in a process of its own, on one GPU after the other. With `--spread` each
goes to the next free GPU instead, so that compiling takes the least time; a second run without it
finds the compiled code in torch's cache and measures what belongs together on the same GPU.

`share` is of the machine's own rate, taken in the same process: bf16 products of 8192 x 8192 (on a
CPU fp32 ones of 1024 x 1024); the arithmetic of a step counts 3 forwards, and 4 where an objective
needs one more. `first` is the first step with all its compiling, `cached` says that it was found in
the cache. `outside` counts a peer's kernels beyond its network's forward and backward.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.rows import ROWS, TINY_BATCH, Contender, Row

HERE = Path(__file__).parent
ONE = HERE / "bench" / "one.py"
SMALL = ("sd15", "dit")  # the rows of the small table
Key = tuple[str, str]  # a row as it was asked for, and the label of a contender
Job = tuple[list[Key], str]  # a task, and the contenders that it measures
KINDS = {  # of kernels, by what their names say; the first that fits
    "attention": r"flash|fmha|sdpa|attention|attn",
    "convolutions": r"conv|fprop|dgrad|wgrad|nhwc|nchw",
    "matrix products": r"gemm|nvjet|cutlass|cublas|splitK|matmul|_mm_",
    "fused reductions": r"^triton_(red|per)",
    "fused element by element": r"^triton_poi",
}
HEAD = "row | batch | how | img/s | share | memory GB | first s | kernels | outside | recompiled"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", help=f"of {', '.join(ROWS)}, each with :BATCH or not")
    parser.add_argument("--only", default="", help="a pattern that labels of contenders match")
    parser.add_argument("--gpu", default="0", help="numbers of the GPUs to use, as 0,1,2")
    parser.add_argument("--spread", action="store_true", help="any contender on any of the GPUs")
    parser.add_argument("--tiny", action="store_true", help="tiny networks in fp32, for a CPU")
    parser.add_argument("--steps", type=int, default=30, help="steps that are timed")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for everything")
    parser.add_argument("--json", type=Path, help="where all numbers go")
    args = parser.parse_args()
    asked = args.rows.split(",") if args.rows else list(SMALL if args.tiny else ROWS)
    rows = {name: chosen(name, args.only, args.tiny) for name in asked}
    bench = Bench(rows, args)
    bench.run()
    print(report(rows, bench.results))


def chosen(name: str, only: str, tiny: bool) -> Row:
    """The row of `NAME` or `NAME:BATCH`, with the contenders that are wanted."""
    kind, _, batch = name.partition(":")
    if kind not in ROWS:
        sys.exit(f"there is no row `{kind}`: use one of {', '.join(ROWS)}")
    row = ROWS[kind]
    wanted = tuple(c for c in row.contenders if re.search(only, c.label))
    size = int(batch) if batch else TINY_BATCH if tiny else row.batch
    title = f"tiny {row.title}" if tiny else row.title
    return replace(row, title=title, batch=size, contenders=wanted)


# ---- measuring


class Bench:
    """Measures rows on some GPUs, each of which takes the next piece of work when it is free."""

    def __init__(self, rows: Mapping[str, Row], args: argparse.Namespace):
        self.rows, self.args, self.results = rows, args, {}
        self.gpus = args.gpu.split(",")
        self.end = time.monotonic() + args.limit
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()

    def run(self) -> None:
        """Fills `results`; a contender that fails leaves its error there."""
        for piece in self._pieces():
            self.waiting.put(piece)
        with TemporaryDirectory() as folder:
            workers = [
                threading.Thread(target=self._work, args=(gpu, Path(folder))) for gpu in self.gpus
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()

    def _pieces(self) -> Iterator[list[Job]]:
        """What is measured on one GPU together; with `--spread` each alone and once, specs first,
        since they compile longest."""
        if not self.args.spread:
            yield from (self._jobs(name) for name in self.rows)
            return
        shared: dict[str, list[Key]] = {}
        for keys, task in chain.from_iterable(map(self._jobs, self.rows)):
            shared.setdefault(task, []).extend(keys)
        alone = sorted(shared, key=lambda task: not json.loads(task)["spec"])
        yield from ([(shared[task], task)] for task in alone)

    def _jobs(self, name: str) -> list[Job]:
        """A row's contenders, each with its task."""
        return [([(name, c.label)], self._task(name, c)) for c in self.rows[name].contenders]

    def _task(self, name: str, contender: Contender) -> str:
        """What the process that measures a contender is told; equal ones are told the same."""
        told = contender.task(self.rows[name].batch, self.args.tiny)
        return json.dumps({**told, "steps": self.args.steps}, sort_keys=True)

    def _work(self, gpu: str, folder: Path) -> None:
        while True:
            try:
                piece = self.waiting.get_nowait()
            except queue.Empty:
                return
            for keys, task in piece:
                self._keep(keys, self._measure(task, gpu, folder))

    def _measure(self, told: str, gpu: str, folder: Path) -> dict:
        """The numbers of one contender, or its error."""
        place = folder / f"{gpu}-{time.monotonic_ns()}"
        task, result, log = (place.with_suffix(end) for end in (".task", ".json", ".log"))
        task.write_text(told)
        command = [sys.executable, str(ONE), str(task), str(result)]
        left = max(self.end - time.monotonic(), 0.1)
        with log.open("w") as out:
            said = {"env": self._surroundings(gpu), "stdout": out, "stderr": out}
            try:
                subprocess.run(command, **said, timeout=left, check=True)
            except subprocess.TimeoutExpired:
                return {"error": "not done when the time was up"}
            except subprocess.CalledProcessError:
                return {"error": last_line(log), "log": log.read_text()[-20_000:]}
        return {"gpu": gpu, **json.loads(result.read_text())}

    def _surroundings(self, gpu: str) -> dict[str, str]:
        """One GPU, this checkout, and a share of the cores for compiling."""
        paths = [str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
        threads = str(max(1, (os.cpu_count() or 1) // len(self.gpus)))
        return {
            "TORCHINDUCTOR_COMPILE_THREADS": threads,
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in paths if p),
            "CUDA_VISIBLE_DEVICES": gpu,
            "TEARDOWN_CUPTI": "0",  # else a profile and a CUDA graph meet badly
        }

    def _keep(self, keys: Sequence[Key], found: dict) -> None:
        said = found.get("error") or f"{1000 * found['seconds']:.1f} ms a step"
        for key in keys:
            self.results[key] = found
            print(f"{key[0]}, {key[1]}: {said}", file=sys.stderr, flush=True)
        if self.args.json:
            named = {" | ".join(k): v for k, v in self.results.items()}
            self.args.json.write_text(json.dumps(named, indent=1))


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    return lines[-1][:160] if lines else "it said nothing"


# ---- showing


def report(rows: Mapping[str, Row], results: Mapping[Key, dict]) -> str:
    """The table, and what follows from it."""
    fine = [found for found in results.values() if "error" not in found]
    where = sorted({f"{f['device']}, torch {f['torch']}" for f in fine})
    lines = [f"{date.today()}, {'; '.join(where)}", "", f"| {HEAD} |", "|---" * 10 + "|"]
    said = []
    for name, row in rows.items():
        found = {
            c.label: results.get((name, c.label), {"error": "not run"}) for c in row.contenders
        }
        lines += [line(row, label, one) for label, one in found.items()]
        measured = {label: one for label, one in found.items() if "error" not in one}
        said += [f"- {row.title}, batch {row.batch}: {s}" for s in sentences(row, measured)]
    rates = sorted(f["matmul"] / 1e12 for f in fine)
    if rates:
        said.append(f"- matrix products: {rates[0]:.3g} to {rates[-1]:.3g} TFLOP/s")
    return "\n".join([*lines, "", *said])


def line(row: Row, label: str, found: Mapping) -> str:
    """One contender's line of the table."""
    start = f"| {row.title} | {row.batch} | {label} |"
    if "error" in found:
        return f"{start} {found['error']} |" + " |" * 6
    held = " / ".join(f"{found[k]:.1f}" for k in ("allocated", "reserved") if k in found)
    hit = " cached" * any("fxgraph_cache_hit" in name for name in found["hits"])
    cells = [
        f"{row.batch / found['seconds']:.1f}",
        f"{found['share']:.1%}",
        held,
        f"{found['first']:.1f}{hit}",
        str(sum(count for count, _ in found["kernels"].values()) or "-"),
        str(found.get("outside") or "-"),
        str(found["recompiled"]),
    ]
    return f"{start} {' | '.join(cells)} |"


def sentences(row: Row, found: Mapping[str, Mapping]) -> Iterator[str]:
    """What the row was measured for, as far as its contenders were."""
    bars = [label for label in row.faster[1:] if label in found]
    if bars and row.faster[0] in found:
        bar = min(bars, key=lambda label: found[label]["seconds"])
        times = found[bar]["seconds"] / found[row.faster[0]]["seconds"]
        yield f"{row.faster[0]} is {times:.2f} times as fast as {bar}"
    for costly, plain in row.costs:
        if costly in found and plain in found:
            times = found[costly]["seconds"] / found[plain]["seconds"]
            yield f"a step of {costly} takes {times:.2f} times one of {plain}"
    if row.around and all(label in found for label in row.around):
        yield around(*(found[label] for label in row.around))
    for label, one in found.items():
        if one["kernels"]:
            yield f"{label} spends {kinds(one['kernels'])}"


def around(whole: Mapping, bare: Mapping) -> str:
    """What an objective adds to its network and update: time and kernels."""
    share = 1 - bare["seconds"] / whole["seconds"]
    here, there = (plain_names(found["kernels"]) for found in (whole, bare))
    count = sum(here.values()) - sum(there.values())
    listed = "; ".join(f"{n} {name}" for name, n in (here - there).most_common())
    gone = "; ".join(f"{n} {name}" for name, n in (there - here).most_common())
    changed = f" (more: {listed or 'none'}; fewer: {gone or 'none'})" if here else ""
    return f"the objective takes {share:.1%} of the step and {count} kernels{changed}"


def plain_names(kernels: Mapping[str, Sequence]) -> Counter[str]:
    """How often each kernel is launched, without the running numbers of their names."""
    found: Counter[str] = Counter()
    for name, (count, _) in kernels.items():
        found[re.sub(r"_\d+(?=$|_)", "", name)] += count
    return found


def kinds(kernels: Mapping[str, Sequence]) -> str:
    """Which share of the time in kernels each kind takes."""
    spent: Counter[str] = Counter()
    for name, (_, microseconds) in kernels.items():
        kind = next((k for k, pattern in KINDS.items() if re.search(pattern, name)), "others")
        spent[kind] += microseconds
    total = sum(spent.values())
    shares = ", ".join(f"{kind} {part / total:.1%}" for kind, part in spent.most_common())
    return f"{total / 1000:.1f} ms in kernels: {shares}"


if __name__ == "__main__":
    main()
