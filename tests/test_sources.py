"""Sources: the embedded set, folders, zips, splits, decoding, and every way they can be wrong."""

import io
import json
import os
import re
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from difftrain.compiler.executable import runtime
from difftrain.training.sources import DataError, open_source, picture

ROOT = Path(__file__).parent.parent


def paint(path, colour=(200, 30, 90), size=(8, 8), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)


def bytes_of(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.fixture
def photos(tmp_path):
    """A folder with a metadata.jsonl of three lines, written anew by calling it with others."""
    for name in ("a", "b", "c"):
        paint(tmp_path / f"images/{name}.png")

    def write(*lines):
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (tmp_path / "metadata.jsonl").write_text(text + "\n", encoding="utf-8")
        return tmp_path

    write(*({"file_name": f"images/{n}.png", "text": f"picture {n}", "n": n} for n in "abc"))
    write.path = tmp_path
    return write


def fails(*words):
    """What `pytest.raises` gives for an error whose one sentence holds all these words."""
    return pytest.raises(DataError, match=".*".join(map(re.escape, words)))


# ---- the embedded set


def test_the_embedded_set_has_its_counts_and_styles():
    train, test = open_source("emoji64"), open_source("emoji64", split="test")
    assert (len(train), len(test), len(open_source("emoji64", split="all"))) == (1546, 68, 1614)
    assert open_source("emoji64", split="held_out").records == test.records
    assert {record.fields["style"] for record in train.records} == {"3d", "flat", "noto"}
    shown = {(record.fields["label"], record.fields["style"]) for record in train.records}
    for record in test.records:
        others = {"3d", "flat", "noto"} - {record.fields["style"]}
        assert all((record.fields["label"], style) in shown for style in others)


def test_an_embedded_picture_is_what_its_file_holds():
    train = open_source("emoji64")
    raw = np.asarray(Image.open(io.BytesIO(train.data(5))))
    assert torch.equal(train.image(5, 64), torch.from_numpy(raw.copy()).permute(2, 0, 1))
    assert train.image(5, 32).shape == (3, 32, 32)


def test_the_list_field_of_the_embedded_set_gives_three_phrasings():
    record = open_source("emoji64", caption="captions").records[0]
    assert len(record.captions) == 3 and record.caption == record.captions[0]
    assert open_source("emoji64").records[0].captions == (record.caption,)


def test_the_licence_stays_beside_the_data():
    beside = (ROOT / "difftrain/data/LICENSE").read_bytes()
    with zipfile.ZipFile(ROOT / "difftrain/data/emoji64.zip") as inside:
        assert inside.read("LICENSE") == beside


def test_the_embedded_set_opens_when_the_package_is_inside_a_zip(tmp_path):
    program = tmp_path / "program.pyz"
    with zipfile.ZipFile(program, "w") as packed:
        for name, data in runtime().items():
            packed.writestr(name, data)
        packed.writestr(
            "__main__.py",
            "from difftrain.training import sources\n"
            "print(sources.__file__, sources.open_source('emoji64').image(0, 16).shape)\n",
        )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, program]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0].startswith(str(program)) and "[3, 16, 16]" in run.stdout


# ---- layouts


def test_a_folder_with_metadata_names_its_text_field(photos):
    found = open_source("folder", photos.path, caption="text")
    assert [record.caption for record in found.records] == ["picture a", "picture b", "picture c"]
    assert found.records[1].file == "images/b.png" and found.records[1].fields["n"] == "b"
    assert list(found.texts) == ["picture a", "picture b", "picture c"]
    assert repr(found) == f"3 pictures of `{photos.path}`"


def test_a_zip_is_read_as_the_folder_it_was_made_from(photos, tmp_path_factory):
    packed = tmp_path_factory.mktemp("packed") / "photos.zip"
    with zipfile.ZipFile(packed, "w") as out:
        out.writestr("__MACOSX/photos/metadata.jsonl", b"\0")
        for path in sorted(photos.path.rglob("*.*")):
            out.write(path, Path("photos", path.relative_to(photos.path)))
    folder = open_source("folder", photos.path, caption="text")
    zipped = open_source("folder", packed, caption="text")
    assert list(zipped.texts) == list(folder.texts)
    assert zipped.records[0].file == "photos/images/a.png"
    assert torch.equal(zipped.image(2, 4), folder.image(2, 4))


def test_caption_files_stand_beside_their_pictures(tmp_path):
    paint(tmp_path / "one.png")
    paint(tmp_path / "deep/two.JPG")
    (tmp_path / "one.txt").write_text("a red\n square \n")
    (tmp_path / "deep/two.caption").write_text("ein grünes Quadrat", encoding="utf-8-sig")
    (tmp_path / "notes.md").write_text("not a picture")
    found = open_source("folder", str(tmp_path))
    assert [(record.file, record.caption) for record in found.records] == [
        ("deep/two.JPG", "ein grünes Quadrat"),
        ("one.png", "a red square"),
    ]


def test_the_folder_of_a_picture_is_its_label(tmp_path):
    for file in ("train/cats/a.png", "train/dogs/b.png", "test/cats/c.png"):
        paint(tmp_path / file)
    seen = open_source("folder", tmp_path, caption="label")
    assert [record.caption for record in seen.records] == ["cats", "dogs"]
    paint(tmp_path / "train/d.png")
    with fails("`train/d.png` in `", "has no `label`: put it into a folder of that name"):
        open_source("folder", tmp_path, caption="label")


def test_numbers_are_their_digits(photos):
    lines = [{"file_name": f"images/{n}.png", "n": k} for k, n in enumerate("abc")]
    found = open_source("folder", photos(*lines), caption="n")
    assert [record.caption for record in found.records] == ["0", "1", "2"]


def test_pictures_without_text_need_no_caption(tmp_path):
    paint(tmp_path / "one.png")
    assert open_source("folder", tmp_path, caption="").records[0].captions == ("",)


def test_unusual_line_ends_inside_a_caption_do_not_break_a_line(photos):
    line = json.dumps({"file_name": "images/a.png", "caption": "a\u2028b"}, ensure_ascii=False)
    assert open_source("folder", photos(line + "\r", "", line)).records[1].caption == "a\u2028b"


# ---- splits


def test_without_a_split_field_everything_is_for_training(photos):
    assert len(open_source("folder", photos.path, caption="text")) == 3
    with fails("has nothing in the split `held_out`, only in `train`"):
        open_source("folder", photos.path, caption="text", split="held_out")


def test_the_held_out_fraction_is_stable_when_pictures_are_added(tmp_path):
    def parts(count):
        for number in range(count):
            paint(tmp_path / f"{number}.png", size=(1, 1))
        split = {
            name: {r.file for r in open_source("folder", tmp_path, **options, split=name).records}
            for name in ("train", "held_out")
        }
        assert len(split["train"]) + len(split["held_out"]) == count
        return split

    options = {"caption": "", "held_out": 0.25}
    few, many = parts(60), parts(120)
    assert few["held_out"] < many["held_out"] and few["train"] < many["train"]
    assert 15 <= len(many["held_out"]) <= 45


def test_folders_called_train_and_test_are_splits(tmp_path):
    paint(tmp_path / "train/a.png")
    paint(tmp_path / "test/b.png")
    for split, file in (("train", "train/a.png"), ("test", "test/b.png")):
        records = open_source("folder", tmp_path, caption="", split=split).records
        assert [record.file for record in records] == [file]


def test_a_split_that_only_some_lines_have_is_an_error(photos):
    a = {"file_name": "images/a.png", "caption": "a", "split": "train"}
    with fails("`images/b.png`", "has no `split` while others have one"):
        open_source("folder", photos(a, {"file_name": "images/b.png", "caption": "b"}))


# ---- metadata that is wrong


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{nonsense", ["metadata.jsonl` line 2 is not JSON", "at column 2", "one object a line"]),
        ("[1]", ["line 2 names no picture", '"file_name"']),
        ({"caption": "b"}, ["line 2 names no picture", '"file_name"']),
        ({"file_name": "images/x.png", "caption": "b"}, ["`images/x.png`, which is not there"]),
        ({"file_name": "../a.png", "caption": "b"}, ["`../a.png`, which is not there"]),
        ({"file_name": "images/b.png"}, ["line 2 has no `caption`: write one"]),
        ({"file_name": "images/b.png", "n": 1, "label": "b"}, ['as in caption = "label"']),
        ({"file_name": "images/b.png", "label": "b", "text": "b"}, ['as in caption = "text"']),
        ({"file_name": "images/b.png", "caption": "  "}, ["line 2 has no `caption`"]),
        ({"file_name": "images/b.png", "caption": []}, ["line 2 has no `caption`"]),
        ({"file_name": "images/b.png", "caption": True}, ["line 2: `caption` is not text"]),
        ({"file_name": "images/b.png", "caption": ["b", None]}, ["line 2: `caption` is not text"]),
    ],
)
def test_a_wrong_line_is_named_by_its_number(photos, line, words):
    with fails(*words):
        open_source("folder", photos({"file_name": "images/a.png", "caption": "a"}, line))


def test_metadata_that_is_not_text_is_an_error(photos):
    (photos.path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    with fails("`metadata.jsonl`", "cannot be read as UTF-8 text"):
        open_source("folder", photos.path)


# ---- folders that are wrong


def test_sources_that_are_not_there(tmp_path):
    with fails("no data source called `folders`: did you mean `folder`?"):
        open_source("folders", tmp_path)
    with fails("no data source called `web`: use `emoji64` or `folder`"):
        open_source("web")
    with fails("`folder` needs a path"):
        open_source("folder")
    with fails("there is no folder or zip", "check the path"):
        open_source("folder", tmp_path / "nowhere")
    with fails("holds no pictures"):
        open_source("folder", tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with fails(f"`{tmp_path}/metadata.jsonl` is empty: write one object a line"):
        open_source("folder", tmp_path)


def test_a_folder_that_is_not_ours_to_read(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may read all
    with fails(f"`{tmp_path}` cannot be read (permission denied)"):
        open_source("folder", tmp_path)


def test_a_zip_cut_short_is_an_error(tmp_path):
    whole = (ROOT / "difftrain/data/emoji64.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[:5000])
    with fails("cut.zip` is neither a folder nor a whole zip"):
        open_source("folder", tmp_path / "cut.zip")


def test_a_zip_damaged_inside_names_the_picture(photos, tmp_path):
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as out:
        out.write(photos.path / "images/a.png", "a.png")
        out.writestr("a.txt", "a")
    damaged = bytearray((tmp_path / "p.zip").read_bytes())
    damaged[60] ^= 255
    (tmp_path / "p.zip").write_bytes(damaged)
    with fails("`a.png` in", "cannot be read (bad crc-32"):
        open_source("folder", tmp_path / "p.zip").image(0, 8)


def test_any_damaged_byte_of_a_zip_is_an_error_of_ours_or_harmless(tmp_path):
    packed = tmp_path / "p.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("metadata.jsonl", '{"file_name": "a.png", "caption": "a"}')
        out.writestr("a.png", bytes_of(Image.effect_noise((4, 4), 9)))
    whole, told = packed.read_bytes(), 0
    for place in range(len(whole)):
        packed.write_bytes(whole[:place] + bytes([whole[place] ^ 9]) + whole[place + 1 :])
        try:
            open_source("folder", packed).image(0, 4)
        except DataError:
            told += 1
    assert told > len(whole) / 2


def test_a_picture_without_a_caption_file_is_named(tmp_path):
    paint(tmp_path / "a.png")
    with fails("`a.png` in", "has no caption: write the text into `a.txt`"):
        open_source("folder", tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with fails("`a.png` in", "empty caption file `a.txt`"):
        open_source("folder", tmp_path)


def test_a_picture_taken_away_after_opening_is_named(photos):
    found = open_source("folder", photos.path, caption="text")
    (photos.path / "images/b.png").unlink()
    with fails("`images/b.png`", "cannot be read (no such file or directory)"):
        found.image(1, 8)


# ---- decoding


def test_the_shorter_side_is_resized_and_the_centre_kept():
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("blue", (10, 0, 30, 20))
    middle = picture(bytes_of(wide), 10, "wide")[:, :, 3:-3]  # the filter reaches over 3 pixels
    assert (middle == torch.tensor([0, 0, 255])[:, None, None]).all()
    whole = np.asarray(wide.resize((20, 10), Image.Resampling.LANCZOS))[:, 5:-5].copy()
    assert torch.equal(
        picture(bytes_of(wide), 10, "wide"), torch.from_numpy(whole).permute(2, 0, 1)
    )


def test_transparency_is_laid_on_white_and_grey_spread_over_three_channels():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (picture(bytes_of(clear), 4, "clear") == 255).all()
    palette = Image.new("P", (4, 4), 0)
    assert (picture(bytes_of(palette, "PNG", transparency=0), 4, "palette") == 255).all()
    grey = picture(bytes_of(Image.new("L", (4, 4), 77)), 4, "grey")
    assert grey.shape == (3, 4, 4) and grey.dtype == torch.uint8 and (grey == 77).all()


def test_a_picture_is_turned_as_its_camera_says():
    image = Image.new("RGB", (8, 8), "black")
    image.paste("white", (0, 0, 8, 4))
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    upright = picture(bytes_of(image, "PNG", exif=turned), 8, "turned")
    assert (upright[:, :4] == 0).all() and (upright[:, 4:] == 255).all()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bytes_of(Image.new("CMYK", (4, 4)), "JPEG"), ["`x` is CMYK (4 channels)", "8-bit RGB"]),
        (bytes_of(Image.new("LAB", (4, 4)), "TIFF"), ["`x` is LAB (3 channels)", "8-bit RGB"]),
        (bytes_of(Image.new("I;16", (4, 4))), ["`x` has more than 8 bits a channel"]),
        (bytes_of(Image.new("F", (4, 4)), "TIFF"), ["`x` has more than 8 bits a channel"]),
        (bytes_of(Image.new("RGB", (64, 64)), "JPEG")[:-30], ["`x` cannot be read", "truncated"]),
        (bytes_of(Image.effect_noise((32, 32), 9))[:300], ["`x` cannot be read", "truncated"]),
        (b"", ["`x` cannot be read as a picture (cannot identify image file)", "take it out"]),
        (b"<html>not found</html>", ["`x` cannot be read as a picture"]),
    ],
)
def test_a_picture_that_cannot_be_used_is_one_sentence(data, words):
    with fails(*words) as caught:
        picture(data, 8, "x")
    sentence = str(caught.value)
    assert "\n" not in sentence and not sentence.endswith(".")


def test_sixteen_bits_a_channel_are_refused_in_colour_too():
    def chunk(kind, body):
        head = kind + body
        return len(body).to_bytes(4, "big") + head + zlib.crc32(head).to_bytes(4, "big")

    size = (2).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])  # 16 bits, RGB
    rows = zlib.compress(bytes(2 * (1 + 2 * 6)))
    parts = chunk(b"IHDR", size) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    with fails("`x` has more than 8 bits a channel"):
        picture(b"\x89PNG\r\n\x1a\n" + parts, 8, "x")
