"""The kernel distance: exact, unbiased, with an honest error, and in the right order."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.numpy import save_file

from difftrain.sampling.kid import features, kid, score
from difftrain.training.sources import open_source

ROOT = Path(__file__).parent.parent
SIDE = 64  # cheaper than the default


def normal(count, seed, width=12, shift=0.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


def slow(a, b):
    """arXiv:1801.01401 eq. 4, pair by pair."""

    def k(x, y):
        return (sum(float(p) * float(q) for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3

    def within(rows):
        each = [k(x, y) for i, x in enumerate(rows) for j, y in enumerate(rows) if i != j]
        return sum(each) / len(each)

    across = [k(x, y) for x in a for y in b]
    return within(a) + within(b) - 2 * sum(across) / len(across)


def test_it_is_exact():
    a, b = normal(7, 1), normal(5, 2, shift=0.5)
    value, error = kid(a, b)
    assert value == pytest.approx(slow(a, b), rel=1e-10)
    left_out = [
        [slow(torch.cat([a[:i], a[i + 1 :]]), b) for i in range(7)],
        [slow(a, torch.cat([b[:i], b[i + 1 :]])) for i in range(5)],
    ]
    variance = sum((len(v) - 1) * np.var(v) for v in left_out)
    assert error == pytest.approx(variance**0.5, rel=1e-8)


def test_equal_laws_are_at_zero():
    """Over many pairs of sets: unbiased, and the error is about the true spread."""
    found = [kid(normal(40, 2 * i), normal(30, 2 * i + 1)) for i in range(200)]
    values, errors = torch.tensor(found, dtype=torch.float64).T
    assert values.mean().abs() < 3 * values.std() / 200**0.5
    assert 0.7 < errors.mean() / values.std() < 1.6
    assert values.min() < 0 < values.max()


def test_subsets():
    a, b = normal(60, 1), normal(50, 2, shift=0.3)
    (whole, _), (mean, deviation) = kid(a, b), kid(a, b, subset=20, seed=1)
    assert mean == pytest.approx(whole, abs=3 * deviation / 10)
    assert kid(a, b, subset=20, seed=1) == (mean, deviation) != kid(a, b, subset=20, seed=2)
    full, none = kid(a[:50], b, subset=50)
    assert full == pytest.approx(kid(a[:50], b)[0]) and none < 1e-9


@pytest.mark.parametrize(("rows", "subset"), [(2, None), (9, 10), (9, 1)])
def test_too_few_rows_are_told(rows, subset):
    with pytest.raises(ValueError, match="pictures cannot be told: it takes 3 of each"):
        kid(normal(rows, 1), normal(20, 2), subset)


def test_sides_are_told():
    with pytest.raises(ValueError, match="`side` is 100: give a multiple of 32"):
        features(torch.zeros(3, 3, 8, 8), side=100)


# ---- pictures


def emoji(split, count=None):
    source = open_source("emoji64", split=split)
    rows = range(0, len(source), len(source) // count if count else 1)
    return torch.stack([source.image(row, 64) for row in rows]).float() / 127.5 - 1


@pytest.fixture(scope="module")
def real():
    return emoji("held_out"), emoji("train", 300)


def blurred(pictures):
    return F.interpolate(F.avg_pool2d(pictures, 4), scale_factor=4.0, mode="bilinear")


def test_batches_do_not_matter(real):
    held_out, _ = real
    made = features(held_out[:7], SIDE, batch=3)
    assert made.shape == (7, 1280) and not made.requires_grad
    assert torch.allclose(made, features(held_out[:7], SIDE), atol=1e-4)


def test_real_pictures_are_nearest_then_blurred_then_noise(real):
    held_out, train = real
    found = score(blurred(train), held_out, train, SIDE)
    value, error = found["real"]
    assert abs(value) < 3 * error
    assert value + 3 * error < found["kid"][0] < found["noise"][0]
    assert found["half_way"] < found["kid"][0] and 0.5 < found["position"] < 1
    assert score(train, held_out, train, SIDE)["position"] == 0


# ---- the command


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("kid_tool", ROOT / "tools" / "kid.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_form_of_samples_is_read_alike(tool, tmp_path):
    data = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", pictures=data)
    np.save(tmp_path / "a.npy", data)
    save_file({"pictures": data}, tmp_path / "a.safetensors")
    np.save(tmp_path / "floats.npy", data / 127.5 - 1)
    (tmp_path / "folder").mkdir()
    for i, picture in enumerate(data):
        Image.fromarray(picture.transpose(1, 2, 0)).save(tmp_path / "folder" / f"{i}.png")
    expected = torch.from_numpy(data).float() / 127.5 - 1
    for name in ("samples.npz", "", "a.npy", "a.safetensors", "floats.npy", "folder"):
        assert torch.allclose(tool.pictures(tmp_path / name, 16), expected, atol=1e-6), name


def told(*argv):
    command = [sys.executable, str(ROOT / "tools" / "kid.py"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_command(tmp_path):
    """On a small set of one's own, held out by folder."""
    rows = {"train": emoji("train", 8)[:8], "test": emoji("held_out", 8)[:8]}
    for split, images in rows.items():
        (tmp_path / "data" / split).mkdir(parents=True)
        for i, image in enumerate(images):
            data = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(data).save(tmp_path / "data" / split / f"{i}.png")
    np.savez(tmp_path / "samples.npz", pictures=np.zeros((4, 3, 32, 32), np.uint8))
    done = told(tmp_path / "samples.npz", "--data", tmp_path / "data", "--side", SIDE)
    assert done.returncode == 0, done.stderr
    assert "| distance to 8 held-out pictures of | pictures | KID | error |" in done.stdout
    assert "| samples | 4 |" in done.stdout and "the samples lie at " in done.stdout


def test_what_cannot_be_read_is_told(tmp_path):
    np.savez(tmp_path / "a.npz", other=np.zeros(3))
    done = told(tmp_path / "a.npz")
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (
        2,
        [f"`{tmp_path / 'a.npz'}` has no `pictures`: save them under this name"],
    )
