"""Where samples go: they replace samples, and nothing else."""

import json
import os

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef

from difftrain.cli import main
from difftrain.compiler.executable import unpack
from difftrain.sampling.pictures import write_pngs
from difftrain.training.folder import FolderError
from difftrain.training.outputs import places
from difftrain.training.writing import SHOWN, write, write_arrays


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a text, a picture, an archive and a pipe of one's own, and another folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.diff").write_text("diff 1\n")
    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (4, 4)).save("mine.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "mine.png").read_bytes()[:20])
    np.savez("data.npz", x=np.ones(3))
    os.mkfifo("pipe.png")
    for folder in ("folder.png", "photos-pictures"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (4, 4)).save("photos-pictures/0007.png")
    (tmp_path / "plain-pictures").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("ending", "out", "save", "says"),
    [
        (
            ".png",
            "notes.diff",
            None,
            "`notes.diff` does not end in `.png`: samples of this run are pictures in a grid, so"
            " let the file that `-o` names end so",
        ),
        (
            ".npz",
            "a.png",
            None,
            "`a.png` does not end in `.npz`: samples of this run are arrays, so let the file that"
            " `-o` names end so",
        ),
        (".png", "mine.png", None, "`mine.png` is there already and holds no samples"),
        (".png", "text.png", None, "`text.png` is there already and holds no samples"),
        (".png", "cut.png", None, "`cut.png` is there already and holds no samples"),
        (".png", "pipe.png", None, "`pipe.png` is there already and holds no samples"),
        (".npz", "data.npz", None, "`data.npz` is there already and holds no samples"),
        (".png", "folder.png", None, "`folder.png` is a folder"),
        (".png", "a.png", "data.npz", "`data.npz` is there already and holds no samples"),
    ],
)
def test_what_is_no_sample_stays(home, ending, out, save, says):
    before = tiny.contents(home)
    with pytest.raises(FolderError) as told:
        places("run", ending, out, save)
    end = ": give the name of another file" if "does not end" not in says else ""
    assert str(told.value) == says + end and tiny.contents(home) == before


@pytest.mark.parametrize(
    ("ending", "out", "save", "says"),
    [
        (
            ".png",
            None,
            "all.zip",
            "`all.zip` does not end in `.npz`: let the file that `--save` names end so",
        ),
        (
            ".npz",
            None,
            "all.npz",
            "`--save` keeps pictures, and this run makes arrays: use `-o` alone",
        ),
        (
            ".png",
            "photos.png",
            None,
            "`photos-pictures/0007.png` is no sample and would be written over: give another name"
            " with `-o`",
        ),
        (
            ".png",
            "plain.png",
            None,
            "`plain-pictures` is where each picture would lie, and is no folder: give another name"
            " with `-o`",
        ),
        (
            ".png",
            "notes.diff/a.png",
            None,
            "`notes.diff/a.png` lies in `{home}/notes.diff`, which is no folder: give another"
            " place",
        ),
    ],
)
def test_places_that_do_not_fit_are_told(home, ending, out, save, says):
    with pytest.raises(FolderError) as told:
        places("run", ending, out, save)
    assert str(told.value) == says.format(home=home)


def test_a_folder_that_cannot_be_written_is_told_at_once(home, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever is root may write
    with pytest.raises(FolderError) as told:
        places("run", ".png", "deep/er/a.png", None)
    assert str(told.value) == (
        f"nothing can be written in `{home}`: give another place for `deep/er/a.png`"
    )


@pytest.mark.parametrize("name", ["text.png", "data.npz", "pipe.png", "null"])
def test_an_executable_replaces_executables_alone(home, capsys, name):
    """Not a device or a pipe either: they would be gone for everyone."""
    (home / "null").symlink_to("/dev/null")
    before = tiny.contents(home)
    (home / "tiny.diff").write_text(tiny.spec())
    assert main(["compile", "tiny.diff", "--target", "none", "-o", name]) == 2
    assert capsys.readouterr().err == (
        f"error: `{name}` is there already and is no executable that `difftrain compile` wrote:"
        " give the name of another file\n"
    )
    assert tiny.contents(home) == {**before, "tiny.diff": tiny.spec().encode()}
    assert os.path.exists("/dev/null") and not os.path.isfile("/dev/null")


def test_an_executable_replaces_an_empty_file_and_itself_and_gets_its_folders(home):
    (home / "tiny.diff").write_text(tiny.spec())
    (home / "empty").touch()
    tiny.photos(home / "photos")
    for out in ("empty", "empty", "deep/er/tiny"):
        assert main(["compile", "tiny.diff", "--target", "none", "-o", out]) == 0
        assert "manifest.json" in unpack(home / out)


def test_samples_replace_samples(home):
    settings = {"graph": "0"}
    write_arrays(home / "run-samples.npz", ["a"], settings, "x", [np.ones(1)])
    assert [str(p) for p in places("run", ".npz", None, None)][0] == "run-samples.npz"
    write_pngs("run-pictures", [torch.zeros(2, 4, 4, 3, dtype=torch.uint8)], [settings] * 2)
    assert [str(p) for p in places("run", ".png", None, None)] == ["run.png", "run-pictures"]


def test_samples_are_known_at_any_size(home, monkeypatch):
    """Grids may be larger than what Pillow opens."""
    write_pngs("run-pictures", [torch.zeros(1, 4, 4, 3, dtype=torch.uint8)], [{"graph": "0"}])
    os.rename("run-pictures/0000.png", "run.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(Image.DecompressionBombError):
        Image.open("run.png")
    assert [str(p) for p in places("run", ".png", None, None)] == ["run.png", "run-pictures"]


def test_arrays_are_not_written_over_the_data_of_the_same_name(tmp_path, monkeypatch):
    """A spec `tiny.diff` beside its data `tiny.npz`."""
    monkeypatch.chdir(tmp_path)
    np.savez("tiny.npz", x=np.ones((4, 1, 4), dtype=np.float32))
    data = (tmp_path / "tiny.npz").read_bytes()
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "tiny.diff").write_text(SPEC)
    assert main(["train", "tiny.diff"]) == 0
    assert main(["sample", "runs/tiny", "-n", "2"]) == 0
    assert (tmp_path / "tiny.npz").read_bytes() == data
    with np.load("tiny-samples.npz") as file:
        assert file["x"].shape == (2, 1, 4) and json.loads(str(file["settings"]))["step"] == 1


@pytest.mark.parametrize("save", [None, "all.npz"])
def test_pictures_are_written_as_they_come(home, save):
    """What is held of five batches: the first two, for the grid, and the one before the next."""
    made: list[StorageWeakRef] = []

    def batches():
        for k in range(5):
            assert sum(not old.expired() for old in made) == min(k, 3)
            pixels = torch.full((40, 4, 4, 3), k, dtype=torch.uint8)
            made.append(StorageWeakRef(pixels.untyped_storage()))
            yield pixels

    place = home / (save or "some-pictures")
    write(batches(), {"graph": "0"}, ["a"] * 200, home / "some.png", place)
    if save:
        with np.load(place) as file:
            assert file["pictures"].shape == (200, 3, 4, 4) and len(file["captions"]) == 200
            assert file["pictures"][:, 0, 0, 0].tolist() == [k for k in range(5) for _ in range(40)]
    else:
        assert [p.name for p in sorted(place.iterdir())] == [f"{i:04d}.png" for i in range(200)]
    shown = json.loads(Image.open(home / "some.png").text["prompts"])
    assert len(shown) == SHOWN == 64


NET = """\
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(4, 4)

    def forward(self, x, t, cond):
        return self.line(x)


def make(shape):
    return Net()
"""
SPEC = """\
diff 1
backbone net(text = [], codec = raw) {
  module = "net:make"
  times  = [t]
}
objective tiny {
  process         = linear
  prediction_type = flow
  backbone        = net
}
data   { source = arrays("tiny.npz"), batch = 2 }
train  { steps = 1 }
sample { solver = euler(steps = 2) }
"""
