"""Preparing a data set: encoded once, kept by its content, never trusted when damaged."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from difftrain.training.arrays import open_arrays
from difftrain.training.latents import images, prepare, signed, stream
from difftrain.training.sources import DataError, open_source


class Unshuffle(torch.nn.Module):
    """A codec that counts its calls: 2 x 2 blocks of pixels become channels, times a scale."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.calls = 0

    def encode(self, image):
        self.calls += 1
        return self.scale * torch.nn.functional.pixel_unshuffle(image, 2)

    def fingerprint(self):
        return f"unshuffle {self.scale.item()}"


def letters(texts, length):
    """A tokenizer: one id a letter, int64 [B, length], padded with 0."""
    rows = [[ord(letter) for letter in text[:length]] for text in texts]
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


@pytest.fixture
def photos(tmp_path):
    """A folder with five pictures of 8 x 8 pixels."""
    random = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abcde":
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"picture {name}")
    return folder


@pytest.fixture
def encoded(photos, tmp_path):
    """Prepares the folder with a cache: its latents, the calls of the codec, what was said."""

    def run(codec=None, size=8, cache=tmp_path / "cache", **options):
        codec, said = codec or Unshuffle(), []
        found = prepare(
            open_source("folder", photos),
            codec,
            letters,
            size,
            cache=cache,
            say=said.append,
            **options,
        )
        return found.latents, codec.calls, said

    run.kept = lambda: sorted((tmp_path / "cache").iterdir())
    return run


def test_latents_are_the_codecs_of_every_picture_in_order(photos, encoded):
    pictures = open_source("folder", photos)
    whole = torch.stack([pictures.image(row, 8) for row in range(5)])
    found, calls, said = encoded(batch=2)
    assert torch.equal(found, torch.nn.functional.pixel_unshuffle(signed(whole), 2))
    assert (found.dtype, found.requires_grad, calls, said) == (torch.float32, False, 3, [])


def test_pictures_are_kept_where_a_step_reads_them(photos):
    pictures = open_source("folder", photos)
    found = prepare(pictures, Unshuffle(), letters, 8, batch=2, images=True)
    whole = torch.stack([pictures.image(row, 8) for row in range(5)])
    assert torch.equal(found.images, whole) and found.images.dtype == torch.uint8
    assert prepare(pictures, Unshuffle(), letters, 8).images is None


def test_arrays_go_through_the_codec_as_they_are(tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 3, 4, 4)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    found = prepare(open_arrays(tmp_path / "data.npz"), Unshuffle(2.0), None, 8, batch=2)
    expected = 2 * torch.nn.functional.pixel_unshuffle(torch.from_numpy(x), 2)
    assert torch.equal(found.latents, expected) and found.tokens is None


def test_signed_runs_from_minus_one_to_one():
    assert signed(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_captions_become_ids_of_the_length_asked_for(photos):
    for found in (
        prepare(open_source("folder", photos), Unshuffle(), letters, 8, length=9),
        stream(open_source("folder", photos), letters, 8, length=9),
    ):
        wanted = ["picture c", "picture a", "picture c"]
        assert torch.equal(found.tokens(wanted), letters(wanted, 9))
    assert found.latents is None
    assert stream(open_source("folder", photos), None, 8).tokens is None


def test_a_second_start_reads_the_kept_latents_and_calls_no_codec(encoded):
    first, calls, _ = encoded()
    again, later, said = encoded()
    assert torch.equal(first, again) and (calls, later, said) == (1, 0, [])
    assert len(encoded.kept()) == 1
    with safe_open(encoded.kept()[0], framework="pt") as file:
        assert set(file.metadata()) == {"key", "sha256"}


@pytest.mark.parametrize("change", ["picture", "size", "codec", "fewer"])
def test_what_changes_the_latents_changes_the_key(photos, encoded, change):
    before, *_ = encoded()
    options = {}
    match change:
        case "picture":
            Image.new("RGB", (8, 8), "teal").save(photos / "c.png")
        case "size":
            options = {"size": 4}
        case "codec":
            options = {"codec": Unshuffle(2.0)}
        case "fewer":
            (photos / "a.png").unlink()
    after, calls, _ = encoded(**options)
    assert calls == 1 and not torch.equal(before, after)
    assert len(encoded.kept()) == 2


def test_a_new_caption_keeps_the_latents(photos, encoded):
    encoded()
    (photos / "a.txt").write_text("another text")
    assert encoded()[1] == 0


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "swapped", "foreign"])
def test_a_damaged_cache_is_said_and_made_again(encoded, damage):
    before, *_ = encoded()
    path = encoded.kept()[0]
    data = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(data[:-100])
        case "empty":
            path.write_bytes(b"")
        case "flipped":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "swapped":
            with safe_open(path, framework="pt") as file:
                labels = {**file.metadata(), "key": "of other pictures"}
            save_file(load_file(path), path, labels)
        case "foreign":
            save_file({"weights": torch.ones(3)}, path)
    after, calls, said = encoded()
    assert torch.equal(before, after) and calls == 1
    assert len(said) == 1 and path.name in said[0] and "encoding again" in said[0]
    assert encoded()[1:] == (0, [])


def test_latents_that_cannot_be_kept_are_still_used(photos, encoded):
    found, calls, said = encoded(cache=photos / "a.png")
    assert found.shape == (5, 12, 4, 4) and calls == 1
    assert said == [
        f"the latents cannot be kept in `{photos}/a.png` (file exists), each start encodes again"
    ]


def test_a_codec_without_a_fingerprint_is_never_kept(tmp_path, photos):
    class Plain(torch.nn.PixelUnshuffle):
        encode = torch.nn.PixelUnshuffle.forward

    said = []
    kept = tmp_path / "cache"
    found = prepare(open_source("folder", photos), Plain(2), None, 8, cache=kept, say=said.append)
    assert found.latents.shape == (5, 12, 4, 4) and found.tokens is None
    assert not kept.exists() and "no `fingerprint()`" in said[0]


def test_latents_that_are_not_finite_name_their_picture(encoded):
    with pytest.raises(DataError, match=r"`a.png` are not finite \(5 of 5 samples\).*fp32"):
        encoded(codec=Unshuffle(float("inf")))


def test_a_broken_picture_stops_the_encoding_and_leaves_what_was_kept(photos, encoded):
    before, *_ = encoded()
    whole = (photos / "d.png").read_bytes()
    (photos / "d.png").write_bytes(whole[:60])
    with pytest.raises(DataError, match="`d.png` cannot be read"):
        encoded()
    (photos / "d.png").write_bytes(whole)
    after, calls, _ = encoded()
    assert torch.equal(before, after) and calls == 0 and len(encoded.kept()) == 1


def test_pictures_are_read_ahead_in_order_from_a_zip(photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as out:
        for path in photos.iterdir():
            out.write(path, path.name)
    zipped = open_source("folder", tmp_path / "photos.zip")
    chunks = [[0, 3], [4], [2, 2], [1], [0]]
    for rows, found in zip(chunks, images(zipped, chunks, 8), strict=True):
        assert torch.equal(found, torch.stack([zipped.image(row, 8) for row in rows]))
