"""Modules as diffusers and transformers save them: copies that own their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from difftrain.export.errors import ExportError
from difftrain.models.codec import Codec
from difftrain.models.text import ALL_TOKENS, TextEncoder
from difftrain.models.tokenizer import END, START
from difftrain.training.state import shared

# of a codec whose latents are moved by its convolutions
BESIDE = {
    **dict.fromkeys(("shift_factor", "latents_mean", "latents_std")),
    **dict.fromkeys(("use_quant_conv", "use_post_quant_conv"), True),
}


def copied(module: nn.Module, **changes) -> nn.Module:
    """A module of diffusers with weights of its own, its configuration changed."""
    made = _configured(module, **changes)
    made.load_state_dict(module.state_dict())
    return made.eval()


def _configured(module: nn.Module, **changes) -> nn.Module:
    """A random module with this configuration, changed."""
    own = {name: value for name, value in module.config.items() if not name.startswith("_")}
    return type(module)(**{**own, **changes})


# ---- the codec


def autoencoder(codec: Codec) -> nn.Module:
    """The codec with one scaling factor and no shift, as most pipelines have it: what else its
    latents are moved by goes into the 1 x 1 convolutions beside them."""
    model = codec.model
    factor = 1.0 if codec.scale.dim() else float(f"{codec.scale.item():.7g}")
    if not codec.scale.dim() and not codec.shift.any():
        return copied(model, scaling_factor=factor, shift_factor=None)
    made = _configured(model, **BESIDE, scaling_factor=factor)
    own = {name: value.cpu() for name, value in model.state_dict().items()}
    weights = {**_identities(codec.channels), **own}
    made.load_state_dict({**weights, **_moved(codec, factor, weights)})
    return made.eval()


def _identities(channels: int) -> dict[str, Tensor]:
    """Convolutions that change nothing, for codecs that have none."""
    sizes = {"quant_conv": 2 * channels, "post_quant_conv": channels}
    made = {f"{n}.weight": torch.eye(size)[:, :, None, None] for n, size in sizes.items()}
    return made | {f"{n}.bias": torch.zeros(size) for n, size in sizes.items()}


def _moved(codec: Codec, factor: float, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The convolutions around latents z that are then (z - shift) * scale / factor."""
    flat = torch.zeros(codec.channels)
    scale, shift = (flat + v.cpu().flatten() for v in (codec.scale / factor, codec.shift))
    before, bias, after = (
        weights[n] for n in ("quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight")
    )
    both = torch.cat([scale, torch.ones_like(scale)])  # of the mean, and of the log variance
    mean, spread = bias.chunk(2)
    return {
        "quant_conv.weight": before * both[:, None, None, None],
        "quant_conv.bias": torch.cat([(mean - shift) * scale, spread + 2 * scale.log()]),
        "post_quant_conv.weight": after / scale[None, :, None, None],
        "post_quant_conv.bias": weights["post_quant_conv.bias"] + after[:, :, 0, 0] @ shift,
    }


# ---- text


def encoder(text: TextEncoder) -> nn.Module:
    """The text encoder; a token table that was cut to a vocabulary is whole again, and words that
    it does not know read as the end mark."""
    model, config = text.model, text.model.config
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    if text.compact is not None:
        marks = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
        config = type(config)(**{**config.to_dict(), **marks, "vocab_size": ALL_TOKENS})
        table = model.get_input_embeddings().weight
        (name,) = (n for n, value in model.named_parameters() if value is table)
        weights[name] = table.detach()[text.compact].clone()
    made = type(model)(config)
    made.load_state_dict(weights)
    return made.eval()


def byte_pairs(text: TextEncoder):
    """The tokenizer of a CLIP encoder, which fills texts up to the encoder's length."""
    from transformers import CLIPTokenizer

    tokens = text.tokens
    model = json.loads(tokens.backend.to_str())["model"]
    if model["type"] != "BPE":
        raise ExportError(
            "the tokenizer of the text encoder has no byte pairs, which CLIP's has: use `sd.clip`"
            " with the tokenizer that it was published with"
        )
    names = {"bos": tokens.start, "eos": tokens.end, "unk": tokens.end, "pad": tokens.pad}
    marks = {f"{n}_token": tokens.backend.id_to_token(id_) for n, id_ in names.items()}
    merges = [tuple(m.split()) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=text.length, **marks)


# ---- files


def label(folder: Path, facts: Mapping[str, str]) -> None:
    """Writes into every safetensors file of a folder what its weights are of."""
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        save_file(tensors, path, {**said, **facts})
        shared(path)
