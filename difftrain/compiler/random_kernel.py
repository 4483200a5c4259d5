"""The words of the random streams in one kernel: imported where a GPU and Triton are."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

LANES = 256  # blocks of four words that one program draws


def launch(
    index: Tensor, seed: Tensor, step: Tensor, stream: int, blocks: int, fine: int, out: Tensor
) -> Tensor:
    """Fills out [B, 4 * blocks] with `random.words`, and returns it."""
    total = len(index) * blocks
    numbers = (_signed(stream), _signed(fine), blocks, total)
    _words[(triton.cdiv(total, LANES),)](out, index.contiguous(), seed, step, *numbers, LANES=LANES)
    return out


def _signed(word: int) -> int:
    """The word as a signed one, so that one kernel serves every stream."""
    return word - (word >> 31 << 32)


@triton.jit(do_not_specialize=["stream", "fine", "blocks", "total"])
def _words(out, index, seed, step, stream, fine, blocks, total, LANES: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    there = place < total
    sample = tl.load(index + place // blocks, there, 0)
    block = ((place % blocks) | fine).to(tl.uint32)
    turn = (sample * 0 + tl.load(step)).to(tl.uint32)
    key = tl.load(seed) ^ (stream.to(tl.int64) << 32)
    low, high = sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(key, block, low, turn, high)
    spot = out + 4 * place
    tl.store(spot, a.to(tl.int64), there)
    tl.store(spot + 1, b.to(tl.int64), there)
    tl.store(spot + 2, c.to(tl.int64), there)
    tl.store(spot + 3, d.to(tl.int64), there)
