"""The training loop that users run today, in two forms, as what difftrain is measured against.

FROZEN since 2026-11-22: reviewed once and not touched afterwards.

`EAGER` does what diffusers' text-to-image example does with each batch (its script at 0.42, one
GPU, `--mixed_precision bf16 --use_ema`, everything else as it comes): fp32 weights, forward passes
in bf16 autocast, latents and text states in bf16, noise and times drawn by torch, `DDPMScheduler`,
mean square error in fp32, gradients cut to a norm of 1, `torch.optim.AdamW`, `EMAModel` weight by
weight, and the loss read back twice a step for its logs. Data, codec and text encoder are left out:
latents and states are given on the device.

`COMPILED` is the same loop as somebody writes it who wants speed and keeps torch's own tools: the
network under `torch.compile(fullgraph=True)`, `AdamW(fused=True)`, `EMAModel(foreach=True)`, fp32
products in TF32, and nothing read back. `CHANNELS_LAST` is that with weights and latents in
channels-last, `GRAPHS` with `mode="reduce-overhead"`. Of these, the fastest is the bar.

Written for torch 2.11 (CUDA 13.0) and 2.13 (CPU), diffusers 0.42.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_dream_and_update_latents
from peers.networks import Call
from torch import Tensor, nn
from torch.nn import functional as F

TIMES, BETAS = 1000, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class Form:
    """How the loop is run."""

    compiled: bool = False
    channels_last: bool = False
    mode: str | None = None  # of torch.compile


EAGER, COMPILED = Form(), Form(compiled=True)
CHANNELS_LAST = Form(compiled=True, channels_last=True)
GRAPHS = Form(compiled=True, mode="reduce-overhead")
FORMS = {
    "eager": EAGER,
    "compiled": COMPILED,
    "channels-last": CHANNELS_LAST,
    "reduce-overhead": GRAPHS,
}


class Loop:
    """Everything of one training; `step` is one turn of the loop."""

    def __init__(self, network: nn.Module, call: Call, form: Form, precision: torch.dtype):
        if form.compiled:
            torch.set_float32_matmul_precision("high")
        self.form, self.call, self.precision = form, call, precision
        layout = torch.channels_last if form.channels_last else torch.preserve_format
        self.network = network.train().to(memory_format=layout)
        weights = list(network.parameters())
        self.device = weights[0].device
        self.optimizer = torch.optim.AdamW(
            weights, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8, fused=form.compiled
        )
        self.rates = get_scheduler("constant", self.optimizer)
        self.average = EMAModel(weights, decay=0.9999, foreach=form.compiled)
        self.noises = DDPMScheduler(num_train_timesteps=TIMES, **BETAS)
        options = {"fullgraph": True, "dynamic": False, "mode": form.mode}
        self.run = torch.compile(network, **options) if form.compiled else network

    def step(self, latents: Tensor, cond: Tensor, dream: bool = False) -> Tensor:
        """The loss of one step on latents [B, C, h, w] and their condition."""
        noise = torch.randn_like(latents)
        times = torch.randint(0, TIMES, (len(latents),), device=self.device).long()
        noisy, target = self.noises.add_noise(latents, noise, times), noise
        with self._cast():
            if dream:
                seen = (times, noise, noisy, target, cond)
                noisy, target = compute_dream_and_update_latents(self.run, self.noises, *seen)
            guess = self.call(self.run, noisy, times, cond)
        loss = F.mse_loss(guess.float(), target.float(), reduction="mean")
        if not self.form.compiled:
            loss.item()
        loss.backward()
        self._update()
        if not self.form.compiled:
            loss.item()
        return loss.detach()

    def backbone(self, latents: Tensor, cond: Tensor) -> None:
        """The network's forward and backward alone, for counting their kernels."""
        times = torch.zeros(len(latents), dtype=torch.int64, device=self.device)
        with self._cast():
            guess = self.call(self.run, latents, times, cond)
        guess.backward(latents.to(guess.dtype))
        self.optimizer.zero_grad()

    def _cast(self) -> torch.autocast:
        wanted = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=wanted)

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()
        self.average.step(self.network.parameters())
