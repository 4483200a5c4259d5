"""Codecs: pictures to latents and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files

import torch
from torch import Tensor, nn

from difftrain.answer import unwrap
from difftrain.models.errors import PartError
from difftrain.models.fingerprint import fingerprint
from difftrain.models.loading import load
from difftrain.models.pretrained import SHIPPED

FILE = "diffusion_pytorch_model.safetensors"


class Codec(nn.Module):
    """A frozen autoencoder whose latents `(z - shift) * scale` have standard deviation about 1.

    `channels` counts the latents' channels, `pixels` the pictures'; `factor` is the ratio of their
    sides. `scale` and `shift` are tensors, [] or [channels, 1, 1].
    """

    def __init__(
        self, model: nn.Module, *, channels: int, factor: int, scale=1.0, shift=0.0, pixels: int = 3
    ):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.channels, self.factor, self.pixels = channels, factor, pixels
        self.register_buffer("scale", spread(scale))
        self.register_buffer("shift", spread(shift))

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, C, h, w] of pictures [B, 3, H, W] in [-1, 1].

        They are the mean, or with standard normal `noise` [B, C, h, w] a sample.
        """
        self._fits("picture", image, self.pixels, self.factor)
        answer = self.model.encode(image)
        law = getattr(answer, "latent_dist", None)
        sampled = law is not None and noise is not None
        z = law.mean + law.std * noise if sampled else unwrap(answer)
        return (z - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], about [-1, 1], of latents [B, C, h, w]."""
        self._fits("latent", latents, self.channels, 1)
        return unwrap(self.model.decode(latents / self.scale + self.shift))

    def shape(self, size: int) -> tuple[int, int, int]:
        """The latents' shape (C, h, w) of a picture of `size` pixels a side."""
        self._divides(size, size)
        return self.channels, size // self.factor, size // self.factor

    def fingerprint(self) -> str:
        """A hash of all weights, scale and shift: equal for codecs that give equal latents."""
        return fingerprint(self)

    def train(self, mode: bool = True) -> Codec:
        """Itself, in evaluation mode: it is frozen."""
        return super().train(False)

    def _fits(self, what: str, x: Tensor, channels: int, factor: int) -> None:
        if x.dim() != 4 or x.shape[1] != channels:
            raise PartError(
                f"the codec takes a {what} batch [B, {channels}, height, width], "
                f"not {list(x.shape)}"
            )
        if factor > 1:
            self._divides(*x.shape[2:])

    def _divides(self, height: int, width: int) -> None:
        if height % self.factor or width % self.factor:
            raise PartError(
                f"the codec takes pictures whose sides are multiples of {self.factor}, "
                f"not {width} x {height}: change `size`"
            )


class Pixels(Codec):
    """Training on pictures as they are: latents [B, 3, H, W] in [-1, 1] are the picture."""

    def __init__(self):
        super().__init__(nn.Identity(), channels=3, factor=1)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """The pictures [B, 3, H, W]; there is nothing to sample."""
        self._fits("picture", image, self.pixels, 1)
        return image

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], cut to [-1, 1]."""
        self._fits("latent", latents, self.channels, 1)
        return latents.clamp(-1, 1)


def pixels() -> Pixels:
    """The codec that leaves pictures alone."""
    return Pixels()


def spread(value: float | Sequence[float]) -> Tensor:
    """One number as [], one for every channel as [C, 1, 1]."""
    tensor = torch.tensor(value, dtype=torch.float32)
    return tensor.view(-1, 1, 1) if tensor.dim() else tensor


def autoencoder_kl(
    *,
    weights: str = "emoji64",
    channels: Sequence[int] = (64, 64, 72, 80),
    latent: int = 4,
    layers: int = 1,
    groups: int = 8,
) -> Codec:
    """The codec that comes with the package, a pretrained one, or with weights = "" a random one.

    The last four options shape the random one.
    """
    from diffusers import AutoencoderKL

    if weights in SHIPPED:
        return _codec(_shipped(weights))
    if weights:
        return _codec(load(AutoencoderKL, weights, "vae"))
    levels = len(channels)
    return _codec(
        AutoencoderKL(
            block_out_channels=tuple(channels),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=layers,
            latent_channels=latent,
            norm_num_groups=groups,
            scaling_factor=1.0,
        )
    )


def _shipped(name: str) -> nn.Module:
    """Read as resources, since the package may itself stand inside a zip."""
    from diffusers import AutoencoderKL
    from safetensors.torch import load as tensors

    at = files("difftrain.models").joinpath(name)
    model = AutoencoderKL.from_config(json.loads(at.joinpath("config.json").read_text()))
    model.load_state_dict(tensors(at.joinpath(FILE).read_bytes()))
    return model


def _codec(model: nn.Module) -> Codec:
    c = model.config
    scale, shift = statistics(c)
    return Codec(
        model,
        channels=c.latent_channels,
        factor=2 ** (len(c.block_out_channels) - 1),
        scale=scale,
        shift=shift,
        pixels=c.in_channels,
    )


def statistics(config: Mapping) -> tuple[float | list, float | list]:
    """What a codec's raw latents are scaled by, and shifted by before that: one number each, or a
    number for every channel."""
    deviation = torch.tensor(config.get("latents_std") or 1.0)
    shift = config.get("latents_mean") or config.get("shift_factor") or 0.0
    return (config.get("scaling_factor", 1.0) / deviation).tolist(), shift
