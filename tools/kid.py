"""How far samples are from real pictures, beside pictures that are real and pictures of noise.

    python tools/kid.py SAMPLES [--data FOLDER_OR_ZIP] [--size 64] [--side 128]

SAMPLES is an `.npz` (key `pictures`), `.npy` or `.safetensors` of pictures [N, 3, H, W], uint8 or
floats in [-1, 1], a run's folder with a `samples.npz`, or any folder or zip of picture files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from difftrain.compiler.lowering import device
from difftrain.models.errors import PartError
from difftrain.sampling.kid import SIDE, score
from difftrain.training import scores
from difftrain.training.sources import DataError, open_source

KEY, SAVED = "pictures", "samples.npz"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=Path, help="a file or a folder of generated pictures")
    parser.add_argument("--data", default="", help="a folder or zip instead of emoji64")
    parser.add_argument("--size", type=int, default=64, help="the side of the data's pictures")
    parser.add_argument("--side", type=int, default=SIDE, help="the side that the encoder sees")
    args = parser.parse_args()
    try:
        print(report(args.samples, args.data, args.size, args.side))
    except (DataError, PartError, ValueError, OSError) as problem:
        parser.exit(2, f"{problem}\n")


def report(samples: Path, data: str, size: int, side: int) -> str:
    """A table of the distances to held-out pictures."""
    on = device("auto")
    made = pictures(samples, size).to(on)
    real = {split: decoded(data, split, size).to(on) for split in ("held_out", "train")}
    found = score(made, real["held_out"], real["train"], side)
    names = {"kid": "samples", "real": "training pictures", "noise": "noise"}
    counts = {"kid": len(made), "real": len(real["train"]), "noise": len(real["held_out"])}
    rows = [
        f"| {name} | {counts[key]} | {found[key][0]:.4f} | {found[key][1]:.4f} |"
        for key, name in names.items()
    ]
    head = f"| distance to {len(real['held_out'])} held-out pictures of | pictures | KID | error |"
    place = f"half-way {found['half_way']:.4f}; the samples lie at {found['position']:.2f}"
    return "\n".join([head, "|---|---|---|---|", *rows, "", place + " (0 is real, 1 is noise)"])


def pictures(samples: Path, size: int) -> Tensor:
    """Generated pictures [N, 3, H, W] in [-1, 1]."""
    match samples.suffix:
        case ".npz" | ".npy" | ".safetensors":
            return scaled(array(samples), samples)
        case _ if (samples / SAVED).is_file():
            return pictures(samples / SAVED, size)
    return decoded(str(samples), "all", size)


def array(file: Path) -> np.ndarray:
    """The array in a file, or its array `pictures`."""
    found = load_file(file) if file.suffix == ".safetensors" else np.load(file, allow_pickle=False)
    if isinstance(found, np.ndarray):
        return found
    if KEY not in found:
        raise DataError(f"`{file}` has no `{KEY}`: save them under this name")
    return found[KEY]


def scaled(found: np.ndarray, file: Path) -> Tensor:
    if found.ndim != 4 or found.shape[1] != 3:
        raise DataError(f"`{file}` holds {list(found.shape)}: save pictures as [N, 3, H, W]")
    values = torch.from_numpy(found)
    return values.float() / 127.5 - 1 if values.dtype == torch.uint8 else values.float()


def decoded(data: str, split: str, size: int) -> Tensor:
    """A split [N, 3, size, size] of a folder or zip, or of emoji64, in [-1, 1]."""
    kind = "folder" if data else "emoji64"
    return scores.decoded(open_source(kind, data, caption="", split=split), size).pictures


if __name__ == "__main__":
    main()
