"""A pretrained folder's own account of itself, in the language's words. Needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from importlib.resources import files as resources
from importlib.resources.abc import Traversable
from pathlib import Path

from difftrain.language.adopt import NotAdopted, described
from difftrain.models.errors import PartError

HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
SHIPPED = ("emoji64",)  # codecs that come with the package
FILES = {
    "scheduler": "scheduler/scheduler_config.json",
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text": "text_encoder/config.json",
}
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
PREDICTIONS = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v_prediction",
    "flow_prediction": "flow",
}


class Absent(PartError):
    """A file that a pretrained folder or the hub does not have."""


def facts(weights: str | Path, files: Iterable[str] = ("scheduler", "unet", "vae")) -> dict:
    """Process, prediction type, latents and network of a pretrained folder (or hub name).

    `files` names what is read, and so which of the keys come back:

    - scheduler: `process` (described), `steps`, `prediction_type`, and `grid`, the spacing of the
      sampler's steps
    - vae: `latent` (scale, shift, channels)
    - unet: `network` (channels, cross_attention_dim, sample_size)
    - text: `text` (width)

    An absent key has the value that diffusers gives it.
    """
    readers = {"scheduler": _scheduler, "unet": _network, "vae": _latent, "text": _text}
    found: dict = {}
    for file in files:
        found |= readers[file](config(weights, file))
    return found


def config(weights: str | Path, file: str) -> dict:
    """One of the configurations in FILES. Raises Absent, or PartError for what cannot be read."""
    found = _parsed(located(weights, file), weights, FILES[file])
    saved = found.get("_class_name")
    if saved != CLASSES.get(file, saved) and saved is not None:
        raise Absent(f"`{weights}` holds `{saved}`: give a folder with `{CLASSES[file]}`")
    return found


def located(weights: str | Path, file: str) -> Path | Traversable:
    """Where one of FILES is: where a module was saved alone, in the folder itself."""
    if file == "vae" and weights in SHIPPED:
        return resources("difftrain.models").joinpath(str(weights), "config.json")
    if is_hub_name(weights):
        return _fetched(str(weights), FILES[file])
    whole = folder(weights) / FILES[file]
    alone = folder(weights) / whole.name
    return alone if alone.is_file() and not whole.is_file() else whole


def _scheduler(config: dict) -> dict:
    flow = "FlowMatch" in config.get("_class_name", "")
    try:
        process = described(config)
    except NotAdopted as problem:
        raise PartError(str(problem)) from problem
    return {
        "process": process,
        "steps": config.get("num_train_timesteps", 1000),
        "prediction_type": "flow" if flow else _prediction(config),
        "grid": config.get("timestep_spacing", "leading"),
    }


def _prediction(config: dict) -> str:
    value = config.get("prediction_type", "epsilon")
    if value not in PREDICTIONS:
        raise PartError(
            f"the scheduler's prediction type `{value}` has no name here: it must be one of "
            f"{', '.join(PREDICTIONS)}"
        )
    return PREDICTIONS[value]


def _network(config: dict) -> dict:
    return {
        "network": {
            "channels": config.get("in_channels", 4),
            "cross_attention_dim": config.get("cross_attention_dim", 1280),
            "sample_size": config.get("sample_size"),
        }
    }


def _latent(config: dict) -> dict:
    return {
        "latent": {
            "scale": config.get("scaling_factor", 0.18215),
            "shift": config.get("shift_factor") or 0.0,
            "channels": config.get("latent_channels", 4),
        }
    }


def _text(config: dict) -> dict:
    inner = config.get("text_config", config)  # of a model that reads pictures too
    return {"text": {"width": inner.get("hidden_size", inner.get("d_model", 512))}}


def is_hub_name(weights: str | Path) -> bool:
    """Whether this names something on the hub: `owner/name`, and no folder here has that name."""
    return bool(HUB.fullmatch(str(weights))) and not Path(weights).expanduser().exists()


def folder(weights: str | Path) -> Path:
    """The pretrained folder of this path, which must exist."""
    path = Path(weights).expanduser()
    if not path.exists():
        raise Absent(f"there is no folder `{weights}`: check the path, or give a hub name")
    if not path.is_dir():
        raise PartError(f"`{weights}` is a file: give the folder that save_pretrained wrote")
    return path


def read_json(weights: str | Path, name: str) -> dict:
    """The object in one configuration file of a pretrained folder or hub name."""
    hub = is_hub_name(weights)
    return _parsed(_fetched(str(weights), name) if hub else folder(weights) / name, weights, name)


def _parsed(path: Path | Traversable, weights: str | Path, name: str) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Absent(
            f"`{weights}` has no {name}: give the folder that save_pretrained wrote"
        ) from None
    except ValueError as cause:
        raise PartError(f"`{path}` is not JSON ({cause}): save the folder again") from cause
    if not isinstance(config, dict):
        raise PartError(f"`{path}` holds no configuration: save the folder again")
    return config


def _fetched(name: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except (OSError, ValueError) as cause:
        raise Absent(hub_failed(name, file)) from cause


def hub_failed(name: str, what: str) -> str:
    return (
        f"cannot load {what} of `{name}`: there is no such folder here, and the hub does not have "
        "it or cannot be reached"
    )
