import json

import pytest
import torch
from transformers import CLIPTokenizer

from difftrain.models.errors import PartError
from difftrain.models.tokenizer import END, MERGES, START, clip_tokenizer

# ids by open_clip 3.3.0's own SimpleTokenizer, without the marks
REFERENCE = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "A 3D rendered RED Apple emoji!": [320, 274, 323, 23652, 736, 3055, 16327, 256],
    "don't stop, it's 5 o'clock...": [
        *(847, 713, 1691, 267, 585, 568, 276, 334, 262, 6716, 678),
    ],
    "café naïve Zürich": [15304, 1097, 35689, 563, 89, 6522, 4021],
    "🦊🍎 fox": [6040, 232, 32069, 3240],
    "🤷🏽\u200d♀️": [13185, 37036],
    "1234567890": [272, 273, 274, 275, 276, 277, 278, 279, 280, 271],
    "hello_world (test) [x] {y} #tag @me 50%": [
        *(3306, 318, 1002, 263, 1628, 264, 314, 343, 316, 346, 344, 348, 258, 3640, 287),
        *(614, 276, 271, 260),
    ],
    "  spaced\tout\n text ": [10336, 538, 620, 4160],
    "日本語 русский": [39121, 44353, 34002, 508, 16370, 39729, 23669, 23669, 27152, 29503, 373],
    "antidisestablishmentarianism": [3120, 4262, 7726, 12658, 1585, 44351],
    "a&b <b>bold</b> c:\\d": [
        320,
        261,
        321,
        283,
        321,
        285,
        8911,
        34308,
        321,
        285,
        322,
        25,
        315,
        323,
    ],
    "": [],
}


@pytest.fixture(scope="module")
def tokens():
    return clip_tokenizer()


@pytest.mark.parametrize("text", REFERENCE)
def test_ids_are_those_of_the_original(tokens, text):
    ids = REFERENCE[text]
    padding = [END] * (32 - len(ids) - 2)
    assert tokens([text], 32).tolist() == [[START, *ids, END, *padding]]


def test_a_batch_is_one_tensor_of_whole_numbers(tokens):
    ids = tokens(["a cat", "a photo of a cat"], 77)
    assert ids.shape == (2, 77) and ids.dtype == torch.int64
    assert tokens([], 9).shape == (0, 9)


def test_the_vocabulary_is_whole(tokens):
    # 256 bytes, 256 that end a word, the merges, two marks
    assert tokens.backend.get_vocab_size() == 512 + MERGES + 2 == 49_408
    assert tokens.backend.token_to_id("jekyll</w>") == START - 1


def test_long_texts_are_cut_and_that_is_said_once():
    said = []
    ids = clip_tokenizer(say=said.append)(["a photo of a cat", "a photo of a dog"], 5)
    assert ids.tolist() == [[START, 320, 1125, 539, END]] * 2
    assert said == ["`a photo of a cat...` has 7 tokens and 5 fit: such texts are cut"]


def test_no_room_for_text_is_an_error(tokens):
    with pytest.raises(PartError, match="1 tokens hold no text"):
        tokens(["a cat"], 1)


def test_used_ids_are_sorted_with_the_marks(tokens):
    assert tokens.used(["a cat", "a photo"]) == [320, 1125, 2368, START, END]


def test_words_come_back_with_their_ids(tokens):
    ids = tokens(["an antidisestablishmentarianism Cat"], 12)[0].tolist()
    assert tokens.words(ids) == [
        ("an", [550]),
        ("antidisestablishmentarianism", REFERENCE["antidisestablishmentarianism"]),
        ("cat", [2368]),
    ]


VOCABULARY = ["!", "c", "a", "t</w>", "at</w>", "cat</w>", "<|startoftext|>", "<|endoftext|>"]


def saved_now(folder):
    merges = [("a", "t</w>"), ("c", "at</w>")]
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    CLIPTokenizer(vocabulary, merges, pad_token="!").save_pretrained(folder)


def saved_long_ago(folder):
    folder.mkdir()
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\na t</w>\nc at</w>\n")
    config = {"tokenizer_class": "CLIPTokenizer", "pad_token": "!", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("save", [saved_now, saved_long_ago])
def test_a_folder_brings_its_own_tokenizer(tmp_path, save):
    save(tmp_path / "tokenizer")
    assert clip_tokenizer(str(tmp_path))(["CAT at"], 6).tolist() == [[6, 5, 4, 7, 0, 0]]


def test_a_folder_without_tokenizer_has_the_usual_one(tmp_path):
    assert clip_tokenizer(str(tmp_path))(["a cat"], 4).tolist() == [[START, 320, 2368, END]]


def test_a_missing_folder_and_a_broken_tokenizer_are_told(tmp_path):
    with pytest.raises(PartError, match="there is no folder `.*/none`"):
        clip_tokenizer(str(tmp_path / "none"))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{")
    with pytest.raises(PartError, match="cannot read the tokenizer"):
        clip_tokenizer(str(tmp_path))
