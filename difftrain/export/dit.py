"""A transformer that is told a class, as the network of diffusers' DiT: the same function by other
names.

That network embeds times at other rates, so that its first layer of times is solved for: it gives
at the times of one solver what ours gives there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from difftrain.export.errors import ExportError
from difftrain.models.attention import EPS
from difftrain.models.embedding import FREQUENCIES
from difftrain.models.form import Form
from difftrain.models.transformer import Transformer

NULL = 1000  # the label that the pipeline guides away from, whatever the network
PLAIN = {"norm": "layer", "mlp": "gelu", "rotary": False, "qk_norm": False}
OURS, THEIRS = 0, 1  # what is taken from the number of rates before times are divided by it
BROAD, NARROW = 1e-3, 1e-7  # singular values that count, of all times and of those of a solver
EXACT = 1e-5  # of the size of what the first layer says

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Times:
    """The times [N] of a solver and [M] of the whole process, which a scheduler tells `scale` times
    as large."""

    solver: Tensor
    every: Tensor
    scale: int


def fits(form: Form) -> None:
    """Refuses a transformer that diffusers' DiT is not. Raises ExportError."""
    for name, plain in PLAIN.items():
        if (own := getattr(form, name)) != plain:
            shown = str(own).lower()
            raise ExportError(
                f"the DiT of diffusers has no `{name} = {shown}`: export to another target, such as"
                " `onnx`"
            )
    if not form.classes:
        reads = "reads text" if form.states else "is told nothing"
        raise ExportError(
            f"the pipeline of DiT tells its network a class, and this one {reads}: export to"
            " another target, such as `onnx`"
        )
    if form.classes > NULL:
        raise ExportError(
            f"the pipeline of DiT guides away from the label {NULL}, which is one of the"
            f" {form.classes} classes here: export to another target, such as `onnx`"
        )


def transformer(network: Transformer, side: int, times: Times) -> tuple[nn.Module, float]:
    """The network for latents of this side, and how far its first layer of times is off at other
    times than the solver's, as a share of what it says. Raises ExportError."""
    from diffusers import DiTTransformer2DModel

    form, state = network.form, network.state_dict()
    made = DiTTransformer2DModel(
        num_attention_heads=form.heads,
        attention_head_dim=form.width // form.heads,
        in_channels=form.channels,
        out_channels=form.channels,
        num_layers=form.depth,
        sample_size=side,
        patch_size=form.patch,
        num_embeds_ada_norm=NULL,
        norm_eps=EPS,
    )
    first, off = _first(state["t_embedder.mlp.0.weight"], form, times)
    made.load_state_dict(dict(_renamed(form, {**state, "t_embedder.mlp.0.weight": first})))
    return made.eval(), off


# ---- names


def _renamed(form: Form, state: State) -> Iterator[tuple[str, Tensor]]:
    yield from _layer(state, "x_embedder.proj", "pos_embed.proj")
    for i in range(form.depth):
        yield from _block(form, state, f"blocks.{i}", f"transformer_blocks.{i}")
    yield from _layer(state, "final_layer.adaLN_modulation.1", "proj_out_1")
    sign = -1 if form.clock == "data" else 1  # of what the network answers
    for name, value in _layer(state, "final_layer.linear", "proj_out_2"):
        yield name, sign * value


def _block(form: Form, state: State, ours: str, theirs: str) -> Iterator[tuple[str, Tensor]]:
    emb = f"{theirs}.norm1.emb"  # every block has its own copy
    yield from _layer(state, "t_embedder.mlp.0", f"{emb}.timestep_embedder.linear_1")
    yield from _layer(state, "t_embedder.mlp.2", f"{emb}.timestep_embedder.linear_2")
    yield f"{emb}.class_embedder.embedding_table.weight", _classes(form, state)
    yield from _layer(state, f"{ours}.adaLN_modulation.1", f"{theirs}.norm1.linear")
    for kind in ("weight", "bias"):
        parts = state[f"{ours}.attn.qkv.{kind}"].chunk(3)
        for name, part in zip("qkv", parts, strict=True):
            yield f"{theirs}.attn1.to_{name}.{kind}", part
    yield from _layer(state, f"{ours}.attn.proj", f"{theirs}.attn1.to_out.0")
    yield from _layer(state, f"{ours}.mlp.fc1", f"{theirs}.ff.net.0.proj")
    yield from _layer(state, f"{ours}.mlp.fc2", f"{theirs}.ff.net.2")


def _layer(state: State, ours: str, theirs: str) -> Iterator[tuple[str, Tensor]]:
    for kind in ("weight", "bias"):
        yield f"{theirs}.{kind}", state[f"{ours}.{kind}"]


def _classes(form: Form, state: State) -> Tensor:
    """The embeddings [NULL + 1, width] of classes; what is none is read as the null one."""
    table = state["y_embedder.embedding_table.weight"]
    return torch.cat([table[:-1], table[-1:].expand(NULL + 1 - form.classes, -1)])


# ---- times


def _first(weight: Tensor, form: Form, times: Times) -> tuple[Tensor, float]:
    """The first layer [width, 256] of times, and its error at every time.

    It is the one nearest to ours at every time, moved as little as makes it right at those of the
    solver.
    """
    own = weight.detach().double().cpu().T
    (here, wanted), (every, all_wanted) = (
        (_waves(t * times.scale, THEIRS), _waves(_known(form, t), OURS) @ own)
        for t in (times.solver.cpu().double(), times.every.cpu().double())
    )
    made = _solved(every, all_wanted, BROAD)
    made = made + _solved(here, wanted - here @ made, NARROW)
    if not _error(here @ made, wanted) <= EXACT:
        raise ExportError(
            f"the DiT of diffusers embeds times at rates of its own, and no layer of it knows the"
            f" {len(here)} times of this solver as the network does: take fewer steps, such as 50"
        )
    return made.T.to(weight), _error(every @ made, all_wanted)


def _known(form: Form, t: Tensor) -> Tensor:
    """What the network embeds at the time t [N] of the process."""
    return (1 - t if form.clock == "data" else t) * form.time_scale


def _waves(value: Tensor, gap: int) -> Tensor:
    """Cosines and sines [N, 256] of values [N], as exact as networks have them."""
    from diffusers.models.embeddings import get_timestep_embedding

    told = {"flip_sin_to_cos": True, "downscale_freq_shift": gap}
    return get_timestep_embedding(value.float(), FREQUENCIES, **told).double()


def _solved(waves: Tensor, wanted: Tensor, least: float) -> Tensor:
    """The smallest layer [256, width] that makes of waves what is wanted, as nearly as it can."""
    return torch.linalg.lstsq(waves, wanted, rcond=least, driver="gelsd").solution


def _error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
