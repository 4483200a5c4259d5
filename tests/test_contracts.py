"""The contract of batches and modules: what may be given, what wins, and what is called how."""

from types import SimpleNamespace

import pipeline
import pytest
import torch
from conftest import declare
from PIL import Image
from torch import nn

import difftrain
from difftrain.models.codec import autoencoder_kl
from difftrain.models.text import clip
from difftrain.training.batches import once, warn
from difftrain.training.contract import Framed
from difftrain.training.sources import DataError

DDPM = "process = ddpm\nprediction_type = epsilon"
T = torch.tensor([10, 900])


class Recorder(nn.Module):
    """A module that remembers how it was called; `wrap` is what its library answers with."""

    def __init__(self, module, wrap=lambda x: x):
        super().__init__()
        self.module, self.wrap, self.calls = module, wrap, []

    def forward(self, *args):
        self.calls.append(args)
        return self.wrap(self.module(*args))


class Codec:
    """A codec that counts its pictures; without a `config` its latents are as they are."""

    def __init__(self):
        self.seen = 0

    def encode(self, image):
        self.seen += len(image)
        return (image.mean(1, keepdim=True).repeat(1, 4, 1, 1)[..., ::2, ::2],)


def objective(network, strategy: str = ""):
    return declare(f"{DDPM}\nstrategy = [{strategy}]", network)


@pytest.fixture
def network():
    return Recorder(lambda x, t, cond=None: 0.5 * x + (0 if cond is None else cond.mean()))


@pytest.fixture
def batch():
    made = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(2, 3, 16, 16, generator=made) * 2 - 1,
        "latents": torch.randn(2, 4, 8, 8, generator=made),
        "timesteps": T,
        "input_ids": torch.randint(0, 99, (2, 8), generator=made),
        "metadata": ["one", "two"],
    }


def only(batch: dict, *names: str) -> dict:
    return {name: batch[name] for name in names}


def said_by(call) -> list[str]:
    said = []
    call(said.append)
    return said


# ---- latents and image


def test_given_latents_win_and_the_codec_is_not_called(network, batch):
    codec = Codec()
    both, latents = only(batch, "image", "latents"), only(batch, "latents")
    said = said_by(lambda say: difftrain.batch_loss(objective(network), both, codec=codec, say=say))
    assert said == ["the batch has `latents`: they win over `image`, and the codec is not called"]
    assert codec.seen == 0
    first, second = (
        difftrain.batch_loss(objective(network), b, codec=codec) for b in (both, latents)
    )
    torch.testing.assert_close(first, second)


def test_without_latents_the_codec_is_called(network, batch):
    codec = Codec()
    loss = difftrain.batch_loss(objective(network), only(batch, "image"), codec=codec)
    latents = {"latents": codec.encode(batch["image"])[0]}
    torch.testing.assert_close(loss, difftrain.batch_loss(objective(network), latents))
    assert network.calls[0][0].shape == (2, 4, 8, 8) and codec.seen == 4


def test_without_a_codec_the_pictures_are_the_data(network, batch):
    assert difftrain.batch_loss(objective(network), only(batch, "image")).shape == (2,)
    assert network.calls[0][0].shape == (2, 3, 16, 16)


def test_pictures_may_be_paths(network, tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (20, 20), (255, 0, 0)).save(path)
    difftrain.batch_loss(objective(network), {"image": [path, path]}, size=16)
    assert network.calls[0][0].shape == (2, 3, 16, 16)


def test_a_batch_with_nothing_to_train_on_is_told(network, batch):
    with pytest.raises(DataError, match="neither `latents` nor `image`: add one of them"):
        difftrain.batch_loss(objective(network), only(batch, "timesteps"))


# ---- timesteps


def test_given_timesteps_win_over_drawn_ones(network, batch):
    given = only(batch, "latents", "timesteps")
    said = said_by(lambda say: difftrain.batch_loss(objective(network), given, say=say))
    assert said == ["the batch has `timesteps`: they win, and none are drawn"]
    assert network.calls[0][1].tolist() == [10, 900]


def test_absent_timesteps_are_drawn_anew_at_every_step(network, batch):
    for step in (0, 1):
        difftrain.batch_loss(objective(network), only(batch, "latents"), step=step)
    first, second = (call[1] for call in network.calls)
    assert first.tolist() != second.tolist() and max(*first, *second) < 1000


def test_given_timesteps_win_over_redefinitions(network, batch):
    made = declare(f"{DDPM}\nt' = 999 - t", network)
    difftrain.batch_loss(made, only(batch, "latents", "timesteps"))
    assert network.calls[0][1].tolist() == [10, 900]


# ---- text


def test_the_network_is_called_with_latents_times_and_states(network, batch):
    text = Recorder(lambda ids: ids[..., None].expand(-1, -1, 16).float())
    difftrain.batch_loss(objective(network), batch, text=text)
    ((noisy, timesteps, states),) = network.calls
    assert noisy.shape == (2, 4, 8, 8) and timesteps is not None
    assert torch.equal(states, text.module(batch["input_ids"]))
    assert len(text.calls) == 1  # nothing is dropped, so the empty text is not read


def test_an_encoder_needs_ids(network, batch):
    with pytest.raises(DataError, match="the objective reads `input_ids`: add it"):
        difftrain.batch_loss(objective(network), only(batch, "latents"), text=network)


def test_ids_without_an_encoder_are_not_read(network, batch):
    ids = only(batch, "latents", "input_ids")
    said = said_by(lambda say: difftrain.batch_loss(objective(network), ids, say=say))
    assert said == ["the batch has `input_ids`, and no `text` is given to read them"]
    assert network.calls[0][2] is None


def test_dropped_rows_get_the_empty_text(network, batch):
    text = Recorder(lambda ids: ids[..., None].expand(-1, -1, 16).float())
    null = torch.full((1, 8), 7)
    made = objective(network, "drop_condition(1)")
    difftrain.batch_loss(made, {**batch, "null_ids": null}, text=text)
    assert torch.equal(network.calls[0][2], text.module(null).expand(2, -1, -1))


def test_the_empty_text_is_asked_for(network, batch):
    with pytest.raises(DataError, match="no `null_ids`: add the token ids of the empty text"):
        made = objective(network, "drop_condition(0.1)")
        difftrain.batch_loss(made, batch, text=lambda ids: ids[..., None].float())


def test_our_encoders_know_the_empty_text(network, batch):
    text = clip(layers=1, width=16, heads=2, length=8)
    made = objective(network, "drop_condition(1)")
    difftrain.batch_loss(made, batch, text=text)
    torch.testing.assert_close(network.calls[0][2][1], text(text.ids([""]))[0])


# ---- the rest of a batch


def test_metadata_changes_nothing(network, batch):
    with_notes, without = only(batch, "latents", "metadata"), only(batch, "latents")
    first, second = (difftrain.batch_loss(objective(network), b) for b in (with_notes, without))
    torch.testing.assert_close(first, second)


def test_the_index_keys_the_draws(network, batch):
    latents = only(batch, "latents")
    plain = difftrain.batch_loss(objective(network), latents)
    same = difftrain.batch_loss(objective(network), {**latents, "index": torch.arange(2)})
    other = difftrain.batch_loss(objective(network), {**latents, "index": torch.arange(2, 4)})
    torch.testing.assert_close(plain, same)
    assert (plain - other).abs().min() > 1e-6


def test_a_batch_may_be_an_object(network, batch):
    fields = SimpleNamespace(**only(batch, "latents", "timesteps"))
    mapping = only(batch, "latents", "timesteps")
    first, second = (difftrain.batch_loss(objective(network), b) for b in (fields, mapping))
    torch.testing.assert_close(first, second)


def test_what_wins_is_said_once(network, batch, caplog):
    say = once(warn)
    for step in range(3):
        difftrain.batch_loss(objective(network), batch, step=step, say=say)
    assert len(caplog.messages) == len(set(caplog.messages)) == 3


# ---- modules of other libraries


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x, "more"), lambda x: [x], lambda x: SimpleNamespace(sample=x)],
    ids=["tensor", "tuple", "list", "sample"],
)
def test_networks_may_answer_in_any_form(network, batch, wrap):
    plain = difftrain.batch_loss(objective(network), batch)
    wrapped = Recorder(network.module, wrap)
    torch.testing.assert_close(difftrain.batch_loss(objective(wrapped), batch), plain)


@pytest.fixture(scope="module")
def modules():
    torch.manual_seed(0)
    return pipeline.unet(), pipeline.vae().eval(), pipeline.text_encoder(100)


def test_diffusers_and_transformers_modules_are_used_as_they_are(modules, batch):
    unet, vae, text = modules
    made = objective(unet, "drop_condition(0.1)")
    given = {**only(batch, "image", "input_ids", "timesteps"), "null_ids": torch.full((1, 8), 99)}
    loss = difftrain.batch_loss(made, given, codec=vae, text=text)
    loss.mean().backward()
    assert loss.shape == (2,) and loss.isfinite().all()
    assert all(
        p.grad is not None for p in (unet.conv_in.weight, text.get_input_embeddings().weight)
    )
    assert vae.encoder.conv_in.weight.grad is None
    unet.zero_grad(), text.zero_grad()


def test_they_give_what_their_own_loop_gives(modules, batch):
    """Written out with the libraries' calls alone."""
    unet, vae, text = modules
    given = only(batch, "image", "input_ids", "timesteps")
    made = objective(unet)
    noise = made.sample_n((2, 4, 8, 8))
    with torch.no_grad():
        latents = (vae.encode(batch["image"]).latent_dist.mode() - 0.1) * 0.18215
        states = text(batch["input_ids"]).last_hidden_state
        noisy = pipeline.DDPMScheduler(**pipeline.SD).add_noise(latents, noise, T)
        wanted = (unet(noisy, T, states).sample - noise).square().mean((1, 2, 3))
        loss = difftrain.batch_loss(made, given, codec=vae, text=text)
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)


def test_our_codec_and_theirs_give_the_same_latents(batch):
    codec = autoencoder_kl(weights="", channels=(4, 8), groups=2)
    torch.testing.assert_close(Framed(codec).encode(batch["image"]), codec.encode(batch["image"]))
    theirs = Framed(codec.model).encode(batch["image"])
    torch.testing.assert_close(theirs, codec.encode(batch["image"]))
