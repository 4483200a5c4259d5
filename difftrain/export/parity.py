"""The gate of every export: the run and what was exported, side by side on the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields

import torch
from torch import Tensor

from difftrain.compiler.lowering import exact
from difftrain.export.errors import Parted
from difftrain.export.modules import Decode, Piece
from difftrain.export.opened import Opened, probe
from difftrain.export.table import Row, Table, replay
from difftrain.sampling.model import Sampler
from difftrain.sampling.solvers import Pair, start

# Relative errors in norm that are allowed; bf16 has three bits fewer than fp16.
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
SAMPLES = 2  # that are compared, where batches may be of so many
Call = Callable[[str, Mapping[str, Tensor]], tuple[Tensor, ...]]  # (piece, its inputs by name)


@dataclass(frozen=True)
class Report:
    """Relative errors against the run in fp32: of one call of the backbone, of the last latents,
    of what is decoded, and of the text (0 where none is encoded)."""

    allowed: float
    backbone: float
    latents: float
    decode: float
    text: float = 0.0

    def __str__(self) -> str:
        errors = {n: v for n, v in asdict(self).items() if n != "allowed"}
        told = ", ".join(f"{n} {v:.1e}" for n, v in errors.items())
        return f"relative errors against the run in fp32: {told} (allowed: {self.allowed:.0e})"


@dataclass(frozen=True, eq=False)
class Recorded(Sampler):
    """A model that keeps what it was asked, and what it answered."""

    asked: list[Tensor] = field(default_factory=list)
    answered: list[Pair] = field(default_factory=list)

    def estimates(self, x: Tensor, t: Tensor, r: Tensor | None = None) -> Pair:
        self.asked.append(x)
        self.answered.append(super().estimates(x, t, r))
        return self.answered[-1]


@dataclass(frozen=True, eq=False)
class Eager:
    """A run sampled in fp32: its condition, noise by draw, the latents of every evaluation, and the
    last ones."""

    told: dict[str, Tensor]
    noise: Callable[[int], Tensor]
    model: Recorded
    latents: Tensor


@torch.no_grad()
def gate(run: Opened, made: Mapping[str, Piece], call: Call, precision: str) -> Report:
    """The errors of what was exported. `call` asks it, piece by piece, with tensors on the run's
    device. Raises Parted where one is above what the precision is allowed."""
    with exact():
        eager = sampled(run)
        final, passed = _walked(run, made, call, eager)
        pictures = Decode(run.parts.codec, torch.float32, not run.arrays)(eager.latents)
        ids = probe(run, len(eager.latents))
        text = call("text", {"ids": ids.to(run.device)})[0] if "text" in made else None
        report = Report(
            TOLERANCE[precision],
            _backbone(run, made, call, eager),
            apart(final, eager.latents),
            apart(call("decode", {"latents": eager.latents})[0], pictures),
            0.0 if text is None else apart(text, eager.told["cond"]),
        )
        _judge(report, precision, lambda: passed or _steps(run, made, call, eager), eager)
    return report


def every_size(
    made: Mapping[str, Piece], call: Call, sizes: Mapping[str, Iterable[int]], precision: str
) -> None:
    """Holds what was exported against its own modules at batches of `sizes`, for which engines may
    have kernels of their own. Raises Parted."""
    own = bare(made)
    for name, count in [(name, count) for name, counts in sizes.items() for count in counts]:
        inputs = made[name].example(count)
        both = (call(name, inputs), own(name, inputs))
        error = apart(*(torch.cat([value.flatten().cpu() for value in each]) for each in both))
        if not error <= TOLERANCE[precision]:
            raise Parted(
                f"what was exported parts from the run: in a batch of {count} the relative error of"
                f" `{name}` is {error:.1e}, and {TOLERANCE[precision]:.0e} is allowed in"
                f" {precision}; {_hint(precision)}"
            )


def sampled(run: Opened) -> Eager:
    """The run's own solver, with its own network, for the first samples of its seed."""
    low, high = run.batch
    count = min(max(low, SAMPLES), high)
    told = conditions(run, count)
    plain = run.eager(told.get("cond"), told.get("null"), count)
    model = Recorded(**{f.name: getattr(plain, f.name) for f in fields(plain)})
    draws = run.draws(count)
    like = torch.zeros(count, *run.shape, device=run.device)
    latents = run.walk(model, start(model, like, run.grid, draws), run.grid, draws)
    return Eager(told, lambda draw: draws.noise(draw, like), model, latents)


def conditions(run: Opened, count: int) -> dict[str, Tensor]:
    """The conditions that an export is tried with, and the empty one where it is read."""
    text = run.parts.modules.get("text")
    if text is None:
        return {}
    told = {"cond": text(probe(run, count).to(run.device))}
    return told | ({"null": text(run.parts.null_ids(run.device))} if run.guided else {})


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The relative error of the one against the other, in norm."""
    theirs = theirs.double()
    return float((ours.double() - theirs).norm() / theirs.norm())


# ---- what was exported, asked


def bare(made: Mapping[str, Piece]) -> Call:
    """The modules themselves as functions, where they are."""

    def call(name: str, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        given = {n: inputs[n].to(made[name].inputs[n].device) for n in made[name].inputs}
        found = made[name].module(**given)
        each = found if isinstance(found, tuple) else (found,)
        return tuple(value.to(next(iter(inputs.values())).device) for value in each)

    return call


def by_step(made: Mapping[str, Piece], call: Call) -> Call:
    """`call`, asking `step` for the backbone: with a 1 for one estimate alone, its row gives it."""

    def asked(name: str, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if name != "backbone":
            return call(name, inputs)
        return tuple(call("step", _alone(made["step"], inputs, k))[0] for k in (1, 2))

    return asked


def _alone(step: Piece, inputs: Mapping[str, Tensor], place: int) -> dict[str, Tensor]:
    """The inputs of `step` for those of the backbone, with a row that is 1 at one place."""
    x, t, row = inputs["x"], inputs["t"], torch.zeros(step.inputs["row"].shape)
    row[place] = 1
    every = {**inputs, "t": t[:1], "r": inputs.get("r", t)[:1], "row": row.to(x.device)}
    every["noise"] = torch.zeros_like(x)
    if "kept" in step.inputs:
        every["kept"] = x.new_zeros(len(step.inputs["kept"]), *x.shape)
        every["kept"][0] = inputs.get("guess", 0)
    return {name: every[name] for name in step.inputs}


def _backbone(run: Opened, made: Mapping[str, Piece], call: Call, eager: Eager) -> float:
    """The error of one call, half-way, at the latents of the run."""
    half = len(run.table.rows) // 2
    before = eager.model.answered[half - 1][0] if half else None
    x, row = eager.model.asked[half], run.table.rows[half]
    found = call("backbone", _asked(made["backbone"], run.table, x, row, eager.told, before))
    return max(apart(a, b) for a, b in zip(found, eager.model.answered[half], strict=True))


def _asked(
    piece: Piece, table: Table, x: Tensor, row: Row, told: Mapping, before: Tensor | None
) -> dict[str, Tensor]:
    """The inputs of the backbone for a row of the table."""
    t, r = (torch.full((len(x),), v, dtype=table.times, device=x.device) for v in (row.t, row.r))
    guess = torch.zeros_like(x) if before is None else before
    every = {"x": x, "t": t, "r": r, "guess": guess, **told}
    return {name: every[name] for name in piece.inputs}


def _walked(run: Opened, made: Mapping[str, Piece], call: Call, eager: Eager):
    """The last latents, and those of every evaluation where they can be seen."""
    if "step" in made:
        passed = list(stepped(run.table, made["step"], call, eager.noise, eager.told))
        return passed[-1], passed[:-1]
    noises = [eager.noise(draw) for draw in run.table.draws]
    inputs = {"noise": eager.noise(0), **eager.told}
    return call("sampler", inputs | ({"noises": torch.stack(noises)} if noises else {}))[0], None


def stepped(
    table: Table, piece: Piece, call: Call, noise: Callable[[int], Tensor], told: Mapping
) -> Iterator[Tensor]:
    """The latents of every evaluation and then the last ones, by the piece `step`."""
    x = sum(n.weight * noise(n.draw) for n in table.start)
    kept = torch.zeros(sum(table.kept), *x.shape, device=x.device)
    weights = table.tensor().to(x.device)
    for row, own in zip(table.rows, weights, strict=True):
        yield x
        t, r = (torch.tensor([v], dtype=table.times, device=x.device) for v in (row.t, row.r))
        drawn = noise(row.noise.draw) if row.noise else torch.zeros_like(x)
        every = {"x": x, "t": t, "r": r, "row": own, "kept": kept, "noise": drawn, **told}
        x, *rest = call("step", {name: every[name] for name in piece.inputs})
        kept = rest[0] if rest else kept
    yield x


def _steps(run: Opened, made: Mapping[str, Piece], call: Call, eager: Eager) -> list[Tensor]:
    """The latents of every evaluation, by the backbone and the table."""
    passed, before = [], [None]

    def ask(x: Tensor, row: Row) -> Pair:
        passed.append(x)
        pair = call("backbone", _asked(made["backbone"], run.table, x, row, eager.told, before[0]))
        before[0] = pair[0]
        return pair

    replay(run.table, ask, eager.noise)
    return passed


# ---- the verdict


def _judge(report: Report, precision: str, steps: Callable[[], list[Tensor]], eager: Eager) -> None:
    """Raises Parted for what is too far off: latents with the evaluation from which on they are."""
    errors = {n: v for n, v in asdict(report).items() if n != "allowed"}
    wrong = next((n for n, v in errors.items() if not v <= report.allowed), None)
    if wrong is None:
        return
    where = _where(steps(), eager, report.allowed) if wrong == "latents" else ""
    raise Parted(
        f"what was exported parts from the run: the relative error of `{wrong}` is"
        f" {errors[wrong]:.1e}{where}, and {report.allowed:.0e} is allowed in {precision};"
        f" {_hint(precision)}"
    )


def _hint(precision: str) -> str:
    return "export to another target" if precision == "fp32" else "export with `precision = fp32`"


def _where(passed: list[Tensor], eager: Eager, allowed: float) -> str:
    gaps = [apart(a, b) for a, b in zip(passed, eager.model.asked, strict=True)]
    first = next((i for i, gap in enumerate(gaps) if not gap <= allowed), len(gaps))
    if first == len(gaps):
        return f", from the last of {len(gaps)} evaluations on"
    return f", from evaluation {first} of {len(gaps)} on ({gaps[first]:.1e})"
