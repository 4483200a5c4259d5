"""The random streams: published vectors, independence of the split, laws, compilation."""

import math
import os
import subprocess
import sys
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from difftrain.compiler import random

INDEX = torch.arange(20_000)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_vectors_published_with_random123(counter, key, expected):
    counter, key, expected = (
        [int(w, 16) for w in text.split()] for text in (counter, key, expected)
    )
    assert list(random.philox(counter, key)) == expected
    tensors = random.philox([torch.tensor([w]) for w in counter], key)
    assert [int(word) for word in tensors] == expected


def philox_in_numpy(counter, key):
    """Philox4x32-10 with 64-bit unsigned products, the other way round from the module."""
    a, b, c, d = (np.asarray(w, np.uint64) for w in counter)
    key, shift, low = np.array(key, np.uint64), np.uint64(32), np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (q >> shift) ^ b ^ key[0], q & low, (p >> shift) ^ d ^ key[1], p & low
        key = (key + np.array([0x9E3779B9, 0xBB67AE85], np.uint64)) & low
    return np.stack(np.broadcast_arrays(a, b, c, d), -1)


def test_bits_are_philox_at_block_sample_step_and_seed_stream():
    seed, step, samples = 0x1234567_89ABCDEF, 77, np.array([0, 5, 2**33 + 9])
    key = (0x89ABCDEF, 0x1234567 ^ zlib.crc32(b"eps"))
    blocks, column = np.arange(3)[None], samples[:, None]
    expected = philox_in_numpy((blocks, column & 0xFFFFFFFF, step, column >> 32), key)
    drawn = random.bits("eps", seed, step, torch.from_numpy(samples), 10)
    assert np.array_equal(drawn.numpy(), expected.reshape(3, 12)[:, :10])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("draw", [random.bits, random.uniform, random.normal])
def test_a_sample_draws_the_same_in_every_batch_split_and_device(draw, device):
    size = 7 if draw is random.bits else (7,)
    whole = draw("eps", 3, 11, torch.arange(12), size)
    ranks = [
        draw("eps", 3, 11, torch.arange(r, 12, 3, device=device), size).cpu() for r in (0, 1, 2)
    ]
    for rank, part in enumerate(ranks):
        torch.testing.assert_close(
            part, whole[rank::3], rtol=0, atol=0 if device == "cpu" else 1e-5
        )


def test_shorter_draws_begin_longer_ones():
    long = random.normal("eps", 1, 2, INDEX[:5], (3, 3))
    assert torch.equal(random.normal("eps", 1, 2, INDEX[:5], (2,)), long.flatten(1)[:, :2])


def test_tensors_and_numbers_are_the_same_seed_and_step():
    given = random.bits("t", torch.tensor(-5), torch.tensor(9), INDEX[:4], 6)
    assert torch.equal(given, random.bits("t", -5, 9, INDEX[:4], 6))


def test_seed_step_sample_and_stream_all_change_the_draw():
    drawn = {
        int(random.bits(stream, seed, step, torch.tensor([sample]), 1))
        for stream in ("t", "eps")
        for seed in (0, 1, 2**32)
        for step in (0, 1)
        for sample in (0, 1, 2**32)
    }
    assert len(drawn) == 36


def kolmogorov(drawn, cdf):
    """Kolmogorov's distance times sqrt(n); above 1.95 once in a thousand fair samples."""
    ordered = cdf(drawn.double().flatten().sort().values)
    steps = torch.arange(1, len(ordered) + 1) / len(ordered)
    return float((ordered - steps).abs().max() * math.sqrt(len(ordered)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_and_normal_follow_their_laws(dtype):
    u = random.uniform("t", 5, 0, INDEX, (4,), dtype)
    z = random.normal("eps", 5, 0, INDEX, (4,), dtype)
    assert u.dtype == z.dtype == dtype
    assert kolmogorov(u, lambda x: x) < 1.95
    assert kolmogorov(z, torch.special.ndtr) < 1.95
    assert abs(float(u.mean()) - 0.5) < 0.005
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert float((z**power).mean()) == pytest.approx(moment, abs=0.12)


def test_draws_of_one_sample_and_of_neighbours_do_not_correlate():
    z = random.normal("eps", 5, 0, INDEX, (4,), torch.float64)
    other = random.normal("two", 5, 0, INDEX, (1,), torch.float64)
    later = random.normal("eps", 5, 1, INDEX, (1,), torch.float64)
    together = torch.cat([z[:-1], z[1:, :1], other[:-1], later[:-1]], dim=1)
    correlation = torch.corrcoef(together.T) - torch.eye(7)
    assert correlation.abs().max() < 4 / math.sqrt(len(INDEX))


def test_uniform_never_reaches_its_ends(monkeypatch):
    for word in (0, random.MASK):
        words = torch.full((1, 1), word)
        monkeypatch.setattr(random, "philox", lambda *_, w=words: (w, w, w, w))
        for dtype in (torch.float32, torch.float64):
            assert 0 < random.uniform("t", 0, 0, torch.tensor([0]), (), dtype) < 1
            assert random.normal("t", 0, 0, torch.tensor([0]), (), dtype).isfinite()


def test_float64_refines_float32():
    narrow, wide = (
        random.uniform("t", 1, 2, INDEX, (2,), d) for d in (torch.float32, torch.float64)
    )
    assert (narrow.double() - wide).abs().max() <= 2.0**-24
    narrow, wide = (
        random.normal("t", 1, 2, INDEX[:2000], (4,), d) for d in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=1e-5)


def test_low_precision_noise_is_the_rounded_float32_noise():
    z = random.normal("eps", 0, 0, INDEX[:8], (4,))
    assert torch.equal(random.normal("eps", 0, 0, INDEX[:8], (4,), torch.bfloat16), z.bfloat16())


def test_integers_cover_their_range_evenly():
    drawn = random.integer("t", 1, 2, INDEX, 10)
    counts = drawn.bincount(minlength=10)
    assert drawn.shape == INDEX.shape and len(counts) == 10
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 27.9  # chi-square, 9 degrees, 0.1 %
    assert int(random.integer("t", 1, 2, INDEX, 2**31, (2,)).max()) < 2**31


def test_bernoulli_is_exact_at_the_ends_and_takes_a_tensor():
    assert not random.bernoulli("drop", 0, 0, INDEX, 0.0).any()
    assert random.bernoulli("drop", 0, 0, INDEX, 1.0).all()
    for p in (0.1, torch.tensor(0.1)):
        rate = random.bernoulli("drop", 0, 0, INDEX, p, (2,)).float().mean()
        assert float(rate) == pytest.approx(0.1, abs=0.006)


@pytest.mark.parametrize("weights", [[1.0, 0.0, 3.0, 0.0], torch.tensor([2, 0, 6, 0])])
def test_choice_follows_the_weights_and_never_takes_a_zero(weights):
    share = random.choice("pick", 1, 0, INDEX, weights).bincount(minlength=4) / len(INDEX)
    assert share.tolist() == pytest.approx([0.25, 0, 0.75, 0], abs=0.012)


def everything(seed, step, index):
    return (
        random.uniform("t", seed, step, index),
        random.normal("eps", seed, step, index, (2, 3)),
        random.integer("i", seed, step, index, 1000),
        random.bernoulli("drop", seed, step, index, 0.1),
        random.choice("pick", seed, step, index, [1.0, 2.0]),
    )


def test_all_draws_trace_whole_and_new_steps_do_not_recompile():
    traced = torch.compile(everything, fullgraph=True, backend="aot_eager")
    traced(torch.tensor(1), torch.tensor(2), INDEX[:6])
    with torch.compiler.set_stance("fail_on_recompile"):
        again = traced(torch.tensor(4), torch.tensor(5), INDEX[10:16])
    for ours, theirs in zip(again, everything(4, 5, INDEX[10:16]), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_bits_are_the_eager_bits(device):
    def draw(seed, step, index):
        return random.bits("t", seed, step, index, 6)

    compiled = torch.compile(draw, fullgraph=True)
    index = torch.arange(2**32 - 3, 2**32 + 3)
    expected = random.bits("t", 2**40 + 1, 5, index, 6)
    seed, step = (torch.tensor(n, device=device) for n in (2**40 + 1, 5))
    assert torch.equal(compiled(seed, step, index.to(device)).cpu(), expected)


def test_each_draw_is_one_operator_of_what_is_compiled():
    graphs = []

    def seen(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    torch.compile(everything, fullgraph=True, backend=seen)(*map(torch.tensor, (1, 2)), INDEX[:6])
    (names,) = graphs
    assert sum("random_words" in name for name in names) == 5
    assert len(names) < 80


# ---- the kernel

WORDS = [(-5, 9, 0, "eps", 3, 0), (2**40 + 1, 2**31 + 7, 2**32 - 3, "t", 5, random.FINE)]


def kernel_gives_the_words(device: str) -> None:
    from difftrain.compiler.random_kernel import launch

    for seed, step, first, stream, *size in WORDS:
        index = torch.arange(first, first + 6)
        given = (index, torch.tensor(seed), torch.tensor(step))
        wanted = random.words(*given, stream, *size)
        there, out = [x.to(device) for x in given], torch.empty_like(wanted, device=device)
        found = launch(*there, random.stream_key(stream), *size, out)
        assert torch.equal(found.cpu(), wanted)


if find_spec("triton"):

    def test_the_kernel_in_slow_motion():
        code = "import test_random as t; t.kernel_gives_the_words('cpu')"
        paths = os.pathsep.join((os.path.dirname(__file__), *sys.path))
        slow = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
        subprocess.run([sys.executable, "-c", code], env=slow, check=True)


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_gives_the_words():
    kernel_gives_the_words("cuda")
