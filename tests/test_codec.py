import json
import subprocess
import sys
import zipfile
from collections import defaultdict
from io import BytesIO
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from PIL import Image
from torch import nn

from difftrain.models.codec import Codec, autoencoder_kl
from difftrain.models.errors import PartError
from difftrain.training.sources import open_source

ROOT = Path(__file__).parent.parent
SMALL = {"weights": "", "channels": (8, 16), "groups": 4}


@pytest.fixture(scope="module")
def shipped():
    return autoencoder_kl()


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return autoencoder_kl(**SMALL)


def signed(images):
    return torch.stack(images).float() / 127.5 - 1


def psnr(y, x):
    return -10 * torch.log10(((y.clamp(-1, 1) - x) ** 2).mean(dim=(1, 2, 3)) / 4)


@torch.no_grad()
def test_the_shipped_codec_restores_pictures_it_never_saw(shipped):
    held = open_source("emoji64", split="test")
    x = signed([held.image(i, 64) for i in range(len(held))])
    found = defaultdict(list)
    values = psnr(shipped.decode(shipped.encode(x)), x).tolist()
    for record, value in zip(held.records, values, strict=True):
        found[record.fields["style"]].append(value)
    means = {style: sum(v) / len(v) for style, v in found.items()}
    assert len(held) == 68 and set(means) == {"3d", "flat", "noto"}
    assert all(mean >= 24 for mean in means.values()), means
    # docs/codec.md
    assert means == pytest.approx({"3d": 29.96, "flat": 30.82, "noto": 25.36}, abs=0.1)


@torch.no_grad()
def test_shipped_latents_have_unit_deviation(shipped):
    seen = open_source("emoji64")
    z = shipped.encode(signed([seen.image(i, 64) for i in range(0, len(seen), 9)]))
    assert z.shape[1:] == shipped.shape(64) == (4, 8, 8)
    assert z.std().item() == pytest.approx(1, abs=0.05)
    assert z.mean().item() == pytest.approx(0, abs=0.05)


def test_the_shipped_file_is_small_and_has_no_pickle():
    folder = ROOT / "difftrain" / "models" / "emoji64"
    assert {f.name: f.stat().st_size < 4_000_000 for f in folder.iterdir()} == {
        "config.json": True,
        "diffusion_pytorch_model.safetensors": True,
    }


def test_a_codec_is_frozen_and_stays_in_evaluation(shipped):
    assert not any(p.requires_grad for p in shipped.parameters())
    assert not shipped.train().model.training
    assert {p.dtype for p in shipped.parameters()} == {torch.float32}


def test_shapes_and_sampling(small):
    x, noise = torch.rand(2, 3, 8, 8), torch.randn(2, 4, 4, 4)
    law = small.model.encode(x).latent_dist
    torch.testing.assert_close(small.encode(x), law.mean)
    torch.testing.assert_close(small.encode(x, noise), law.mean + law.std * noise)
    assert small.decode(law.mean).shape == x.shape
    assert (small.channels, small.factor, small.shape(8)) == (4, 2, (4, 4, 4))


@pytest.mark.parametrize("where", ["", "vae"])
def test_a_pretrained_folder_brings_scale_and_shift(tmp_path, small, where):
    small.model.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    small.model.save_pretrained(tmp_path / where)
    small.model.register_to_config(scaling_factor=1.0, shift_factor=None)
    loaded = autoencoder_kl(weights=str(tmp_path))
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(loaded.encode(x), (small.encode(x) - 0.25) * 0.5)
    torch.testing.assert_close(loaded.decode(loaded.encode(x)), small.decode(small.encode(x)))
    assert (loaded.scale.item(), loaded.shift.item()) == (0.5, 0.25)


def test_statistics_of_every_channel_are_used(tmp_path, small):
    mean, std = [0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 4.0, 8.0]
    small.model.register_to_config(latents_mean=mean, latents_std=std)
    small.model.save_pretrained(tmp_path)
    small.model.register_to_config(latents_mean=None, latents_std=None)
    loaded, x = autoencoder_kl(weights=str(tmp_path)), torch.rand(1, 3, 8, 8)
    plain = (small.encode(x) - torch.tensor(mean).view(4, 1, 1)) / torch.tensor(std).view(4, 1, 1)
    torch.testing.assert_close(loaded.encode(x), plain)


def test_half_precision_files_are_loaded_in_full(tmp_path, small):
    small.model.half().save_pretrained(tmp_path)
    small.model.float()
    assert autoencoder_kl(weights=str(tmp_path)).model.dtype == torch.float32


def test_wrong_pictures_are_told(small):
    with pytest.raises(PartError, match=r"a picture batch \[B, 3, height, width\], not \[2, 1, 8"):
        small.encode(torch.zeros(2, 1, 8, 8))
    with pytest.raises(PartError, match="multiples of 2, not 7 x 8: change `size`"):
        small.encode(torch.zeros(1, 3, 8, 7))
    with pytest.raises(PartError, match="multiples of 2, not 9 x 9"):
        small.shape(9)
    with pytest.raises(PartError, match=r"a latent batch \[B, 4, .*not \[1, 3, 4, 4\]"):
        small.decode(torch.zeros(1, 3, 4, 4))


def test_the_fingerprint_follows_weights_and_scale(shipped):
    one, two = (Codec(nn.Conv2d(1, 1, 1), channels=1, factor=1) for _ in range(2))
    two.model.load_state_dict(one.model.state_dict())
    assert one.fingerprint() == two.fingerprint() != shipped.fingerprint()
    two.scale.mul_(2)
    assert one.fingerprint() != two.fingerprint()


class Fold(nn.Module):
    """A codec of someone else's, whose answers are objects."""

    def encode(self, image):
        return (nn.functional.pixel_unshuffle(image, 2),)

    def decode(self, latents):
        return DecoderOutput(sample=nn.functional.pixel_shuffle(latents, 2))


def test_foreign_codecs_may_answer_with_tuples_and_objects():
    codec, x = Codec(Fold(), channels=12, factor=2, scale=2.0, shift=0.5), torch.rand(1, 3, 4, 4)
    assert codec.encode(x).shape == (1, 12, 2, 2)
    torch.testing.assert_close(codec.decode(codec.encode(x)), x)


def emoji_like(path):
    """A zip like the real one: two training pictures and a held-out one in every style."""
    rows = []
    with zipfile.ZipFile(path, "w") as z:
        for i, style in enumerate(["3d", "flat", "noto"] * 3):
            name, split = f"images/{i}.png", "train" if i < 6 else "test"
            picture = BytesIO()
            Image.new("RGB", (64, 64), (25 * i, 128, 255 - 25 * i)).save(picture, "png")
            z.writestr(name, picture.getvalue())
            rows.append({"file_name": name, "style": style, "split": split})
        z.writestr("metadata.jsonl", "\n".join(map(json.dumps, rows)))


def test_the_training_script_writes_a_codec(tmp_path):
    emoji_like(tmp_path / "tiny.zip")
    command = f"--data {tmp_path}/tiny.zip --out {tmp_path}/out --steps 2 --batch 2 --device cpu"
    shape = "--channels 8 16 --groups 4 --latent 2"
    script = [sys.executable, str(ROOT / "tools" / "train_codec.py")]
    subprocess.run([*script, *command.split(), *shape.split()], check=True, capture_output=True)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["steps"] == 2 and set(report["psnr"]) == {"3d", "flat", "noto"}
    assert report["latent_std"] == pytest.approx(1, abs=0.05)
    assert Image.open(tmp_path / "out" / "strip.png").size == (64, 6 * 64)
    codec = autoencoder_kl(weights=str(tmp_path / "out"))
    assert isinstance(codec.model, AutoencoderKL) and codec.shape(64) == (2, 32, 32)
