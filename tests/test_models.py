from importlib import import_module

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel
from transformers.modeling_outputs import BaseModelOutput

from difftrain.answer import unwrap
from difftrain.language.part import Part
from difftrain.models import PLACES, build
from difftrain.models.errors import PartError
from difftrain.models.text import TextEncoder, clip
from difftrain.models.tokenizer import END, START, clip_tokenizer
from difftrain.models.unet import sd_unet

TEXT = {"layers": 2, "width": 16, "heads": 2, "length": 8}
UNET = {"channels": (8, 16), "layers": 1, "heads": 2, "groups": 4, "size": 8}
CODEC = {"weights": "", "channels": (4, 8), "groups": 2, "latent": 3}
CAPTIONS = ["a photo of a cat", "a red apple"]


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    return clip(**TEXT, vocabulary=clip_tokenizer().used(CAPTIONS))


@pytest.fixture(scope="module")
def unet(text):
    torch.manual_seed(0)
    return sd_unet(**UNET, text=text)


# ---- parts by name


@pytest.mark.parametrize("name", PLACES)
def test_every_builder_is_there(name):
    assert callable(getattr(import_module(f"difftrain.models.{PLACES[name]}"), name))


@pytest.mark.parametrize(
    "kind, module, options",
    [("codec", "autoencoder_kl", CODEC), ("encoder", "clip", TEXT), ("backbone", "sd_unet", UNET)],
)
def test_a_part_becomes_a_module(kind, module, options):
    assert isinstance(build(Part(kind, module, options)), nn.Module)


def test_nested_parts_are_built_and_give_the_sizes():
    nested = {
        "codec": Part("codec", "autoencoder_kl", CODEC),
        "text": Part("encoder", "clip", TEXT),
    }
    config = build(Part("backbone", "sd_unet", {**UNET, **nested})).module.config
    assert (config.in_channels, config.out_channels, config.cross_attention_dim) == (3, 3, 16)


def test_context_wins_over_options(text):
    part = Part("backbone", "sd_unet", {**UNET, "text": Part("encoder", "clip", {})})
    assert build(part, text=text).module.config.cross_attention_dim == text.width


def test_misspelt_names_are_told():
    with pytest.raises(PartError, match="no backbone called `sd_unt`: did you mean `sd_unet`"):
        build(Part("backbone", "sd_unt", {}))
    with pytest.raises(PartError, match="`clip` has no option `widht`: did you mean `width`"):
        build(Part("encoder", "clip", {"widht": 3}))
    with pytest.raises(PartError, match="no codec called `xyz`: use one of adapted, auto"):
        build(Part("codec", "xyz", {}))


# ---- the backbone


@pytest.mark.parametrize("weights", ["", "saved"])
def test_the_unet_calls_like_diffusers(tmp_path, unet, text, weights):
    if weights:
        unet.module.save_pretrained(tmp_path / "unet")
        unet = sd_unet(weights=str(tmp_path), text=text)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 400.0]), torch.randn(2, 8, 16)
    expected = unet.module(x, t, encoder_hidden_states=cond).sample
    torch.testing.assert_close(unet(x, t, cond), expected)


def test_saved_weights_come_back(tmp_path, unet):
    unet.module.save_pretrained(tmp_path)
    loaded = sd_unet(weights=str(tmp_path)).module.state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in unet.module.state_dict().items())


def test_real_times_are_scaled(unet, text):
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([0.25, 0.5]), torch.randn(2, 8, 16)
    scaled = sd_unet(**UNET, text=text, time_scale=1000)
    scaled.load_state_dict(unet.state_dict())
    torch.testing.assert_close(scaled(x, t, cond), unet(x, t * 1000, cond))


def test_parts_trace_as_one_graph(unet, text):
    ids = text.ids(CAPTIONS)
    whole = torch.compile(
        lambda x, t, ids: unet(x, t, text(ids)), fullgraph=True, backend="aot_eager"
    )
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.25, 0.5])
    torch.testing.assert_close(whole(x, t, ids), unet(x, t, text(ids)))
    whole(x, t, ids).square().mean().backward()
    assert all(p.grad is not None for p in unet.parameters())
    assert text.model.get_input_embeddings().weight.grad is not None


def test_without_options_it_is_stable_diffusion_1():
    with torch.device("meta"):
        model = sd_unet().module
    ours = {k: v for k, v in model.config.items() if not k.startswith("_")}
    count = sum(p.numel() for p in model.parameters())
    assert count == 859_520_964  # as published
    # list or number, the heads are eight everywhere
    assert ours.pop("attention_head_dim") == (8, 8, 8, 8)
    theirs = {"sample_size": 64, "cross_attention_dim": 768, "layers_per_block": 2}
    theirs |= {"block_out_channels": (320, 640, 1280, 1280), "in_channels": 4, "out_channels": 4}
    assert theirs.items() <= ours.items()


def test_text_reaches_the_levels_that_are_named():
    config = sd_unet(**{**UNET, "channels": (8, 8, 16)}, attention=[1]).module.config
    assert config.down_block_types == ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    assert config.up_block_types == ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"groups": 3}, "8 channels cannot be split into 3 groups: use a multiple of 3"),
        ({"heads": 5}, "8 channels cannot be split into 5 heads"),
        ({"heads": [2]}, "`heads` has 1 numbers for 2 levels: give one for each"),
        (
            {"attention": [2]},
            "`attention` lists level 2, and 2 `channels` make the levels 0 to 1",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_told(options, said):
    with pytest.raises(PartError, match=said):
        sd_unet(**{**UNET, **options})


def test_pretrained_parts_must_fit_each_other(tmp_path, unet, text):
    unet.module.save_pretrained(tmp_path / "unet")
    codec = build(Part("codec", "autoencoder_kl", CODEC))
    with pytest.raises(PartError, match="takes 4 latent channels, but the codec makes 3"):
        sd_unet(weights=str(tmp_path), codec=codec)
    with pytest.raises(PartError, match="reads text of width 16, but the text encoder gives 32"):
        sd_unet(weights=str(tmp_path), text=clip(**{**TEXT, "width": 32}, vocabulary=[320]))


# ---- the text encoder


def test_the_small_encoder_gives_a_sequence(text):
    ids = text.ids(["a red cat", "apple"])
    assert ids.shape == (2, 8) and text(ids).shape == (2, 8, text.width)


def test_the_table_is_cut_and_nothing_else_changes(text):
    assert text.vocabulary == clip_tokenizer().used(CAPTIONS)
    assert text.model.get_input_embeddings().num_embeddings == len(text.vocabulary) == 8
    whole = clip(**TEXT)
    cut, full = (e.model.get_input_embeddings().weight for e in (text, whole))
    rest = {k: v for k, v in text.model.state_dict().items() if "token_embedding" not in k}
    whole.model.load_state_dict(rest, strict=False)
    with torch.no_grad():
        full[text.vocabulary] = cut
    ids = text.ids(CAPTIONS)
    torch.testing.assert_close(whole(ids), text(ids))


def test_words_that_training_never_saw_are_named(text):
    with pytest.raises(PartError, match="`zebra`, `yellow` never occurred in training"):
        text.ids(["a red zebra", "yellow zebra"])
    clip(**TEXT).check(torch.tensor([[START, 1, END]]))


def test_the_small_encoder_is_trained_and_the_pretrained_one_frozen(tmp_path, text):
    clip(**TEXT).model.save_pretrained(tmp_path / "text_encoder")
    frozen, tuned = (clip(weights=str(tmp_path), train=train) for train in (False, True))
    assert all(p.requires_grad for p in [*text.parameters(), *tuned.parameters()])
    assert not any(p.requires_grad for p in frozen.parameters())
    assert (frozen.width, frozen.length, frozen.vocabulary) == (16, 8, [])


def test_a_pretrained_encoder_answers_as_transformers_does(tmp_path):
    saved = clip(**TEXT).model
    saved.half().save_pretrained(tmp_path)
    text = clip(weights=str(tmp_path))
    ids = text.ids(["anything at all"])
    expected = CLIPTextModel.from_pretrained(tmp_path).float()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(text(ids), expected)
    assert text(ids).dtype == torch.float32


def test_checkpoints_of_earlier_years_load_whole(tmp_path):
    saved = clip(**TEXT).model
    saved.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    # every name began with text_model, and the positions were a tensor
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(path).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(8)[None]
    save_file(state, path, metadata={"format": "pt"})
    text = clip(weights=str(tmp_path))
    ids = text.ids(["a cat"])
    torch.testing.assert_close(text(ids), saved(input_ids=ids).last_hidden_state)


def test_a_width_that_heads_do_not_divide_is_told():
    with pytest.raises(PartError, match="a width of 16 cannot be split over 3 heads"):
        clip(**{**TEXT, "heads": 3})


# ---- foreign modules


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: (y, None),
        lambda y: BaseModelOutput(last_hidden_state=y),
        lambda y: AutoencoderKLOutput(
            latent_dist=DiagonalGaussianDistribution(torch.cat([y, y], 1))
        ),
    ],
)
def test_foreign_answers_are_reduced_to_their_tensor(wrap):
    answer = torch.randn(2, 4, 3, 3)
    assert torch.equal(unwrap(wrap(answer)), answer)


def test_other_answers_are_told():
    with pytest.raises(TypeError, match="a module answered with str: return a tensor"):
        unwrap("no tensor")
    with pytest.raises(TypeError, match="a module answered with tuple"):
        unwrap(())


def test_a_foreign_encoder_is_framed():
    class Table(nn.Embedding):
        def forward(self, input_ids):
            return (super().forward(input_ids),)

    framed = TextEncoder(Table(49_408, 4), clip_tokenizer(), width=4, length=5)
    assert framed(framed.ids(["a cat"])).shape == (1, 5, 4)


def test_a_diffusers_unet_is_a_network_as_it_is(unet):
    assert isinstance(unet.module, UNet2DConditionModel)
    x, t, cond = torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 8, 16)
    assert unwrap(unet.module(x, t, cond)).shape == x.shape


@pytest.mark.parametrize("condition", ["text", "classes"])
def test_products_arranged_anew_change_nothing(condition):
    """One product for q, k and v, two for the halves of a gated layer."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    from difftrain.models.labels import Labels
    from difftrain.models.processor import Gated, OneProduct

    text = Labels(5, [], "label") if condition == "classes" else None
    shape = dict(channels=[32, 64], layers=1, heads=2, attention=[0], groups=8, size=64, text=text)
    torch.manual_seed(0)
    network = sd_unet(**shape).double()
    x, t = torch.randn(2, 4, 8, 8).double(), torch.tensor([3.0, 700.0]).double()
    cond = torch.tensor([[1], [4]]) if text else torch.randn(2, 5, 768).double()
    looking = [m for m in network.modules() if isinstance(m, Attention)]
    assert looking and all(type(m.processor) is OneProduct for m in looking)
    ours = network(x, t, cond)
    gradients = torch.autograd.grad(ours.square().sum(), list(network.parameters()))
    for module in looking:
        module.set_processor(AttnProcessor2_0())
    gated = [(m, n) for m in network.modules() for n, c in m.named_children() if type(c) is Gated]
    assert bool(gated) == (condition == "text")
    for parent, name in gated:
        proj = parent.get_submodule(name).proj
        setattr(parent, name, GEGLU(proj.in_features, proj.out_features // 2).double())
        parent.get_submodule(name).proj = proj
    theirs = network(x, t, cond)
    expected = torch.autograd.grad(theirs.square().sum(), list(network.parameters()))
    assert torch.allclose(ours, theirs, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(gradients, expected, strict=True))
