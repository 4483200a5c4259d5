"""A spec that trains in seconds, and pictures for it."""

import json

from PIL import Image

SPEC = """diff 1
import std.sd

objective tiny {{
  process         = ddpm(beta = scaled_linear(0.00085, 0.012))
  prediction_type = v_prediction
  strategy        = drop_condition(0.1)
  backbone        = {backbone}
{more}}}

data   {{ source = folder("photos"), size = {size}px, batch = 4{data} }}
train  {{ steps = 4, log_every = 1, optimizer = adamw(0.001){train} }}
sample {{ solver = ddim(steps = 2), guidance = 2, count = 4{sample} }}
"""
NETWORK = "channels = [16, 16], layers = 1, heads = 2, attention = [0], groups = 4"
TEXT = "sd.clip(train = {train}, layers = 1, width = 16, heads = 2, length = 8)"
BACKBONE = f"sd.unet(text = {TEXT.format(train='true')}, {NETWORK})"
FROZEN = f"sd.unet(text = {TEXT.format(train='false')}, {NETWORK})"
BLANK = {"more": "", "size": 64, "data": "", "train": "", "sample": "", "backbone": BACKBONE}


def spec(**parts) -> str:
    """The text of the spec; the lists of options are added to, `more` stands in the objective."""
    lists = {k: f", {v}" if k in ("data", "train", "sample") else v for k, v in parts.items()}
    return SPEC.format(**{**BLANK, **lists})


def photos(folder, held_out: int = 0, count: int = 8) -> None:
    """Writes coloured squares with captions; the last ones may be held out."""
    folder.mkdir()
    lines = []
    for i in range(count):
        Image.new("RGB", (64, 64), (30 * i, 255 - 30 * i, 100)).save(folder / f"{i}.png")
        split = {"split": "held_out" if i >= count - held_out else "train"} if held_out else {}
        text = f"picture {'abcdefgh'[i]}"
        lines.append(json.dumps({"file_name": f"{i}.png", "caption": text, **split}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def home(folder, held_out: int = 0, **parts):
    """A folder with the spec and its pictures."""
    (folder / "tiny.diff").write_text(spec(**parts))
    photos(folder / "photos", held_out)
    return folder


def contents(folder) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
