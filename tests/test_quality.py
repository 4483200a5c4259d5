"""Quality of generated pictures: the measured figures, on the real pictures themselves."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import difftrain
from difftrain.sampling import quality
from difftrain.sampling.quality import Reals

EMOJI = Path(difftrain.__file__).parent / "data" / "emoji64.zip"


@pytest.fixture(scope="module")
def emoji():
    """Every picture, and the positions of the training ones."""
    with zipfile.ZipFile(EMOJI) as archive:
        records = [json.loads(line) for line in archive.read("metadata.jsonl").splitlines()]
        pixels = [_pixels(archive.read(record["file_name"])) for record in records]
    concept, style = (
        torch.from_numpy(np.unique([r[field] for r in records], return_inverse=True)[1])
        for field in ("label", "style")
    )
    everything = Reals(torch.stack(pixels), concept, style)
    return everything, torch.tensor([record["split"] == "train" for record in records])


def _pixels(encoded):
    picture = np.array(Image.open(io.BytesIO(encoded)).convert("RGB"))
    return torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1


@pytest.fixture(scope="module")
def split(emoji):
    everything, train = emoji
    return _rows(everything, train), _rows(everything, ~train)


def _rows(reals, rows):
    return Reals(reals.pictures[rows], reals.concept[rows], reals.style[rows])


def _damaged(pictures):
    """Blurred a little and noised: about 29 dB from the original."""
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return (0.4 * pictures + 0.6 * soft + 0.04 * noise).clamp(-1, 1)


def _left_out(features, labels, allowed):
    """The share whose nearest other row among `allowed` has the same label."""
    distances = torch.cdist(features, features).fill_diagonal_(float("inf"))
    found = labels[distances.masked_fill(~allowed, float("inf")).argmin(1)]
    return float((found == labels).float().mean())


def test_the_descriptions_reach_the_figures_that_are_stated(emoji):
    reals, _ = emoji
    anyone = torch.ones(len(reals.style), len(reals.style), dtype=torch.bool)
    others = reals.style[:, None] != reals.style[None]
    layout, palette = quality.layout(reals.pictures), quality.palette(reals.pictures)
    assert layout.shape[1] == 704 and palette.shape[1] == 1728
    assert _left_out(layout, reals.concept, anyone) == pytest.approx(0.743, abs=0.01)
    assert _left_out(layout, reals.concept, others) == pytest.approx(0.805, abs=0.01)
    assert _left_out(palette, reals.style, anyone) == pytest.approx(0.896, abs=0.01)


def test_faithful_pictures_score_high_and_noise_scores_chance(split):
    reals, held_out = split
    shown = _rows(reals, torch.arange(200))
    good = quality.report(_damaged(shown.pictures), shown.concept, shown.style, reals, held_out)
    noise = torch.rand_like(shown.pictures) * 2 - 1
    bad = quality.report(noise, shown.concept, shown.style, reals, held_out)
    assert good["concept"] > 0.9 and good["style"] > 0.9 and good["copies"] > 0.9
    assert bad["concept"] < 0.03 and bad["style"] < 0.5 and bad["copies"] == 0
    assert good["concept_chance"] == pytest.approx(1 / 538, rel=0.05)
    assert good["style_chance"] == pytest.approx(1 / 3, abs=0.01)
    assert good["concept_ceiling"] == bad["concept_ceiling"] == pytest.approx(0.779, abs=0.02)
    assert good["style_ceiling"] == pytest.approx(0.897, abs=0.02)
    assert good["copies_held_out"] == 0


def test_wrong_wishes_are_not_met(split):
    reals, _ = split
    shown = _rows(reals, torch.arange(100))
    assert quality.style_accuracy(shown.pictures, (shown.style + 1) % 3, reals) < 0.1
    assert quality.concept_accuracy(shown.pictures, (shown.concept + 1) % 538, reals) < 0.1


def test_memorisation_is_zero_for_copies_and_about_one_for_new_pictures(split):
    reals, held_out = split
    indices, ratio = quality.memorisation(reals.pictures[5:15], reals)
    assert indices.tolist() == list(range(5, 15))
    assert ratio.max() < 0.01
    assert 0.7 < float(quality.memorisation(held_out.pictures, reals)[1].median()) < 1.2


def test_nearest_gives_positions_and_distances():
    points, reals = torch.tensor([[0.0, 0.0], [9.0, 9.0]]), torch.tensor([[9.0, 6.0], [1.0, 0.0]])
    indices, distances = quality.nearest(points, reals)
    assert indices.tolist() == [1, 0]
    assert distances.tolist() == [1, 3]


def test_chance_counts_the_labels_of_the_reals():
    wanted, labels = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 0, 1])
    assert quality.chance(wanted, labels) == pytest.approx((0.75 + 0.75 + 0.25 + 0) / 4)


def test_palettes_ignore_place_and_layouts_do_not(split):
    picture = split[0].pictures[:1]
    turned = picture.flip(2)
    assert torch.equal(quality.palette(picture), quality.palette(turned))
    assert not torch.allclose(quality.layout(picture), quality.layout(turned), atol=0.1)


def test_a_strip_shows_every_picture_beside_its_nearest(split, tmp_path):
    reals, _ = split
    path = tmp_path / "nearest.png"
    quality.nearest_png(path, reals.pictures[:5], ["one", "two", "three", "four", "five"], reals)
    strip = Image.open(path)
    assert strip.size[0] == 4 + 8 * 68
    boxes = [(x, 4, x + 64, 68) for x in (4, 72)]
    first, near = (np.array(strip.crop(box)) for box in boxes)
    assert np.array_equal(first, near)
