"""Long runs: whether anything is compiled twice, whether memory stays, whether curves overlap.

    python tools/bench_long.py --gpu 0,1 --limit 560 --out long
    python tools/bench_long.py --tiny                  a small transformer for some steps, on a CPU

Three runs as `difftrain train` makes them, each in a process of its own on the next free GPU, with
their checkpoints and grids: `fast` is specs/recipes/emoji64.diff as it stands (on a GPU compiled,
bf16, one CUDA graph), `plain` is the same in fp32 without TF32 and not compiled, with the same
seed, data and draws, and `sd15` is tools/bench/sd15.diff on random latents. Every step logs its
loss, and every so many steps memory (on a GPU `allocated` by tensors / `reserved`) and compilations
are looked at; a compilation after the first steps would also end the run.

The standard error is that of the mean of a window, from the scatter of its steps: what another
order of the data would change. What a run logged before the time was up counts.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import curves
from bench.crew import Crew, Running, Work

HERE = Path(__file__).parent
WATCHED, SPECS = HERE / "bench" / "watched.py", HERE.parent / "specs" / "recipes"
PLAIN = {"train.precision": "fp32", "train.compile": "off"}
SD15_STEPS, SD15_BATCH, SIDE = 300, 16, 64
TINY_STEPS, TINY_EVERY = 60, 10
TINY = {  # what makes classes.diff small
    "backbone.depth": "1",
    "backbone.width": "32",
    "backbone.heads": "2",
    "backbone.patch": "4",
    "data.batch": "16",
    "train.warmup": "10",
    "train.sample_every": "20",
    "train.save_every": "40",
    "sample.count": "2",
    "sample.solver.steps": "4",
    "train.compile": "on",
}
HEAD = "run | steps | compiled | again | first, GB in use | last | at most | grew last at step"
Lines = list[dict]


@dataclass(frozen=True)
class Run:
    """A spec with settings; `side` that of random latents, where it has no data of its own."""

    spec: Path
    steps: int
    settings: Mapping[str, str]
    side: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", default="", help="of fast, plain and sd15, with commas")
    parser.add_argument("--steps", type=int, help="steps of `fast` and `plain`: 2000")
    parser.add_argument("--every", type=int, help="steps of a window, and between looks: 100")
    parser.add_argument("--gpu", default="0", help="numbers of the GPUs to use, as 0,1")
    parser.add_argument("--together", type=int, default=1, help="how many share a GPU")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for everything")
    parser.add_argument("--tiny", action="store_true", help="a small transformer, for a CPU")
    parser.add_argument("--out", type=Path, default=Path("long"), help="for curves and numbers")
    args = parser.parse_args()
    args.every = args.every or (TINY_EVERY if args.tiny else 100)
    runs = chosen(args)
    args.out.mkdir(parents=True, exist_ok=True)
    found = {name: lines for name, lines in measured(runs, args).items() if lines}
    losses = {name: [one["loss"] for one in lines[1:]] for name, lines in found.items()}
    pair = {name: losses[name] for name in ("fast", "plain") if losses.get(name)}
    if pair:
        curves.drawn(pair, args.out / "curves.png")
    print(report(found, losses, args.every))


def chosen(args: argparse.Namespace) -> dict[str, Run]:
    """The runs that are asked for."""
    if args.tiny:
        spec, steps, more = SPECS / "classes.diff", args.steps or TINY_STEPS, TINY
    else:
        spec, steps, more = SPECS / "emoji64.diff", args.steps or 2000, {}
    runs = {"fast": Run(spec, steps, more), "plain": Run(spec, steps, {**more, **PLAIN})}
    if not args.tiny:
        runs["sd15"] = Run(HERE / "bench" / "sd15.diff", SD15_STEPS, {}, SIDE)
    wanted = args.runs.split(",") if args.runs else list(runs)
    for name in wanted:
        if name not in runs:
            sys.exit(f"there is no run `{name}`: use one of {', '.join(runs)}")
    return {name: runs[name] for name in wanted}


def measured(runs: Mapping[str, Run], args: argparse.Namespace) -> dict[str, Lines]:
    """What every run wrote down: the machine, then a line for each step."""
    found: dict[str, Lines] = {}

    def kept(running: Running, error: str) -> None:
        result = running.work.result
        name, text = result.parent.name, result.read_text() if result.exists() else ""
        (args.out / f"{name}.jsonl").write_text(text)
        (args.out / f"{name}.log").write_bytes(running.work.log.read_bytes()[-50_000:])
        whole = text[: text.rfind("\n") + 1].splitlines()  # the last line may be half written
        found[name] = [json.loads(line) for line in whole]
        print(f"{name}: {error or 'done'}", file=sys.stderr, flush=True)

    with TemporaryDirectory() as folder:
        crew = Crew(args.gpu.split(","), args.together, args.limit, kept)
        signal.signal(signal.SIGTERM, crew.stop)
        crew.run([[work(run, Path(folder, name), args.every)] for name, run in runs.items()])
    return {name: found.get(name, []) for name in runs}


def work(run: Run, folder: Path, every: int) -> Work:
    """The process of a run, in a folder of its own."""
    folder.mkdir()
    settings = {**run.settings, "train.log_every": "1"}
    told = {"spec": str(run.spec), "steps": run.steps, "settings": settings, "every": every}
    told |= {"side": run.side, "rows": 4 * SD15_BATCH}
    task, result = folder / "task.json", folder / "steps.jsonl"
    task.write_text(json.dumps(told))
    return Work((str(WATCHED), str(task), str(result)), result)


# ---- showing


def report(found: Mapping[str, Lines], losses: Mapping[str, Sequence[float]], every: int) -> str:
    """The tables, and what follows from them."""
    machines = sorted({f"{one[0]['device']}, torch {one[0]['torch']}" for one in found.values()})
    parts = [[f"{date.today()}, {'; '.join(machines)}"]]
    both = [losses.get(name, []) for name in ("fast", "plain")]
    seen = curves.windows(*both, every)
    if seen:
        parts += [list(compared(seen)), [overlap(seen, *both)]]
    parts.append(list(held(found)))
    return "\n\n".join("\n".join(lines) for lines in parts)


def compared(seen: Sequence[curves.Window]) -> Iterator[str]:
    """The means of the windows, side by side."""
    yield "| steps | fast | plain | difference | standard error |"
    yield "|---|---|---|---|---|"
    for one in seen:
        means = " | ".join(f"{mean:.4f}" for mean in one.means)
        yield f"| {one.first} to {one.last} | {means} | {one.difference:+.1e} | {one.error:.1e} |"


def overlap(seen: Sequence[curves.Window], fast: Sequence[float], plain: Sequence[float]) -> str:
    """How far the two curves are from one another."""
    far = max(seen, key=lambda one: abs(one.difference))
    most = max(abs(one.difference) / one.error for one in seen)
    apart = [a - b for a, b in zip(fast, plain, strict=False)]
    return (
        f"The largest difference of two means is {far.difference:+.1e}, in steps {far.first} to"
        f" {far.last}, where the standard error is {far.error:.1e}; no window is further apart than"
        f" {most:.2f} standard errors, and the mean of all differences is"
        f" {sum(apart) / len(apart):+.1e}."
    )


def held(found: Mapping[str, Lines]) -> Iterator[str]:
    """Memory and compilations of each run, at its first look, its last and in between."""
    yield f"| {HEAD} |"
    yield "|---" * 8 + "|"
    for name, lines in found.items():
        looks = [line for line in lines if "held" in line]
        if not looks:
            yield f"| {name} | {len(lines) - 1} | | | | | | |"
            continue
        first, last = looks[0], looks[-1]
        again = last["compiled"] - first["compiled"]
        places = " | ".join(f"{amounts(x['held'])} at {x['step']}" for x in (first, last))
        grew = [b["step"] for a, b in zip(looks, looks[1:], strict=False) if grown(a, b)]
        steps, most = last["step"], amounts(last["most"])
        cells = f"{steps} | {first['compiled']} | {again} | {places} | {most}"
        yield f"| {name} | {cells} | {grew[-1] if grew else 'never'} |"


def grown(before: Mapping, after: Mapping) -> bool:
    """Whether any kind of memory in use became more."""
    return any(after["held"][kind] > amount for kind, amount in before["held"].items())


def amounts(memory: Mapping[str, float]) -> str:
    return " / ".join(f"{amount:.3f}" for amount in memory.values())


if __name__ == "__main__":
    main()
