"""Diffusion transformers: DiT, SiT and LightningDiT as three settings of one network.

Names and shapes of the weights are those that were published, so that their files load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from difftrain.models import checkpoints
from difftrain.models.attention import CrossAttention, Gelu, SelfAttention, SwiGlu, norm
from difftrain.models.dropout import install
from difftrain.models.embedding import (
    Label,
    Patches,
    Scalar,
    TextStates,
    picture,
    positions,
    rotations,
)
from difftrain.models.errors import PartError
from difftrain.models.form import LATENT, Form, possible

FACTOR = 8  # of a codec that is not told: Stable Diffusion's
MLPS = {"gelu": Gelu, "swiglu": SwiGlu}
GUIDANCE = 1000  # what a guidance scale is multiplied by before it is embedded (arXiv:2310.04378)


class Block(nn.Module):
    """Self-attention, attention to text where there is one, and a perceptron: tokens [B, T, width],
    told of the condition [B, width] by shifts, scales and gates (adaLN-Zero, arXiv:2212.09748)."""

    def __init__(self, form: Form):
        super().__init__()
        width, heads = form.width, form.heads
        self.norm1 = norm(form.norm, width)
        qk_norm = form.norm if form.qk_norm else ""
        self.attn = SelfAttention(width, heads, qk_norm=qk_norm, **form.way)
        if form.states:
            self.norm_cross = norm(form.norm, width)
            self.cross = CrossAttention(width, heads, **form.way)
        self.norm2 = norm(form.norm, width)
        self.mlp = MLPS[form.mlp](width, 4 * width)
        self.adaLN_modulation = _modulation(width, 6)

    def forward(self, x: Tensor, c: Tensor, text: Tensor | None, rotation: Tensor | None) -> Tensor:
        shift, scale, gate, *second = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        x = x + gate * self.attn(self.norm1(x) * (1 + scale) + shift, rotation)
        if text is not None:
            x = x + self.cross(self.norm_cross(x), text)
        shift, scale, gate = second
        return x + gate * self.mlp(self.norm2(x) * (1 + scale) + shift)


def _modulation(width: int, parts: int) -> nn.Module:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


class FinalLayer(nn.Module):
    """Patches [B, T, p * p * C] of tokens [B, T, width]."""

    def __init__(self, form: Form):
        super().__init__()
        self.norm_final = norm(form.norm, form.width)
        self.linear = nn.Linear(form.width, form.patch**2 * form.channels)
        self.adaLN_modulation = _modulation(form.width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Transformer(nn.Module):
    """network(x [B, C, h, w], t [B], cond, **extra) -> [B, C, h, w].

    cond is [B, 1] of classes, [B, S, width] of text, or None. `extra` holds what the form names:
    further times [B], of which t - r is embedded; a guidance scale w [B]; a `guess` [B, C, h, w].
    `masks` are the draws of its dropout. With a tap it gives (output, tokens [B, T, width]), where
    T is the product of `tap_grid` for pictures of the size it was made for.
    """

    def __init__(self, form: Form, grid: tuple[int, int]):
        super().__init__()
        self.form, self.tap_width, self.tap_grid = form, form.width, grid
        self.x_embedder = Patches(form.taken, form.width, form.patch)
        self.t_embedder = Scalar(form.width)
        self.further = nn.ModuleDict({name: Scalar(form.width) for name in form.further})
        if form.classes:
            self.y_embedder = Label(form.classes, form.width)
        elif form.states:
            self.y_embedder = TextStates(form.states, form.width)
        self.blocks = nn.ModuleList(Block(form) for _ in range(form.depth))
        self.final_layer = FinalLayer(form)
        self.masks = install(self, form.dropout)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, *, masks=None, **extra):
        self._same_extras(extra)
        with self.masks.handed(masks):
            return self._answer(x, t, cond, extra)

    def _answer(self, x: Tensor, t: Tensor, cond: Tensor | None, extra: Mapping[str, Tensor]):
        form, grid = self.form, self.x_embedder.grid(*x.shape[2:])
        tokens = self._tokens(x, extra, grid)
        c, text = self._condition(t, cond, extra)
        head = form.width // form.heads
        rotation = rotations(grid, head, x.device, x.dtype) if form.rotary else None
        tapped = None
        for place, block in enumerate(self.blocks, 1):
            tokens = block(tokens, c, text, rotation)
            tapped = tokens if place == form.tap else tapped
        output = picture(self.final_layer(tokens, c), grid, form.patch)
        output = -output if form.clock == "data" else output
        return (output, tapped) if form.tap else output

    def _tokens(self, x: Tensor, extra: Mapping[str, Tensor], grid: tuple[int, int]) -> Tensor:
        """[B, T, width] of x with the earlier estimate beside it, in the residual's precision."""
        seen = torch.cat((x, extra["guess"]), dim=1) if "guess" in self.form.inputs else x
        return self.x_embedder(seen) + positions(grid, self.form.width, x.device, x.dtype)

    def _condition(self, t: Tensor, cond: Tensor | None, extra: Mapping[str, Tensor]):
        """What every block is told, [B, width], and the text it may look at, [B, S, width]."""
        form = self.form
        c = self.t_embedder((1 - t if form.clock == "data" else t) * form.time_scale)
        for name, embedder in self.further.items():
            later = name in form.times
            value = (t - extra[name]) * form.time_scale if later else extra[name] * GUIDANCE
            c = c + embedder(value)
        if form.classes:
            return c + self.y_embedder(cond), None
        if form.states:
            text = self.y_embedder(cond)
            return c + text.mean(dim=1), text
        return c, None

    def _same_extras(self, extra: Mapping[str, Tensor]) -> None:
        wanted = (*self.form.times[1:], *self.form.inputs)
        for name in (*wanted, *extra):
            if name not in extra or name not in wanted:
                fact = "needs" if name in wanted else "was not made for"
                raise PartError(f"the network {fact} `{name}`: name it in `times` or `inputs`")


# ---- beginning


def initialise(module: nn.Module) -> None:
    """Random weights as DiT begins: gates, the output and what looks at text start at 0."""
    for part in reversed(list(module.modules())):  # what is inside first
        match part:
            case nn.Linear() | nn.Conv2d():
                nn.init.xavier_uniform_(part.weight.flatten(1))
                nn.init.zeros_(part.bias)
            case nn.Embedding():
                nn.init.normal_(part.weight, std=0.02)
            case nn.RMSNorm() | nn.LayerNorm():
                part.reset_parameters()
            case Scalar():
                nn.init.normal_(part.mlp[0].weight, std=0.02)
                nn.init.normal_(part.mlp[2].weight, std=0.02)
            case Block():
                silence(part.adaLN_modulation[1])
            case FinalLayer():
                silence(part.adaLN_modulation[1])
                silence(part.linear)
            case CrossAttention():
                silence(part.proj)
            case Transformer() if "w" in part.further:
                silence(part.further["w"].mlp[2])


def silence(layer: nn.Linear) -> None:
    """Makes a layer give 0 until it is trained."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


# ---- the builder


def transformer(
    *,
    weights: str = "",
    depth: int = 28,
    width: int = 1152,
    heads: int = 16,
    patch: int = 2,
    norm: str = "layer",
    mlp: str = "gelu",
    rotary: bool = False,
    qk_norm: bool = False,
    attention: str = "auto",
    tap: int = 0,
    dropout: float = 0.0,
    time_scale: float = 1.0,
    clock: str = "index",
    times: Sequence[str] = ("t",),
    inputs: Sequence[str] = (),
    codec=None,
    text=None,
    size: int = 256,
    forward_mode: bool = False,
) -> Transformer:
    """A diffusion transformer: random, or from a file of weights in a published layout.

    `tap` counts blocks from 1. `clock` says what times the network knows: an `index`, `noise` (0 is
    data, 1 is noise), or `data`, the other way round: then it is fed 1 - t and its output is
    negated, which makes flows of one convention flows of the other. `size` is the pictures' side in
    pixels, `text` an encoder of text or of classes. With `forward_mode` the network can be
    differentiated forward, by `torch.func.jvp`, wherever it runs.
    """
    shape = codec.shape(size) if codec else (LATENT, size // FACTOR, size // FACTOR)
    form = Form(
        depth=depth, width=width, heads=heads, patch=patch, channels=shape[0],
        classes=getattr(text, "classes", 0), states=getattr(text, "width", 0),
        norm=norm, mlp=mlp, rotary=rotary, qk_norm=qk_norm,
        attention=attention, forward_mode=forward_mode, tap=tap, dropout=dropout,
        time_scale=time_scale, clock=clock, times=_last_names(times), inputs=_last_names(inputs),
    )  # fmt: skip
    possible(form, shape)
    return _made(form, shape, weights)


def _made(form: Form, shape: tuple[int, ...], weights: str) -> Transformer:
    """Built without memory first: what is loaded need not be drawn."""
    device = torch.get_default_device()
    with torch.device("meta"):
        network = Transformer(form, Patches(1, 1, form.patch).grid(*shape[1:]))
    _allot(network, device)
    if not weights:
        initialise(network)
        return network
    for embedder in network.further.values():  # what a file may lack says nothing at first
        initialise(embedder)
        silence(embedder.mlp[2])
    checkpoints.load(network, weights)
    return network


def _allot(network: nn.Module, device: torch.device) -> None:
    """Gives every weight memory and no number, as `to_empty` cannot where tensors are shapes."""
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            empty = torch.empty(weight.shape, dtype=weight.dtype, device=device)
            setattr(module, name, nn.Parameter(empty))


def _last_names(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.rpartition(".")[2] for name in names)
