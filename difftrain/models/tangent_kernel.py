"""The tangent of attention in one pass over the keys: imported where a GPU and Triton are."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


class Plan(NamedTuple):
    """How the work is cut: queries of a program, keys of a turn, its warps, and turns in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


# the fastest on an H100 for heads of 64 and of 72 numbers: `tools/bench_attention.py --plans`
PLAN = Plan(128, 32, 8, 3)


def launch(q, k, v, tq, tk, tv, o, logsumexp: Tensor, out: Tensor, way: Plan | None = None):
    """Fills out [B, H, T, d] with the tangent of attention, and returns it.

    q, tq, o [B, H, T, d]; k, tk, v, tv [B, H, S, d], all of one precision; logsumexp [B, H, T].
    """
    batch, heads, rows, width = q.shape
    columns, way = k.shape[2], way or PLAN
    tensors = [_in_eights(x) for x in (q, k, v, tq, tk, tv, o)]
    strides = [x.stride()[:3] for x in (*tensors, out)]
    _attention_tangent[(triton.cdiv(rows, way.queries) * batch * heads,)](
        *tensors, logsumexp.contiguous(), out, *strides, width**-0.5,
        HEADS=heads, ROWS=rows, COLUMNS=columns, WIDTH=width,
        LANES=max(16, triton.next_power_of_2(width)), QUERIES=way.queries, KEYS=way.keys,
        num_warps=way.warps, num_stages=way.stages,
    )  # fmt: skip
    return out


def _in_eights(x: Tensor) -> Tensor:
    """The tensor, laid out so that eight numbers of a head are read at once."""
    *strides, last = x.stride()
    return x if last == 1 and not any(n % 8 for n in strides) else x.contiguous()


@triton.jit
def _attention_tangent(
    q, k, v, tq, tk, tv, o, logsumexp, out, q_at, k_at, v_at, tq_at, tk_at, tv_at, o_at, out_at,
    scale,
    HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    LANES: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One head's tangent for a block of queries: h v - sum(h) o + p tv, where h = p * ts."""
    FULL: tl.constexpr = ROWS % QUERIES == 0 and WIDTH == LANES
    WHOLE: tl.constexpr = COLUMNS % KEYS == 0 and WIDTH == LANES
    BLOCKS: tl.constexpr = (ROWS + QUERIES - 1) // QUERIES  # neighbours read the same keys
    place = (tl.program_id(0) // BLOCKS).to(tl.int64)
    batch, head = place // HEADS, place % HEADS
    row = tl.program_id(0) % BLOCKS * QUERIES + tl.arange(0, QUERIES)
    turned = _tile(q, q_at, batch, head, row, ROWS, WIDTH, LANES, FULL)
    along = _tile(tq, tq_at, batch, head, row, ROWS, WIDTH, LANES, FULL)
    level = tl.load(logsumexp + place * ROWS + row, row < ROWS, 0.0) * LOG2E
    moved = tl.zeros([QUERIES, LANES], tl.float32)
    drift = tl.zeros([QUERIES], tl.float32)
    for start in range(0, COLUMNS, KEYS):
        column = start + tl.arange(0, KEYS)
        key = tl.trans(_tile(k, k_at, batch, head, column, COLUMNS, WIDTH, LANES, WHOLE))
        further = tl.trans(_tile(tk, tk_at, batch, head, column, COLUMNS, WIDTH, LANES, WHOLE))
        p = tl.exp2(tl.dot(turned, key) * (scale * LOG2E) - level[:, None])
        if COLUMNS % KEYS:
            p = tl.where((column < COLUMNS)[None, :], p, 0.0)
        h = p * (tl.dot(turned, further, tl.dot(along, key)) * scale)
        drift += tl.sum(h, 1)
        value = _tile(v, v_at, batch, head, column, COLUMNS, WIDTH, LANES, WHOLE)
        moved = tl.dot(h.to(value.dtype), value, moved)
        value = _tile(tv, tv_at, batch, head, column, COLUMNS, WIDTH, LANES, WHOLE)
        moved = tl.dot(p.to(value.dtype), value, moved)
    moved -= drift[:, None] * _tile(o, o_at, batch, head, row, ROWS, WIDTH, LANES, FULL)
    spot, there = _spots(out, out_at, batch, head, row, ROWS, WIDTH, LANES)
    tl.store(spot, moved.to(out.dtype.element_ty), there)


@triton.jit
def _tile(
    x, at, batch, head, index, COUNT: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Tokens of one head [index, LANES], 0 where there are none."""
    spot, there = _spots(x, at, batch, head, index, COUNT, WIDTH, LANES)
    if WHOLE:
        return tl.load(spot)
    return tl.load(spot, there, 0.0)


@triton.jit
def _spots(
    x, at, batch, head, index, COUNT: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr
):
    """Where those tokens lie, and which of them there are."""
    lane = tl.arange(0, LANES)[None, :]
    before = tl.multiple_of(batch * at[0] + head * at[1], 8)
    spot = x + before + tl.multiple_of(index[:, None] * at[2], (1, 8)) + lane
    return spot, (index[:, None] < COUNT) & (lane < WIDTH)
