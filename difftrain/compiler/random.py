"""Named random streams: every draw is a pure function of (seed, step, sample index, stream).

The generator is Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as
1, 2, 3") in int64 tensor operations, and where a GPU and Triton are a kernel (`random_kernel`): one
operator of the compiled step, since its ten rounds are two thirds of what there is to compile.
Sample i gets the same bits whatever the batch, the world size and the device are. In every function
below `seed` and `step` are ints or 0-d int64 tensors (tensors do not recompile), `index` is int64
[B], the global sample index, and `stream` a name. Longer draws begin with the shorter ones.
"""

import math
import zlib
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

Word = int | Tensor  # an unsigned 32-bit value, kept in an int or in int64

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
CELL = 2.0**-32  # width of one 32-bit word on (0, 1)
FINE = 1 << 31  # set in the block number of the words that refine a float64 draw


def philox(counter: Sequence[Word], key: Sequence[Word]) -> tuple[Word, Word, Word, Word]:
    """The four output words of Philox4x32-10 for four counter words and two key words."""
    a, b, c, d = counter
    first, second = key
    for _ in range(ROUNDS):
        high_a, low_a = _multiply(a, MULTIPLIERS[0])
        high_c, low_c = _multiply(c, MULTIPLIERS[1])
        a, b, c, d = high_c ^ b ^ first, low_c, high_a ^ d ^ second, low_a
        first, second = (first + WEYL[0]) & MASK, (second + WEYL[1]) & MASK
    return a, b, c, d


def _multiply(word: Word, constant: int) -> tuple[Word, Word]:
    """High and low word of word * constant, which needs 64 bits and no sign: as word * 2^32 and a
    product that is negative and fits, since the constant is above 2^31."""
    product = word * (constant - (1 << 32))
    return (product >> 32) + word, product & MASK


def stream_key(stream: str) -> int:
    """The 32-bit number that stands for a stream's name."""
    return zlib.crc32(stream.encode())


def words(index: Tensor, seed: Tensor, step: Tensor, stream: str, blocks: int, fine: int) -> Tensor:
    """Four words for each block of four draws, in draw order: int64 [B, 4 * blocks].

    The upper half of a seed above 32 bits is folded into the stream's key.
    """
    block = torch.arange(blocks, device=index.device) | fine
    sample = index[:, None]
    counter = (block, sample & MASK, step & MASK, (sample >> 32) & MASK)
    key = (seed & MASK, ((seed >> 32) & MASK) ^ stream_key(stream))
    return torch.stack(philox(counter, key), dim=-1).flatten(1)


def _words_on_gpu(
    index: Tensor, seed: Tensor, step: Tensor, stream: str, blocks: int, fine: int
) -> Tensor:
    if find_spec("triton") is None:
        return words(index, seed, step, stream, blocks, fine)
    from difftrain.compiler.random_kernel import launch

    out = _room(index, seed, step, stream, blocks, fine)
    with torch.cuda.device_of(index):
        return launch(index, seed, step, stream_key(stream), blocks, fine, out)


def _room(index: Tensor, seed: Tensor, step: Tensor, stream: str, blocks: int, fine: int) -> Tensor:
    return index.new_empty(len(index), 4 * blocks)


def _register() -> torch.library.Library:
    library = torch.library.Library("difftrain", "FRAGMENT")
    numbers = "str stream, int blocks, int fine"
    library.define(f"random_words(Tensor index, Tensor seed, Tensor step, {numbers}) -> Tensor")
    library.impl("random_words", words, "CompositeExplicitAutograd")
    library.impl("random_words", _words_on_gpu, "CUDA")
    torch.library.register_fake("difftrain::random_words", _room, lib=library)
    return library


LIBRARY = _register()  # the operator is there while this is


def bits(stream: str, seed: Word, step: Word, index: Tensor, n: int, fine: int = 0) -> Tensor:
    """Uniform 32-bit words: int64 [B, n], values in [0, 2^32)."""
    key = (_tensor(seed, index), _tensor(step, index), stream)
    return torch.ops.difftrain.random_words(index, *key, math.ceil(n / 4), fine)[:, :n]


def _tensor(word: Word, index: Tensor) -> Tensor:
    """The word where the index is."""
    return word if isinstance(word, Tensor) else torch.tensor(word, device=index.device)


def uniform(
    stream: str,
    seed: Word,
    step: Word,
    index: Tensor,
    shape: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Uniform draws on the open interval (0, 1): [B, *shape] in float32 or float64.

    Midpoints of 2^23 cells (float32) or 2^52 (float64): odd multiples of 2^-24 or 2^-53, all
    exact, so 0 and 1 never occur. The float64 draw lies in the cell of the float32 one.
    """
    n = math.prod(shape)
    word = bits(stream, seed, step, index, n)
    if dtype == torch.float64:
        drawn = _refined(word, bits(stream, seed, step, index, n, FINE))
    else:
        drawn = ((word >> 9) * 2 + 1).to(dtype) * 2.0**-24
    return drawn.reshape(len(index), *shape)


def normal(
    stream: str,
    seed: Word,
    step: Word,
    index: Tensor,
    shape: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal draws by Box-Muller: [B, *shape], computed in float32 at least.

    The radius has all 32 bits (52 in float64), so the tails reach 6.7 (8.5); a float64 draw
    agrees with the float32 one to its rounding.
    """
    n = math.prod(shape)
    pairs = n + n % 2
    word = bits(stream, seed, step, index, pairs)
    if dtype == torch.float64:
        unit = _refined(word, bits(stream, seed, step, index, pairs, FINE))
    else:
        unit = (2 * word + 1).float() * 2.0**-33
    drawn = _box_muller(unit[:, 0::2], unit[:, 1::2])[:, :n]
    return drawn.to(dtype).reshape(len(index), *shape)


def _refined(word: Tensor, rest: Tensor) -> Tensor:
    """Midpoints of 2^52 cells on (0, 1), the high 32 bits given by `word`: float64, exact."""
    return (((word << 20) | (rest >> 12)) * 2 + 1).double() * 2.0**-53


def _box_muller(radius: Tensor, angle: Tensor) -> Tensor:
    """Two independent normals from each two uniforms: [B, n] and [B, n] give [B, 2 * n]."""
    length, angle = torch.sqrt(-2 * torch.log(radius)), 2 * math.pi * angle
    return (length[..., None] * torch.stack((angle.cos(), angle.sin()), dim=-1)).flatten(1)


def integer(
    stream: str, seed: Word, step: Word, index: Tensor, n: int, shape: Sequence[int] = ()
) -> Tensor:
    """Integers 0 .. n - 1 with n <= 2^31: int64 [B, *shape], each probability exact to 2^-32."""
    word = bits(stream, seed, step, index, math.prod(shape))
    return ((word * n) >> 32).reshape(len(index), *shape)


def bernoulli(
    stream: str, seed: Word, step: Word, index: Tensor, p: float | Tensor, shape: Sequence[int] = ()
) -> Tensor:
    """True with probability p: bool [B, *shape]; p a number or a tensor that broadcasts."""
    return _fraction(stream, seed, step, index, shape) < p


def choice(
    stream: str,
    seed: Word,
    step: Word,
    index: Tensor,
    weights: Sequence[float] | Tensor,
    shape: Sequence[int] = (),
) -> Tensor:
    """Positions in `weights` [K], drawn in proportion to them: int64 [B, *shape]."""
    total = torch.as_tensor(weights, dtype=torch.float64, device=index.device).cumsum(0)
    drawn = _fraction(stream, seed, step, index, shape)
    return torch.searchsorted(total / total[-1], drawn, right=True)


def _fraction(stream: str, seed: Word, step: Word, index: Tensor, shape: Sequence[int]) -> Tensor:
    """Midpoints of 2^32 cells on (0, 1): float64 [B, *shape], one word each."""
    word = bits(stream, seed, step, index, math.prod(shape))
    return ((word.double() + 0.5) * CELL).reshape(len(index), *shape)
