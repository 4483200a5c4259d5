"""The batch contract, field by field given and absent; the order of samples; resuming."""

import re
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from difftrain.training.batches import Batches, indices, once, order, phrasing, read
from difftrain.training.latents import prepare, signed, stream
from difftrain.training.sources import DataError, open_source


class Unshuffle(torch.nn.PixelUnshuffle):
    """A codec that counts its calls: 2 x 2 blocks of pixels become channels."""

    def __init__(self):
        super().__init__(2)
        self.calls = 0

    def encode(self, image):
        self.calls += 1
        return self(image)


def letters(texts, length):
    """A tokenizer: one id a letter, int64 [B, length]."""
    return torch.tensor([[ord(letter) for letter in text.ljust(length)[:length]] for text in texts])


IMAGE = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
IDS = torch.arange(10).reshape(2, 5)
LATENTS = torch.ones(2, 12, 2, 2)


def given(**fields):
    return {"image": IMAGE, "input_ids": IDS, **fields}


def fails(sentence):
    """What `pytest.raises` gives for an error that holds this text."""
    return pytest.raises(DataError, match=re.escape(sentence))


# ---- optional fields, given and absent


def test_absent_latents_are_encoded_once():
    codec, said = Unshuffle(), []
    found = read(given(), codec=codec, say=said.append)
    assert torch.equal(found["latents"], torch.nn.functional.pixel_unshuffle(IMAGE, 2))
    assert (codec.calls, said) == (1, [])


def test_given_latents_win_over_the_image_and_it_is_said():
    codec, said = Unshuffle(), []
    found = read(given(latents=LATENTS), codec=codec, say=said.append)
    assert found["latents"] is LATENTS and "image" not in found and codec.calls == 0
    assert said == ["the batch has `latents`: they win over `image`, and the codec is not called"]


def test_given_latents_alone_need_no_codec_and_no_word():
    said = []
    found = read({"latents": LATENTS, "input_ids": IDS}, say=said.append)
    assert found["latents"] is LATENTS and said == []


def test_an_image_that_loses_to_latents_is_not_even_opened():
    found = read(given(latents=LATENTS, image=["nowhere.png"] * 2), say=[].append)
    assert found["latents"] is LATENTS


def test_an_image_that_the_objective_reads_stays_beside_given_latents():
    said = []
    found = read(given(latents=LATENTS), needs=("image", "input_ids"), say=said.append)
    assert torch.equal(found["image"], IMAGE) and found["latents"] is LATENTS and said == []


def test_without_codec_and_latents_the_image_is_what_is_trained_on():
    found = read(given())
    assert torch.equal(found["image"], IMAGE) and "latents" not in found


def test_given_timesteps_win_and_it_is_said():
    said = []
    found = read(given(timesteps=torch.tensor([3, 7])), say=said.append)
    assert found["timesteps"].tolist() == [3, 7]
    assert said == ["the batch has `timesteps`: they win, and none are drawn"]


def test_absent_timesteps_stay_absent():
    said = []
    assert "timesteps" not in read(given(timesteps=None), say=said.append) and said == []


def test_precedence_is_said_once_over_many_batches():
    said = []
    say = once(said.append)
    for _ in range(3):
        read(given(latents=LATENTS, timesteps=torch.rand(2)), say=say)
    assert len(said) == 2


def test_metadata_and_index_are_optional_and_kept():
    notes = [{"style": "3d"}, {"style": "flat"}]
    found = read(given(metadata=notes, index=torch.tensor([4, 5])))
    assert found["metadata"] is notes and found["index"].tolist() == [4, 5]
    assert read(given(metadata={"seed": 3}))["metadata"] == {"seed": 3}
    assert {"metadata", "index"}.isdisjoint(read(given()))


def test_input_ids_are_needed_only_where_the_objective_reads_them():
    assert "input_ids" not in read({"image": IMAGE}, needs=())
    with fails("the batch has `image`, but the objective reads `input_ids`: add it"):
        read({"image": IMAGE})


def test_further_fields_of_a_mapping_pass_and_can_be_needed():
    depth = torch.rand(2, 1, 4, 4)
    assert read(given(depth=depth))["depth"] is depth
    with fails("the batch has `image`, `input_ids`, but the objective reads `depth`"):
        read(given(), needs=("input_ids", "depth"))


# ---- forms of a batch


@dataclass
class Sample:
    image: torch.Tensor
    input_ids: torch.Tensor
    note: str = ""


@pytest.mark.parametrize("kind", [Sample, SimpleNamespace])
def test_an_object_with_attributes_is_a_batch(kind):
    found = read(kind(image=IMAGE, input_ids=IDS))
    assert set(found) == {"image", "input_ids"}
    thing = SimpleNamespace(latents=LATENTS, input_ids=IDS, depth=IDS)
    assert read(thing, needs=("depth",))["depth"] is IDS


@pytest.fixture
def photos(tmp_path):
    """A folder with seven pictures of 8 x 8 pixels, three phrasings each."""
    lines = []
    for number in range(7):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append(
            f'{{"file_name": "{number}.png", "caption": ["{number}", "{number}b", "{number}c"]}}'
        )
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_images_may_be_paths(photos):
    paths = [photos / "0.png", str(photos / "1.png")]
    pictures = open_source("folder", photos)
    whole = signed(torch.stack([pictures.image(row, 8) for row in (0, 1)]))
    assert torch.equal(read({"image": paths, "input_ids": IDS}, size=8)["image"], whole)
    one = read({"image": str(photos / "1.png")}, needs=(), size=8)["image"]
    assert torch.equal(one, whole[1:])
    with fails("`image` is a path and no size is set"):
        read({"image": paths, "input_ids": IDS})
    with fails("nowhere.png` cannot be opened (no such file or directory)"):
        read({"image": photos / "nowhere.png"}, needs=(), size=8)


def test_bytes_become_floats_and_floats_stay_as_they_are():
    pixels = torch.tensor([0, 255], dtype=torch.uint8).repeat(2, 3, 4, 1)
    assert torch.equal(
        read(given(image=pixels))["image"][..., :2].unique(), torch.tensor([-1.0, 1])
    )
    assert read(given(image=IMAGE.double()))["image"].dtype == torch.float64


def test_tensors_move_to_the_device_asked_for():
    found = read(given(metadata=["a", "b"]), device="meta")
    assert found["image"].device.type == "meta" and found["metadata"] == ["a", "b"]


# ---- batches that are wrong


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"image": None}, "the batch has `input_ids`, neither `latents` nor `image`"),
        (
            {"image": torch.zeros(2, 1, 4, 4)},
            "`image` [2, 1, 4, 4] needs 3 channels, not 1: convert it to RGB",
        ),
        (
            {"image": torch.zeros(2, 4, 4, 4)},
            "`image` [2, 4, 4, 4] needs 3 channels, not 4: convert it to RGB",
        ),
        ({"image": torch.zeros(2, 4, 4, 3)}, "put them first, `image.permute(0, 3, 1, 2)`"),
        ({"image": torch.zeros(3, 4, 4)}, "`image` is float32 [3, 4, 4]: give floats [B, 3, H, W]"),
        ({"image": 255 * torch.ones(2, 3, 4, 4)}, "`image` runs from 255 to 255: scale it"),
        ({"image": torch.ones(2, 3, 4, 4).long()}, "`image` runs from 1 to 1: scale it"),
        ({"image": torch.full((2, 3, 4, 4), torch.nan)}, "`image` runs from nan to nan"),
        ({"image": np.zeros((2, 3, 4, 4))}, "`image` is a ndarray: give floats"),
        ({"image": []}, "`image` is a list: give floats"),
        ({"latents": LATENTS.long()}, "`latents` is int64 [2, 12, 2, 2]: give floats [B, C, ...]"),
        ({"latents": LATENTS[0, 0]}, "`latents` is float32 [2, 2]: give floats [B, C, ...]"),
        ({"latents": LATENTS[:0]}, "`latents` is float32 [0, 12, 2, 2]: give floats"),
        ({"latents": LATENTS[:1]}, "rows differ (`latents` 1, `input_ids` 2)"),
        ({"input_ids": IDS.float()}, "`input_ids` is float32 [2, 5]: give whole numbers [B, T]"),
        ({"input_ids": IDS[0]}, "`input_ids` is int64 [5]: give whole numbers [B, T]"),
        ({"input_ids": ["a", "b"]}, "`input_ids` is a list: give whole numbers [B, T]"),
        (
            {"input_ids": IDS.repeat(2, 1)},
            "rows differ (`image` 2, `input_ids` 4): give one row per sample",
        ),
        ({"timesteps": torch.tensor(0.5)}, "`timesteps` is float32 []: give numbers [B]"),
        ({"timesteps": torch.rand(2, 1)}, "`timesteps` is float32 [2, 1]: give numbers [B]"),
        ({"timesteps": torch.rand(3)}, "rows differ (`image` 2, `input_ids` 2, `timesteps` 3)"),
        ({"timesteps": torch.ones(2).bool()}, "`timesteps` is bool [2]: give numbers [B]"),
        ({"index": torch.rand(2)}, "`index` is float32 [2]: give whole numbers [B]"),
        ({"metadata": [{}]}, "(`image` 2, `input_ids` 2, `metadata` 1): give one row per sample"),
    ],
)
def test_a_wrong_field_is_told_in_one_sentence(fields, sentence):
    with fails(sentence) as caught:
        read(given(**fields), say=[].append)
    assert "\n" not in str(caught.value) and not str(caught.value).endswith(".")


def test_something_that_is_no_batch_at_all():
    with fails("the batch has no field at all, neither `latents` nor `image`"):
        read((IMAGE, IDS))


def test_a_named_tuple_is_a_batch_and_its_methods_are_no_fields():
    pair = namedtuple("Pair", "image input_ids")
    assert set(read(pair(IMAGE, IDS))) == {"image", "input_ids"}


# ---- order


def test_order_is_a_permutation_of_the_seed_and_epoch_alone():
    assert sorted(order(3, 0, 100)) == list(range(100))
    assert order(3, 0, 10).tolist() == order(3, 0, 10).tolist()
    different = {tuple(order(seed, epoch, 100)) for seed in (-1, 0, 3) for epoch in range(3)}
    assert len(different) == 9


def test_order_keeps_its_values_for_ever():
    assert order(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert [phrasing(7, sample, 3) for sample in range(8)] == [2, 0, 1, 0, 1, 2, 1, 1]


def test_every_place_is_equally_likely():
    counts = np.zeros((5, 5))
    for seed in range(2000):
        counts[np.arange(5), order(seed, 1, 5)] += 1
    assert abs(counts - 400).max() < 5 * np.sqrt(2000 * 0.2 * 0.8)


def test_indices_pass_every_row_once_an_epoch():
    rows = indices(1, 0, 21, 7)
    assert all(sorted(rows[start : start + 7]) == list(range(7)) for start in (0, 7, 14))
    assert rows[:7].tolist() != rows[7:14].tolist()


def test_indices_do_not_depend_on_how_they_are_cut():
    whole = indices(5, 0, 60, 7)
    for first, count in ((0, 1), (13, 20), (6, 2), (59, 1)):
        assert indices(5, first, count, 7).tolist() == whole[first : first + count].tolist()
    assert len(indices(5, 3, 40, 1)) == 40


def test_phrasings_are_uniform():
    counts = np.bincount([phrasing(0, sample, 3) for sample in range(3000)], minlength=3)
    assert abs(counts - 1000).max() < 5 * np.sqrt(3000 * 2 / 9)


# ---- batches


@pytest.fixture(params=["encoded", "streamed"])
def data(request, photos):
    pictures = open_source("folder", photos)
    if request.param == "encoded":
        return prepare(pictures, Unshuffle(), letters, 8, length=4)
    return stream(pictures, letters, 8, length=4)


def test_pictures_come_beside_latents_where_they_are_kept(photos):
    pictures = open_source("folder", photos)
    kept = prepare(pictures, Unshuffle(), letters, 8, length=4, images=True)
    batch = Batches(kept, seed=0, batch_size=4).at(2)
    assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (4, 3, 8, 8)
    assert torch.equal(Unshuffle()(signed(batch["image"])), batch["latents"])


def first(batches, steps):
    return [batch for batch, _ in zip(batches, range(steps), strict=False)]


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        equal = torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]
        assert equal, name


def test_a_batch_keeps_the_contract(data):
    batch = next(iter(Batches(data, seed=1, batch_size=4)))
    found = read(batch, codec=Unshuffle(), needs=("input_ids", "index"))
    assert found["latents"].shape == (4, 12, 4, 4) and found["input_ids"].shape == (4, 4)
    assert found["index"].tolist() == [0, 1, 2, 3] and found["index"].dtype == torch.int64
    rows = indices(1, 0, 4, 7)
    for row, note, ids in zip(rows, found["metadata"], found["input_ids"], strict=True):
        assert note["file"] == f"{row}.png" and note["caption"].startswith(str(row))
        assert torch.equal(ids, letters([note["caption"]], 4)[0])


def test_encoded_and_streamed_batches_train_on_the_same(photos):
    pictures = open_source("folder", photos)
    kept = Batches(prepare(pictures, Unshuffle(), letters, 8), seed=1, batch_size=3)
    streamed = Batches(stream(pictures, letters, 8), seed=1, batch_size=3)
    for one, other in zip(first(kept, 5), first(streamed, 5), strict=True):
        other = read(other, codec=Unshuffle())
        del other["image"]
        same(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("notes", [True, False])
def test_on_a_gpu_batches_are_made_there_and_are_the_same(photos, notes):
    pictures = open_source("folder", photos)
    kept = prepare(pictures, Unshuffle(), letters, 8, length=4, images=True)
    there, here = (Batches(kept, 1, 4, notes=notes, device=d).at(3) for d in ("cuda", "cpu"))
    assert all(there[name].is_cuda for name in ("latents", "image", "index"))
    same({n: v.cpu() if torch.is_tensor(v) else v for n, v in there.items()}, here)


def test_a_run_resumes_at_any_step_with_equal_batches(data):
    whole = first(Batches(data, seed=2, batch_size=4), 8)
    for start in (0, 1, 3, 7):
        for one, other in zip(
            whole[start:], Batches(data, seed=2, batch_size=4, start_step=start), strict=False
        ):
            same(one, other)
        same(whole[start], Batches(data, seed=2, batch_size=4).at(start))


def test_processes_share_a_batch_and_nothing_else_changes(data):
    whole = Batches(data, seed=2, batch_size=6).at(5)
    parts = [Batches(data, seed=2, batch_size=6, rank=rank, world=3).at(5) for rank in range(3)]
    for name, value in whole.items():
        if torch.is_tensor(value):
            assert torch.equal(torch.cat([part[name] for part in parts]), value)
    assert sum((part["metadata"] for part in parts), []) == whole["metadata"]
    with fails("a batch of 6 does not divide among 4 processes: use a multiple of 4"):
        Batches(data, seed=2, batch_size=6, world=4)


def test_a_batch_may_be_larger_than_the_data_set(data):
    files = [note["file"] for note in Batches(data, seed=0, batch_size=14).at(0)["metadata"]]
    assert sorted(files) == sorted(2 * [f"{number}.png" for number in range(7)])


def test_phrasings_vary_between_epochs_of_a_picture(data):
    notes = Batches(data, seed=0, batch_size=7 * 12).at(0)["metadata"]
    assert {note["caption"] for note in notes if note["file"] == "3.png"} == {"3", "3b", "3c"}


def test_without_a_tokenizer_there_are_no_ids(photos):
    batch = Batches(stream(open_source("folder", photos), None, 8), seed=0, batch_size=2).at(0)
    assert "input_ids" not in batch and batch["image"].dtype == torch.uint8


def test_a_broken_picture_is_told_when_its_batch_comes(photos):
    pictures = open_source("folder", photos)
    (photos / "3.png").write_bytes(b"")
    with fails("`3.png` cannot be read as a picture"):
        first(Batches(stream(pictures, letters, 8), seed=0, batch_size=7), 1)
