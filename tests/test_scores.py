"""Scores of samples, on request; the Frechet distance against its formula."""

import json

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from difftrain.cli import main
from difftrain.models.errors import PartError
from difftrain.sampling.fid import fid
from difftrain.training import scores
from difftrain.training.bundle import block, compile_text


class Sketch(nn.Module):
    """Four numbers of a picture, called as Inception's file is."""

    def forward(self, pictures: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        values = pictures.double().mean(dim=[2, 3])
        return torch.cat([values, values[:, :1] * values[:, 1:2] / 255], dim=1)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A TorchScript file with features that are known."""
    path = tmp_path_factory.mktemp("weights") / "inception.pt"
    torch.jit.script(Sketch()).save(str(path))
    return path


def noise(count: int, seed: int, scale: float) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(count, 3, 8, 8, generator=draw)).clamp(-1, 1)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """arXiv:1706.08500 eq. 6."""
    (m, c), (n, d) = ((x.mean(0), np.cov(x, rowvar=False)) for x in (a, b))
    roots = np.sqrt(np.linalg.eigvals(c @ d).astype(complex)).real
    return float(((m - n) ** 2).sum() + np.trace(c + d) - 2 * roots.sum())


def test_it_is_the_frechet_distance_of_the_features(inception):
    made, real = noise(40, 1, 0.3), noise(50, 2, 0.5)
    rows = [Sketch()(((x + 1) * 127.5).round().to(torch.uint8)).numpy() for x in (made, real)]
    assert fid(made, real, inception) == pytest.approx(frechet(*rows), rel=1e-5)
    assert fid(real, real, inception) == pytest.approx(0, abs=1e-4)


def test_a_file_that_is_not_inceptions_is_told(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(2)}, path)
    other = tmp_path / "other.pt"
    torch.jit.script(nn.Flatten()).save(str(other))
    for wrong in (path, other):
        with pytest.raises(PartError) as told:
            fid(noise(4, 1, 1.0), noise(4, 2, 1.0), wrong)
        assert str(told.value) == (
            f"`{wrong}` is not Inception: give its TorchScript file, such as"
            " `inception-2015-12-05.pt`, which takes pictures and `return_features`"
        )


# ---- the table


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The `data` block of a spec with pictures whose `label` and `style` are known."""
    tiny.photos(tmp_path / "photos", held_out=3)
    lines = (tmp_path / "photos" / "metadata.jsonl").read_text().splitlines()
    rows = [{**json.loads(line), "label": f"c{i % 4}"} for i, line in enumerate(lines)]
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return block(compile_text("tiny", tiny.spec()).read(), "data")


def cells(table: str) -> dict[str, list[str]]:
    rows = [line.strip("|").split("|") for line in table.splitlines()[2:]]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_copies_are_told_and_show_what_was_asked_for(data, inception):
    train = scores.decoded(scores.opened(data, "train"), 64)
    texts = [record.caption for record in train.found.records]
    found = cells(scores.table(train.pictures, texts, data, "caption", str(inception)))
    assert found["distance to the nearest training picture, median"][0] == "0.00"
    assert found["copies: nearer than 0.25"][0] == "100.0%"
    asked = found["`label` of the nearest training picture as asked for"]
    assert asked == ["100.0%", "28.0% by chance"]  # of 5 pictures, two show the same
    assert float(found["FID to 5 training pictures"][0]) == pytest.approx(0, abs=0.01)
    value, real = found["KID to 3 held-out pictures"]
    assert value == real
    assert not any("style" in name for name in found)


def test_captions_that_mean_several_things_ask_for_none(data):
    """A network without a condition has one caption for all, one of classes one for many."""
    train = scores.decoded(scores.opened(data, "train", ""), 64)
    found = cells(scores.table(train.pictures, [""] * 5, data, ""))
    assert "copies: nearer than 0.25" in found and not any("asked for" in n for n in found)
    classes = [record.caption for record in scores.opened(data, "train", "label").records]
    found = cells(scores.table(train.pictures, classes, data, "label"))
    assert found["`label` of the nearest training picture as asked for"][0] == "100.0%"


def test_noise_is_far_from_everything(data):
    made = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = cells(scores.table(made, ["what no caption says"] * 6, data, "caption"))
    assert float(found["its position: 0 is real, 1 is noise"][0]) > 0.5
    assert found["copies: nearer than 0.25"][0] == "0.0%"
    assert not any("asked for" in name or "FID" in name for name in found)


def test_without_held_out_pictures(tmp_path, data):
    path = tmp_path / "photos" / "metadata.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if k != "split"} for row in rows]
    path.write_text("\n".join(map(json.dumps, kept)))
    found = cells(scores.table(noise(4, 1, 1.0), ["picture a"] * 4, data, "caption"))
    assert "KID to 8 training pictures" in found


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tiny.home(tmp_path, held_out=3))
    assert main(["train", "--steps", "1"]) == 0
    capsys.readouterr()
    assert main(["sample", "runs/tiny", "-n", "3", "--steps", "1", "--score", "-o", "a.png"]) == 0
    table, path = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert path == "a.png" and table.startswith("| score | 3 samples | real pictures |")
    few, gone = (["-n", "2", "--score"], ["-n", "3", "--fid", "gone.pt"])
    for asked, says in (
        (few, "error: `--score` takes 3 pictures or more: say `-n`, a hundred or more"),
        (
            gone,
            "error: there is no file `gone.pt`: give Inception by its TorchScript file, such as"
            " `inception-2015-12-05.pt`",
        ),
    ):
        assert main(["sample", "runs/tiny", *asked, "-o", "b.png"]) == 2
        assert capsys.readouterr().err.strip().split("\n")[-1].startswith(says)
    assert not (tmp_path / "b.png").exists()
