"""Loading modules that diffusers or transformers saved: safetensors only, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from torch import nn

from difftrain.models.errors import PartError
from difftrain.models.pretrained import Absent, folder, hub_failed, is_hub_name, read_json

FAILURES = (OSError, ValueError, RuntimeError, SafetensorError)


def load(kind, weights: str, sub: str) -> nn.Module:
    """The module of class `kind` in `weights`, or in its subfolder `sub` if it has one, in fp32.

    `weights` is a folder or a hub name.
    """
    return _from_hub(kind, weights, sub) if is_hub_name(weights) else _local(kind, weights, sub)


def _local(kind, weights: str, sub: str) -> nn.Module:
    at = folder(weights)
    at = at / sub if (at / sub).is_dir() else at
    if saved := _other(kind, read_json(at, "config.json")):
        raise PartError(f"`{at}` holds `{saved}`: give a folder with `{kind.__name__}`")
    if not list(at.glob("*.safetensors")):
        raise PartError(_no_weights(at))
    try:
        return _whole(kind.from_pretrained(at, **_safe()), str(at))
    except FAILURES as cause:
        raise PartError(f"cannot load the weights in `{at}`: {_first_line(cause)}") from cause


def _other(kind, config: dict) -> str:
    """What a configuration is of, where that is another class, or another family of models."""
    saved = config.get("_class_name", kind.__name__)
    if saved != kind.__name__:
        return saved
    family, _, _ = getattr(getattr(kind, "config_class", None), "model_type", "").partition("_")
    model = config.get("model_type") or family
    return "" if model.startswith(family) else model


def _from_hub(kind, name: str, sub: str) -> nn.Module:
    for where in ({"subfolder": sub}, {}):
        try:
            return _whole(kind.from_pretrained(name, **where, **_safe()), name)
        except FAILURES as cause:
            reason = cause
    raise Absent(hub_failed(name, "safetensors")) from reason


def _safe() -> dict:
    return {"use_safetensors": True, "output_loading_info": True}


def _whole(loaded: tuple[nn.Module, dict], where: str) -> nn.Module:
    """The module, if no weight of it was left random."""
    module, info = loaded
    missing = sorted(info["missing_keys"])
    if missing:
        raise PartError(
            f"the weights in `{where}` lack {len(missing)} tensors, such as `{missing[0]}`: "
            "save the whole module again"
        )
    return module.float()


def _no_weights(at: Path) -> str:
    pickles = sorted(at.glob("*.bin"))
    if pickles:
        return (
            f"`{pickles[0]}` is a pickle, which can run code when it is read: save the folder "
            "again as safetensors"
        )
    return f"`{at}` has no safetensors: give the folder that save_pretrained wrote"


def _first_line(cause: Exception) -> str:
    return str(cause).strip().splitlines()[0].rstrip(".")
