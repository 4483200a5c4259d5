"""What is exported, as plain modules with the averaged weights.

The network and the codec have the precision of the target; everything around them is fp32.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from difftrain.answer import unwrap
from difftrain.export.errors import ExportError
from difftrain.export.opened import Opened, probe, refuse
from difftrain.export.table import ESTIMATES, Row, Table
from difftrain.sampling.model import Sampler
from difftrain.sampling.solvers import Pair

GUIDANCE = ("guidance", "given", "interval", "rescale")  # of a `Sampler`
UNROLLED = 8  # evaluations in one graph, at most
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Piece:
    """A module to export: an example of every input by name, the axis of the batch in each
    (none: the shape is fixed), and the names of what it returns."""

    module: nn.Module
    inputs: Mapping[str, Tensor]
    batch: Mapping[str, int]
    outputs: tuple[str, ...]

    def example(self, count: int) -> dict[str, Tensor]:
        """An example of every input for a batch of `count`: rows of the given ones in turn."""
        return {n: self._repeated(n, v, count) for n, v in self.inputs.items()}

    def _repeated(self, name: str, value: Tensor, count: int) -> Tensor:
        if name not in self.batch:
            return value
        axis = self.batch[name]
        rows = torch.arange(count, device=value.device) % value.shape[axis]
        return value.index_select(axis, rows)


class Text(nn.Module):
    """The condition [B, T, width] of token ids [B, T]."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(ids)


class InType(nn.Module):
    """A network in a precision of its own, asked and answering in fp32; times stay as they are."""

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.network, self.dtype = network.to(dtype), dtype

    def forward(self, x: Tensor, t: Tensor, cond=None, **extra) -> Tensor:
        fields = {
            n: self._cast(v) if v is not None and v.dim() > 1 else v for n, v in extra.items()
        }
        return unwrap(self.network(self._cast(x), t, self._cast(cond), **fields)).float()

    def _cast(self, value):
        real = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.dtype) if real else value


class Backbone(nn.Module):
    """(x0_hat, eps_hat) [B, ...] at x [B, ...] and t [B], guided: both conditions are one batch of
    2 B. `r` [B] is the earlier time and `guess` [B, ...] the estimate before, where a network is
    told them. `asked` says how the run asks its network."""

    def __init__(self, network: nn.Module, asked: Sampler):
        super().__init__()
        self.network, self.level, self.estimate = network, asked.level, asked.estimate
        self.guidance = {name: getattr(asked, name) for name in GUIDANCE}
        self.tables = nn.ModuleList([Tables(asked.tables), Tables(asked.estimate_tables)])

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Tensor | None = None,
        null: Tensor | None = None,
        r: Tensor | None = None,
        guess: Tensor | None = None,
    ) -> Pair:
        levels, estimates = (held.by_name() for held in self.tables)
        last = {} if guess is None else {"guess": guess}
        asked = Sampler(
            level=self.level,
            tables=levels,
            estimate=self.estimate,
            estimate_tables=estimates,
            nets={"student": self.network},
            index=torch.arange(x.shape[0], device=x.device),
            cond=cond,
            null=null,
            last=last,
            **self.guidance,
        )
        return asked.estimates(x, t, r)


class Tables(nn.Module):
    """Tables of a program, which move with the module."""

    def __init__(self, tables: Mapping[str, Tensor]):
        super().__init__()
        self.names = tuple(tables)
        for name, value in tables.items():
            self.register_buffer(f"table_{name}", value.clone())

    def by_name(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"table_{name}") for name in self.names}


class Loop(nn.Module):
    """The backbone, and what the rows of a table make of its estimates."""

    def __init__(self, backbone: Backbone, table: Table, guess: bool):
        super().__init__()
        self.backbone, self.table, self.guess = backbone, table, guess
        self.jumps = any(row.r != row.t for row in table.rows)

    def around(self, backbone: nn.Module) -> Loop:
        """The same around another backbone."""
        return type(self)(backbone, self.table, self.guess)

    def ask(self, x: Tensor, t: Tensor, r: Tensor, cond, null, before: Tensor | None) -> Pair:
        """The estimates at x [B, ...]; t and r are [1]."""
        t, r = (v.to(self.table.times).expand(x.shape[0]) for v in (t, r))
        guess = before if self.guess else None
        return self.backbone(x, t, cond, null, r if self.jumps else None, guess)


class Unrolled(Loop):
    """Latents [B, ...] of noise [B, ...] and, for solvers that draw, `noises` [N, B, ...]: all
    evaluations in one graph."""

    def forward(
        self,
        noise: Tensor,
        noises: Tensor | None = None,
        cond: Tensor | None = None,
        null: Tensor | None = None,
    ) -> Tensor:
        drawn = {0: noise, **{d: noises[i] for i, d in enumerate(self.table.draws)}}
        x = sum(n.weight * drawn[n.draw] for n in self.table.start)
        seen: list[Pair] = []
        for row in self.table.rows:
            before = seen[0][0] if seen else None
            seen.insert(0, self.ask(x, *self._times(row, x), cond, null, before))
            x = _moved(row, x, seen, drawn)
        return x

    def _times(self, row: Row, x: Tensor) -> list[Tensor]:
        return [torch.tensor([v], dtype=self.table.times, device=x.device) for v in (row.t, row.r)]


def _moved(row: Row, x: Tensor, seen: Sequence[Pair], drawn: Mapping[int, Tensor]) -> Tensor:
    """What a row makes of x, the estimates so far and noise; weights of 0 cost nothing."""
    terms = [row.x * x] if row.x else []
    for n, weights in enumerate((row.x0_hat, row.eps_hat)):
        terms += [w * pair[n] for w, pair in zip(weights, seen, strict=False) if w]
    terms += [row.noise.weight * drawn[row.noise.draw]] if row.noise else []
    return sum(terms[1:], terms[0])


class Step(Loop):
    """One evaluation with its update: the next x [B, ...], and what is kept for the next call.

    `t`, `r` [1] and `row` [4 + kept] are those of `Table`; `kept` [K, B, ...] are the x0_hat and
    then the eps_hat of evaluations before, the newest of each first, and zeros at first.
    """

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        row: Tensor,
        r: Tensor | None = None,
        kept: Tensor | None = None,
        noise: Tensor | None = None,
        cond: Tensor | None = None,
        null: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        before = None if kept is None else kept[0]
        pair = self.ask(x, t, t if r is None else r, cond, null, before)
        past = [] if kept is None else list(kept.unbind(0))
        after = row[0] * x
        for k, estimate in enumerate((*pair, *past), 1):
            after = after + row[k] * estimate
        after = after if noise is None else after + row[-1] * noise
        return (after,) if kept is None else (after, self._kept(pair, past))

    def _kept(self, pair: Pair, past: list[Tensor]) -> Tensor:
        first, second = self.table.kept
        own = [*([pair[0], *past[:first]][:first]), *([pair[1], *past[first:]][:second])]
        return torch.stack(own)


class Decode(nn.Module):
    """Pictures [B, 3, H, W] in 0..1 of latents [B, C, ...]; arrays as they were."""

    def __init__(self, codec: nn.Module, dtype: torch.dtype, pictures: bool):
        super().__init__()
        self.codec, self.dtype, self.pictures = codec.to(dtype), dtype, pictures

    def forward(self, latents: Tensor) -> Tensor:
        made = self.codec.decode(latents.to(self.dtype)).float()
        return (made.clamp(-1, 1) + 1) / 2 if self.pictures else made


# ---- the pieces of a run


@torch.no_grad()
def pieces(
    run: Opened, precision: str, device: torch.device | str = "cpu", unrolled: int = UNROLLED
) -> dict[str, Piece]:
    """What a run is made of by name: `text` where a text is encoded, `backbone`, then `sampler` or
    for more than `unrolled` evaluations `step`, and `decode`. Raises ExportError."""
    refuse(run)
    dtype, modules = PRECISIONS[precision], run.parts.modules
    own = {n: _copied(m, device) for n, m in modules.items() if n in ("student", "text")}
    asked = run.eager(None, None, 2)
    backbone = Backbone(InType(own["student"], dtype), asked).to(device)
    given = _given(run, own.get("text"), device)
    made = {"text": _text(run, own["text"], device)} if encodes(run) else {}
    made["backbone"] = _backbone(run, backbone, given, device)
    if len(run.table.rows) <= unrolled:
        made["sampler"] = _unrolled(run, backbone, given)
    else:
        made["step"] = _step(run, backbone, given)
    made["decode"] = _decode(run, dtype, given["noise"])
    return made


def encodes(run: Opened) -> bool:
    """Whether ids are encoded; labels are the condition themselves."""
    return run.parts.text is not None and not hasattr(run.parts.text, "classes")


def _copied(module: nn.Module, device) -> nn.Module:
    """The module with weights of its own, which nothing trains."""
    return copy.deepcopy(module).to(device).eval().requires_grad_(False)


def _given(run: Opened, text: nn.Module | None, device) -> dict[str, Tensor]:
    """Examples: two samples of noise, the condition of each and the empty one."""
    noise = run.draws(2).noise(0, torch.zeros(2, *run.shape, device=run.device)).to(device)
    if text is None:
        return {"noise": noise}
    cond = text(probe(run).to(device))
    if not isinstance(cond, Tensor):
        raise ExportError(
            "this network is given a condition of several parts, which has no exported form: export"
            " a run whose encoder gives one tensor"
        )
    null = text(run.parts.null_ids(device))
    return {"noise": noise, "cond": cond, **({"null": null} if run.guided else {})}


def _told(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: given[n] for n in ("cond", "null") if n in given}


BATCH = {"x": 0, "t": 0, "r": 0, "guess": 0, "cond": 0, "noise": 0, "kept": 1, "noises": 1}


def _piece(module: nn.Module, inputs: dict[str, Tensor], outputs: tuple[str, ...], fixed=()):
    axes = {n: BATCH[n] for n in inputs if n in BATCH and n not in fixed}
    return Piece(module.eval(), inputs, axes, outputs)


def _text(run: Opened, encoder: nn.Module, device) -> Piece:
    return Piece(Text(encoder).eval(), {"ids": probe(run).to(device)}, {"ids": 0}, ("cond",))


def _backbone(run: Opened, backbone: Backbone, given, device) -> Piece:
    row, x = run.table.rows[0], given["noise"]
    t, r = (torch.full((2,), v, dtype=run.table.times, device=device) for v in (row.t, row.r))
    inputs = {"x": x, "t": t, **_told(given)}
    inputs |= {"r": r} if len(run.objective.backbone.interface.times) > 1 else {}
    inputs |= {"guess": torch.zeros_like(x)} if run.guess else {}
    return _piece(backbone, inputs, ESTIMATES)


def _decode(run: Opened, dtype: torch.dtype, latents: Tensor) -> Piece:
    module = Decode(_copied(run.parts.codec, latents.device), dtype, not run.arrays)
    made = "arrays" if run.arrays else "pictures"
    return Piece(module.eval(), {"latents": latents}, {"latents": 0}, (made,))


def _unrolled(run: Opened, backbone: Backbone, given) -> Piece:
    noise, count = given["noise"], len(run.table.draws)
    inputs = {"noise": noise}
    inputs |= (
        {"noises": torch.stack([noise.roll(i + 1, -1) for i in range(count)])} if count else {}
    )
    return _piece(Unrolled(backbone, run.table, run.guess), inputs | _told(given), ("latents",))


def _step(run: Opened, backbone: Backbone, given) -> Piece:
    table, x = run.table, given["noise"]
    module, row = Step(backbone, table, run.guess), table.rows[0]
    t, r = (torch.tensor([v], dtype=table.times, device=x.device) for v in (row.t, row.r))
    inputs = {"x": x, "t": t, "row": table.tensor()[0].to(x.device)}
    inputs |= {"r": r} if module.jumps else {}
    kept = sum(table.kept)
    inputs |= {"kept": torch.zeros(kept, *x.shape, device=x.device)} if kept else {}
    inputs |= {"noise": x} if table.draws else {}
    outputs = ("after", "kept_after") if kept else ("after",)
    return _piece(module, inputs | _told(given), outputs, ("t", "r"))
