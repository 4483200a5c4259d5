"""Picture grids: places, captions, settings, and files that are whole or absent."""

import numpy as np
import pytest
import torch
from PIL import Image

from difftrain.sampling.pictures import grid_png

LEVELS = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
IMAGES = LEVELS[:, None, None, None].expand(5, 3, 16, 20)


def test_pictures_stand_in_rows_with_white_gaps(tmp_path):
    grid_png(tmp_path / "grid.png", IMAGES, columns=3)
    sheet = np.array(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (4 + 2 * 20, 4 + 3 * 24, 3)
    corners = [sheet[4 + i // 3 * 20, 4 + i % 3 * 24, 0] for i in range(5)]
    assert corners == [0, 64, 128, 191, 255]
    assert (sheet[:4] == 255).all() and (sheet[:, 24:28] == 255).all()


def test_values_outside_the_range_are_clamped(tmp_path):
    grid_png(tmp_path / "grid.png", torch.full((1, 3, 8, 8), 3.0, dtype=torch.bfloat16), columns=1)
    assert np.array(Image.open(tmp_path / "grid.png")).min() == 255


def test_captions_stand_under_their_picture_in_as_many_lines_as_they_need(tmp_path):
    images = torch.ones(2, 3, 64, 64)
    long = "a flat picture of a red apple with unpronounceableincomprehensibilities"
    grid_png(tmp_path / "grid.png", images, columns=2, captions=["", long])
    sheet = np.array(Image.open(tmp_path / "grid.png"))
    assert sheet.shape[0] > 4 + 68 + 3 * 12 - 1
    assert (sheet[:, :72] == 255).all()
    assert (sheet[68:, 72:] < 128).any()


def test_as_many_captions_as_pictures_are_needed(tmp_path):
    with pytest.raises(ValueError):
        grid_png(tmp_path / "grid.png", IMAGES, columns=3, captions=["one"])
    assert list(tmp_path.iterdir()) == []


def test_settings_are_kept_in_the_file(tmp_path):
    settings = {"solver": "ddim(steps = 30)", "guidance": 7.5, "prompts": ["ein Apfel", "りんご"]}
    grid_png(tmp_path / "grid.png", IMAGES, columns=5, settings=settings)
    text = Image.open(tmp_path / "grid.png").text
    assert text["solver"] == "ddim(steps = 30)" and text["guidance"] == "7.5"
    assert text["prompts"] == '["ein Apfel", "りんご"]'


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "grid.png"
    grid_png(path, IMAGES, columns=5)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        grid_png(path, -IMAGES, columns=5, settings={"model": object()})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_a_name_that_is_taken_by_a_folder_leaves_nothing_behind(tmp_path):
    (tmp_path / "grid.png").mkdir()
    with pytest.raises(OSError):
        grid_png(tmp_path / "grid.png", IMAGES, columns=5)
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]
