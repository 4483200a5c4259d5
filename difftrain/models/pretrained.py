"""A pretrained folder's own account of itself, in the language's words. Needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from difftrain.models.errors import PartError

HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
FILES = {
    "scheduler": "scheduler/scheduler_config.json",
    "unet": "unet/config.json",
    "vae": "vae/config.json",
}
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v_prediction",
    "flow_prediction": "flow",
}


def facts(weights: str | Path, files: Iterable[str] = tuple(FILES)) -> dict:
    """Process, prediction type, latents and network of a pretrained folder (or hub name).

    `files` names what is read, and so which of the keys come back:

    - scheduler: `process` (`ddpm` with beta, lo, hi, steps, terminal_snr; or `linear` with steps,
      shift), `prediction_type`, and `grid`, the spacing of the sampler's steps
    - vae: `latent` (scale, shift, channels)
    - unet: `network` (channels, cross_attention_dim, sample_size)

    An absent key has the value that diffusers gives it.
    """
    readers = {"scheduler": _scheduler, "unet": _network, "vae": _latent}
    found: dict = {}
    for file in files:
        found |= readers[file](read_json(weights, FILES[file]))
    return found


def _scheduler(config: dict) -> dict:
    flow = "FlowMatch" in config.get("_class_name", "")
    steps = config.get("num_train_timesteps", 1000)
    return {
        "process": _linear(config, steps) if flow else _ddpm(config, steps),
        "prediction_type": "flow" if flow else _prediction(config),
        "grid": config.get("timestep_spacing", "leading"),
    }


def _linear(config: dict, steps: int) -> dict:
    return {"name": "linear", "steps": steps, "shift": config.get("shift", 1.0)}


def _ddpm(config: dict, steps: int) -> dict:
    if config.get("trained_betas") is not None:
        raise PartError("the scheduler lists its betas one by one: only named schedules are read")
    beta = config.get("beta_schedule", "linear")
    return {
        "name": "ddpm",
        "beta": _word("beta schedule", beta, BETAS),
        "lo": config.get("beta_start", 0.0001),
        "hi": config.get("beta_end", 0.02),
        "steps": steps,
        "terminal_snr": "zero" if config.get("rescale_betas_zero_snr") else "free",
    }


def _prediction(config: dict) -> str:
    return _word("prediction type", config.get("prediction_type", "epsilon"), PREDICTIONS)


def _word(what: str, value: str, known: dict[str, str]) -> str:
    if value not in known:
        raise PartError(
            f"the scheduler's {what} `{value}` has no name here: it must be one of "
            f"{', '.join(known)}"
        )
    return known[value]


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


def is_hub_name(weights: str | Path) -> bool:
    """Whether this names something on the hub: `owner/name`, and no folder here has that name."""
    return bool(HUB.fullmatch(str(weights))) and not Path(weights).expanduser().exists()


def folder(weights: str | Path) -> Path:
    """The pretrained folder of this path, which must exist."""
    path = Path(weights).expanduser()
    if not path.exists():
        raise PartError(f"there is no folder `{weights}`: check the path, or give a hub name")
    if not path.is_dir():
        raise PartError(f"`{weights}` is a file: give the folder that save_pretrained wrote")
    return path


def read_json(weights: str | Path, name: str) -> dict:
    """The object in one configuration file of a pretrained folder or hub name."""
    path = _fetched(str(weights), name) if is_hub_name(weights) else folder(weights) / name
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PartError(
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
        raise PartError(hub_failed(name, file)) from cause


def hub_failed(name: str, what: str) -> str:
    return (
        f"cannot load {what} of `{name}`: there is no such folder here, and the hub does not have "
        "it or cannot be reached"
    )
