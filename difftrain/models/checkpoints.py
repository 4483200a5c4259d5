"""Published weights of diffusion transformers: their names and shapes, and reading such a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isqrt
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from difftrain.models.embedding import FREQUENCIES, positions, rotations
from difftrain.models.errors import PartError
from difftrain.models.form import Form

Shape = tuple[int, ...]
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
ROUNDED = 0.02  # how far positions that were saved in half precision may be off
ADVICE = "give the network the options that they were trained with"


# ---- layouts


def published(form: Form, tokens: int, outputs: int) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor in a published file.

    As in models.py of facebookresearch/DiT and of willisma/SiT, and with the further switches in
    models/lightningdit.py of hustvl/LightningDiT. `tokens` is the square of its grid's side,
    `outputs` counts the channels that come out.
    """
    d, p, head = form.width, form.patch, form.width // form.heads
    yield "pos_embed", (1, tokens, d)
    if form.rotary:
        yield "feat_rope.freqs_cos", (tokens, head)
        yield "feat_rope.freqs_sin", (tokens, head)
    yield "x_embedder.proj.weight", (d, form.channels, p, p)
    yield "x_embedder.proj.bias", (d,)
    yield from _linear("t_embedder.mlp.0", FREQUENCIES, d)
    yield from _linear("t_embedder.mlp.2", d, d)
    yield "y_embedder.embedding_table.weight", (form.classes + 1, d)
    for i in range(form.depth):
        yield from _block(f"blocks.{i}.", form)
    yield from _norm("final_layer.norm_final", form)
    yield from _linear("final_layer.linear", d, p * p * outputs)
    yield from _linear("final_layer.adaLN_modulation.1", d, 2 * d)


def _block(at: str, form: Form) -> Iterator[tuple[str, Shape]]:
    d, hidden = form.width, 4 * form.width
    yield from _norm(f"{at}norm1", form)
    yield from _norm(f"{at}norm2", form)
    yield from _linear(f"{at}attn.qkv", d, 3 * d)
    yield from _linear(f"{at}attn.proj", d, d)
    if form.qk_norm:
        for name in ("q_norm", "k_norm"):
            yield f"{at}attn.{name}.weight", (d // form.heads,)
            if form.norm == "layer":
                yield f"{at}attn.{name}.bias", (d // form.heads,)
    if form.mlp == "swiglu":
        yield from _linear(f"{at}mlp.w12", d, 2 * (2 * hidden // 3))
        yield from _linear(f"{at}mlp.w3", 2 * hidden // 3, d)
    else:
        yield from _linear(f"{at}mlp.fc1", d, hidden)
        yield from _linear(f"{at}mlp.fc2", hidden, d)
    yield from _linear(f"{at}adaLN_modulation.1", d, 6 * d)


def _linear(name: str, takes: int, gives: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (gives, takes)
    yield f"{name}.bias", (gives,)


def _norm(name: str, form: Form) -> Iterator[tuple[str, Shape]]:
    if form.norm == "rms":
        yield f"{name}.weight", (form.width,)


# ---- reading


def load(network: nn.Module, weights: str) -> None:
    """Fills a transformer from a safetensors file in a published layout or in our own, whole or
    not at all. Embedders of further numbers and of an earlier estimate may be absent."""
    found, form = _read(weights), network.form
    own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    if "pos_embed" in found:
        found = converted(form, found, weights)
    found = _with_guess(form, found)
    may_lack = {name for name in own if name.startswith("further.")} - found.keys()
    _same(found, {name: own[name] for name in own.keys() - may_lack}, weights)
    network.load_state_dict(found, strict=False)


def converted(form: Form, found: Mapping[str, Tensor], weights: str) -> dict[str, Tensor]:
    """The tensors of a published file as ours: without the fixed ones, and of a network that also
    tells variances only what predicts."""
    if not form.classes:
        raise PartError(
            f"the weights in `{weights}` are told a class: give the network "
            "`text = label.classes(count = 1000)`"
        )
    one = form.patch**2 * form.channels
    tells_variance = len(found.get("final_layer.linear.bias", ())) == 2 * one
    tokens = found["pos_embed"].shape[-2]
    outputs = form.channels * (2 if tells_variance else 1)
    _same(found, dict(published(form, tokens, outputs)), weights)
    fixed = _fixed(form, tokens, found["pos_embed"].device)
    _agree(found, fixed, weights)
    kept = {name: value for name, value in found.items() if name not in fixed}
    if tells_variance:
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            both = kept[name].unflatten(0, (form.patch**2, 2, form.channels))
            kept[name] = both[:, 0].flatten(0, 1)
    return kept


def _fixed(form: Form, tokens: int, device) -> dict[str, Tensor]:
    """What published files hold and we compute."""
    side, head = isqrt(tokens), form.width // form.heads
    where = ((side, side), form.width, device, torch.float32)
    fixed = {"pos_embed": positions(*where)[None]}
    if form.rotary:
        cos, sin = rotations((side, side), head, device, torch.float32)
        fixed |= {"feat_rope.freqs_cos": cos, "feat_rope.freqs_sin": sin}
    return fixed


def _with_guess(form: Form, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An earlier estimate says nothing at first, where the weights do not know it."""
    name = "x_embedder.proj.weight"
    weight = found.get(name)
    if weight is None or weight.dim() != 4 or form.taken == weight.shape[1]:
        return dict(found)
    further = weight.new_zeros(len(weight), form.taken - form.channels, *weight.shape[2:])
    return {**found, name: torch.cat((weight, further), dim=1)}


def _read(weights: str) -> dict[str, Tensor]:
    path = Path(weights).expanduser()
    if not path.is_file():
        raise PartError(
            f"there is no file `{weights}`: give a .safetensors file in the published layout"
        )
    if path.suffix in PICKLES:
        raise PartError(
            f"`{weights}` is a pickle, which can run code when it is read: save its state dict "
            "again as safetensors"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as cause:
        raise PartError(
            f"`{weights}` is not a safetensors file ({cause}): save the state dict again"
        ) from cause


def _same(found: Mapping[str, Tensor], wanted: Mapping[str, Shape], weights: str) -> None:
    """Refuses a file that lacks a tensor, has one too many, or one of another shape."""
    if lost := sorted(wanted.keys() - found.keys()):
        raise PartError(f"the weights in `{weights}` lack {_some(lost)}: {ADVICE}")
    if more := sorted(found.keys() - wanted.keys()):
        raise PartError(f"this network has no place for {_some(more)} in `{weights}`: {ADVICE}")
    for name, shape in wanted.items():
        if tuple(found[name].shape) != shape:
            raise PartError(
                f"`{name}` is {list(found[name].shape)} in `{weights}`, but {list(shape)} in this "
                f"network: {ADVICE}"
            )


def _some(names: list[str]) -> str:
    one = f"`{names[0]}`"
    return one if len(names) == 1 else f"{len(names)} tensors (such as {one})"


def _agree(found: Mapping[str, Tensor], fixed: Mapping[str, Tensor], weights: str) -> None:
    """Refuses positions that are not the fixed ones."""
    for name, value in fixed.items():
        same = found[name].shape == value.shape
        if not same or not torch.allclose(found[name].float(), value, rtol=0, atol=ROUNDED):
            raise PartError(
                f"`{name}` in `{weights}` is not what this network computes for its places: use "
                "weights of the published network"
            )
