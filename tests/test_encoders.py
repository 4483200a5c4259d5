"""Text encoders besides CLIP's, class labels, and several encoders as one."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipTextModel,
    T5EncoderModel,
    T5Tokenizer,
)

from difftrain.language.part import Part
from difftrain.models import build
from difftrain.models.encoders import qwen, siglip, t5
from difftrain.models.errors import PartError
from difftrain.models.joined import Joined
from difftrain.models.labels import label
from difftrain.models.pieces import pieces
from difftrain.models.pretrained import facts
from difftrain.models.text import clip
from difftrain.models.tokenizer import clip_tokenizer

SMALL = {"layers": 2, "width": 16, "heads": 2, "length": 8}
CAPTIONS = ["a photo of a cat", "a red apple"]
MAKERS = {"t5": t5, "siglip": siglip, "qwen": qwen}
every = pytest.mark.parametrize("name", MAKERS)


def small(name: str, **options):
    torch.manual_seed(0)
    vocabulary = clip_tokenizer().used(CAPTIONS)
    return MAKERS[name](**{**SMALL, "vocabulary": vocabulary, **options})


def words(folder, pad: str = "<pad>", end: str = "") -> None:
    """Saves a tokenizer that knows five words."""
    known = ["<pad>", "</s>", "<unk>", "draw", "a", "cat", "dog", "now", "cats"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"unk_token": "<unk>", **({"pad_token": pad} if pad else {})}
    PreTrainedTokenizerFast(tokenizer_object=backend, **marks).save_pretrained(folder)


# ---- what tells them apart


def test_the_fingerprint_follows_weights_and_whatever_else_the_states_depend_on():
    known = {small("t5").fingerprint(), small("t5").fingerprint()}
    other = small("t5")
    next(other.parameters()).data.add_(1)
    told = [other, small("t5", padding="read"), small("t5", heads=4), small("qwen")]
    assert len(known | {text.fingerprint() for text in told}) == 5


def test_several_encoders_are_told_apart_if_each_is():
    one, two = small("t5"), small("siglip")
    assert Joined([one, two]).fingerprint() != Joined([two, one]).fingerprint()
    foreign = torch.nn.Linear(2, 2)
    foreign.field, foreign.width, foreign.length = "caption", 2, 3
    assert Joined([one, foreign]).fingerprint() is None


# ---- small ones


@every
def test_a_small_encoder_gives_a_sequence(name):
    text = small(name)
    ids = text.ids(["a red cat", "apple"])
    assert ids.shape == (2, 8) and text(ids).shape == (2, 8, text.width)
    assert text.vocabulary == clip_tokenizer().used(CAPTIONS) and text.field == "caption"
    assert text.model.get_input_embeddings().num_embeddings == len(text.vocabulary)
    with pytest.raises(PartError, match="`zebra` never occurred in training"):
        text.ids(["a zebra"])


@every
def test_a_small_encoder_is_trained_and_traces_as_one_graph(name):
    text = small(name)
    ids = text.ids(CAPTIONS)
    whole = torch.compile(text, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(ids), text(ids))
    text(ids).square().sum().backward()
    assert all(p.grad is not None for p in text.parameters())


@every
def test_mixed_precision_trains(name):
    text = small(name)
    with torch.autocast("cpu", torch.bfloat16):
        states = text(text.ids(CAPTIONS))
    states.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in text.parameters())


@every
def test_a_gradient_needs_no_number_of_the_ids(name):
    """As when a step is measured: tensors have shapes alone."""
    text = small(name)

    def total(table):
        table = {"model." + n: p for n, p in table.items()}
        return torch.func.functional_call(text, table, torch.zeros(2, 8).long()).sum()

    table = dict(text.model.named_parameters())
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert torch.func.grad(total)(table).keys() == table.keys()


@every
def test_a_width_that_heads_do_not_divide_is_told(name):
    with pytest.raises(PartError, match="a width of 16 cannot be split over"):
        small(name, heads=3)


@pytest.mark.parametrize("name", ["t5", "qwen"])
def test_padding_is_hidden_and_its_states_are_zero(name):
    text = small(name)
    short, long = small(name, length=5), text.ids(["a cat"])
    states = text(long)
    torch.testing.assert_close(short(short.ids(["a cat"]))[:, :3], states[:, :3])
    assert states[:, :3].abs().sum(2).all() and states[:, 3:].abs().sum() == 0
    assert text(text.ids([""])).abs().sum() > 0


def test_padding_may_be_read():
    text = small("t5", padding="read")
    assert text(text.ids(["a cat"])).abs().sum(2).all()


# ---- pretrained ones


def saved_t5(folder):
    pairs = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -1.0)]
    tokens = T5Tokenizer([*pairs, ("▁cat", -1.0)], extra_ids=0)
    small("t5").model.save_pretrained(folder / "text_encoder")
    tokens.save_pretrained(folder / "tokenizer")


def test_t5_answers_as_transformers_does(tmp_path):
    saved_t5(tmp_path)
    text = t5(weights=str(tmp_path), length=5)
    ids = text.ids(["a cat", "a cat a cat a cat"])
    assert ids.tolist() == [[4, 5, 1, 0, 0], [4, 5, 4, 5, 1]]
    model = T5EncoderModel.from_pretrained(tmp_path / "text_encoder")
    expected = model(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    torch.testing.assert_close(text(ids), expected * (ids != 0)[..., None])
    assert (text.width, text.vocabulary, facts(tmp_path, ["text"])) == (
        16,
        [],
        {"text": {"width": 16}},
    )


def test_another_place_in_a_folder_is_read(tmp_path):
    saved_t5(tmp_path)
    for sub in ("text_encoder", "tokenizer"):
        (tmp_path / sub).rename(tmp_path / f"{sub}_3")
    text = t5(weights=str(tmp_path), place=3, padding="read")
    assert text(text.ids(["a cat"])).shape == (1, 77, 16)


def test_siglip_answers_as_transformers_does(tmp_path):
    made = small("siglip").model
    made.head = torch.nn.Linear(16, 16)
    made.save_pretrained(tmp_path)
    words(tmp_path)
    text = siglip(weights=str(tmp_path))
    ids = text.ids(["a cat"])
    assert ids.tolist() == [[4, 5, *[0] * 6]]  # its own length
    model = SiglipTextModel.from_pretrained(tmp_path)
    torch.testing.assert_close(text(ids), model(input_ids=ids).last_hidden_state)


def saved_qwen(folder):
    """A whole Qwen2.5-VL, pictures and all, with a tokenizer of words."""
    torch.manual_seed(0)
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    text = small("qwen").model.config.to_dict() | {"vocab_size": 16, "rope_parameters": rope}
    config = Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "intermediate_size": 16})
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder / "text_encoder")
    words(folder / "tokenizer")


def test_the_language_model_answers_as_transformers_does(tmp_path):
    saved_qwen(tmp_path)
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "text_encoder")
    plain = qwen(weights=str(tmp_path), length=4)
    framed = qwen(weights=str(tmp_path), length=4, template="draw {} now")
    ids = torch.tensor([[3, 4, 5, 7]])
    expected = whole.model(input_ids=ids).last_hidden_state
    assert framed.ids(["a cat"]).tolist() == [[4, 5, 7, 0]]
    torch.testing.assert_close(framed(framed.ids(["a cat"]))[:, :3], expected[:, 1:])
    torch.testing.assert_close(plain(plain.ids(["draw a cat now"])), expected)
    assert framed(framed.ids(["a cat"]))[:, 3:].abs().sum() == 0
    assert torch.isfinite(plain(plain.ids([""]))).all()
    assert facts(tmp_path, ["text"]) == {"text": {"width": 16}}
    assert not any("visual" in name for name, _ in plain.named_parameters())


def test_a_template_needs_its_place_and_its_tokenizer(tmp_path):
    with pytest.raises(PartError, match="`template` needs one {} where the prompt stands"):
        qwen(weights=str(tmp_path), template="draw")
    with pytest.raises(PartError, match="a random text encoder knows no `template`"):
        small("qwen", template="draw {}")


@pytest.mark.parametrize("name, saved", [("t5", saved_t5), ("qwen", saved_qwen)])
def test_pretrained_encoders_are_frozen_unless_trained(tmp_path, name, saved):
    saved(tmp_path)
    frozen, tuned = (MAKERS[name](weights=str(tmp_path), train=train) for train in (False, True))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in tuned.parameters())


@every
def test_another_model_is_refused(tmp_path, name):
    clip(layers=1, width=16, heads=2).model.save_pretrained(tmp_path)
    words(tmp_path)
    with pytest.raises(PartError, match="holds `clip_text_model`: give a folder with"):
        MAKERS[name](weights=str(tmp_path))


# ---- their tokenizers


def test_long_texts_are_cut_and_that_is_said_once(tmp_path):
    words(tmp_path)
    said = []
    ids = pieces(str(tmp_path), "tokenizer", say=said.append)(["a cat a dog", "a dog a cat"], 3)
    assert ids.tolist() == [[4, 5, 4], [4, 6, 4]]
    assert said == ["`a cat a dog...` has 4 tokens and 3 fit: such texts are cut"]


def test_tokenizers_that_cannot_be_read_are_told(tmp_path):
    with pytest.raises(PartError, match="has no tokenizer: save the encoder's tokenizer in `tok"):
        pieces(str(tmp_path), "tokenizer")
    words(tmp_path, pad="")
    with pytest.raises(PartError, match="has no padding: save it with a `pad_token`"):
        pieces(str(tmp_path), "tokenizer")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(PartError, match="cannot read the tokenizer"):
        pieces(str(tmp_path), "tokenizer")


# ---- class labels


def test_names_and_numbers_become_classes():
    made = label(field="group", count=4, vocabulary=["animals", "flags", "food"])
    assert made.ids(["food", "animals", " flags ", "", "3"]).tolist() == [[2], [0], [1], [4], [3]]
    assert made.ids([]).shape == (0, 1)
    assert (made.classes, made.width, made.length, made.field) == (4, 0, 1, "group")
    assert made.vocabulary == ["animals", "flags", "food"] and not list(made.parameters())
    ids = made.ids(["food"])
    assert made(ids) is ids


def test_numbers_stand_for_themselves_whatever_their_order():
    made = label(count=20, vocabulary=["0", "1", "10", "2"])
    assert made.ids(["10", "2", 7]).tolist() == [[10], [2], [7]]


def test_what_is_no_class_is_told():
    made = label(field="group", count=3, vocabulary=["animals", "flags"])
    with pytest.raises(PartError, match="`animal` is no class of `group`: did you mean `animals`"):
        made.ids(["animal"])
    with pytest.raises(PartError, match="`cars` is no class of `group`: use `animals`, `flags`"):
        made.ids(["cars"])
    with pytest.raises(PartError, match="`9` is no class of `label`: use 0 to 2, or raise `count`"):
        label(count=3).ids(["9"])
    with pytest.raises(PartError, match="`4` is no class"):
        made.check(torch.tensor([[4]]))
    with pytest.raises(PartError, match="`label` has 3 values and `count` is 2: set `count = 3`"):
        label(count=2, vocabulary=["a", "b", "c"])


# ---- several as one


def joined(**options):
    parts = tuple(Part("encoder", name, {**SMALL, **options}) for name in ("clip", "t5"))
    return build(parts, vocabulary=clip_tokenizer().used(CAPTIONS))


def test_sequences_follow_each_other_and_widths_are_filled_up():
    wide, narrow = small("t5", width=20, length=6), small("siglip")
    both = Joined([wide, narrow])
    ids = both.ids(CAPTIONS)
    assert ids.shape == (2, 14) and (both.length, both.width) == (14, 20)
    states = both(ids)
    torch.testing.assert_close(states[:, :6], wide(wide.ids(CAPTIONS)))
    torch.testing.assert_close(states[:, 6:, :16], narrow(narrow.ids(CAPTIONS)))
    assert states[:, 6:, 16:].abs().sum() == 0
    null = torch.cat([wide.ids([""]), narrow.ids([""])], dim=1)
    assert torch.equal(both.ids([""]), null)


def test_a_list_of_parts_is_one_encoder():
    both = joined(train=True)
    assert both.vocabulary == clip_tokenizer().used(CAPTIONS) and both.field == "caption"
    whole = torch.compile(both, fullgraph=True, backend="eager")
    ids = both.ids(CAPTIONS)
    torch.testing.assert_close(whole(ids), both(ids))
    with pytest.raises(PartError, match="`zebra` never occurred in training"):
        both.ids(["zebra"])


def test_each_of_a_list_is_trained_if_it_says_so():
    part = Part("encoder", "clip", {**SMALL, "train": True}), Part("encoder", "t5", SMALL)
    first, second = build(part, vocabulary=[320]).encoders
    assert all(p.requires_grad for p in first.parameters())
    assert not any(p.requires_grad for p in second.parameters())


def test_a_backbone_reads_a_list():
    parts = tuple(Part("encoder", name, SMALL) for name in ("clip", "t5"))
    unet = {"channels": (8, 8), "layers": 1, "heads": 2, "groups": 4, "text": parts}
    net = build(Part("backbone", "sd_unet", unet))
    assert net.module.config.cross_attention_dim == 16


def test_encoders_that_cannot_be_joined_are_told():
    with pytest.raises(PartError, match="class labels cannot be joined with other encoders"):
        Joined([small("t5"), label()])
    other = small("siglip")
    other.field = "title"
    with pytest.raises(PartError, match="the encoders read `caption` and `title`"):
        Joined([small("t5"), other])


def test_the_configuration_of_a_saved_encoder_is_read_without_torch(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 24}))
    assert facts(tmp_path, ["text"]) == {"text": {"width": 24}}
