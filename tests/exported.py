"""Runs that are exported: trained for three steps, each with another network and condition."""

import json
from pathlib import Path

import numpy as np
import tiny

from difftrain.cli import main

HEAD = "diff 1\n{imports}\nobjective {name} {{\n  process         = {process}\n"
HEAD += "  prediction_type = {prediction}\n{strategy}  backbone        = {backbone}\n}}\n"
TAIL = "data {{ source = {source}, size = 16px, batch = 4 }}\n"
TAIL += "train {{ steps = 3, compile = off, save_every = 0, sample_every = 0, ema = 0.1,"
TAIL += " optimizer = adamw(0.02) }}\nsample {{ {sample}, count = 2, seed = 7 }}\n"
TEXT = "sd.clip(train = true, layers = 1, width = 16, heads = 2, length = 8)"
UNET = f"sd.unet(text = {TEXT}, codec = sd.pixels, channels = [8], layers = 1, heads = 2,"
UNET += " attention = [0], groups = 4)"
DIT = "sit.transformer(depth = 1, width = 16, heads = 2, patch = 4, codec = sd.pixels, text = "
RUNS = {
    "unet": {
        "imports": "import std.sd",
        "process": "ddpm(terminal_snr = zero)",
        "prediction": "v_prediction",
        "strategy": "  strategy        = drop_condition(0.1)\n",
        "backbone": UNET,
        "sample": 'solver = ddim(steps = 2, eta = 1), guidance = 2, prompts = ["picture a"]',
    },
    "classes": {
        "imports": "import std.sd\nimport std.sit\nimport std.label",
        "process": "linear",
        "prediction": "flow",
        "strategy": "  strategy        = drop_condition(0.1)\n",
        "backbone": f"{DIT}label.classes(count = 8))",
        "sample": "solver = ddim(steps = 2, eta = 1), guidance = 3",
    },
    "jump": {
        "imports": "import std.sd\nimport std.sit",
        "process": "linear",
        "prediction": "flow",
        "strategy": "  strategy        = mean_flow\n",
        "backbone": f"{DIT}{TEXT}, times = [t, r])",
        "sample": "solver = jump(steps = 1)",
    },
}
OWN = """diff 1
backbone own({options}codec = raw(standardise = true)) {{ module = "own:network" }}
objective {name} {{
  process         = linear
  prediction_type = {prediction}
{strategy}  backbone        = own
}}
"""
NETWORK = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.into = nn.Conv1d(channels, 8, 3, padding=1)
        self.out = nn.Conv1d(8, 2, 3, padding=1)

    def forward(self, x, t, cond, guess=None):
        x = x if guess is None else torch.cat([x, guess], dim=1)
        return self.out(torch.tanh(self.into(x) + t[:, None, None].to(x.dtype)))


def network(inputs=()):
    return Net(4 if inputs else 2)
"""


def write(folder: Path) -> None:
    """Pictures, arrays, a network and the specs of all runs."""
    tiny.photos(folder / "photos")
    lines = (folder / "photos" / "metadata.jsonl").read_text().splitlines()
    rows = [{**json.loads(line), "label": str(i)} for i, line in enumerate(lines)]
    (folder / "photos" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    drawn = np.random.default_rng(0).normal(2, 3, (16, 2, 12))
    np.savez(folder / "a.npz", x=drawn.astype("float32"))
    (folder / "own.py").write_text(NETWORK)
    for name, parts in RUNS.items():
        text = HEAD.format(name=name, **parts) + TAIL.format(source='folder("photos")', **parts)
        (folder / f"{name}.diff").write_text(text)
    plain = {"name": "arrays", "options": "", "prediction": "flow", "strategy": ""}
    shown = {"name": "shown", "options": "inputs = [guess], ", "prediction": "sample"}
    shown |= {"strategy": "  strategy        = self_condition(0.5)\n"}
    for parts in (plain, shown):
        tail = TAIL.format(source='arrays("a.npz")', sample="solver = heun(steps = 2)")
        (folder / f"{parts['name']}.diff").write_text(OWN.format(**parts) + tail)


def train(name: str) -> str:
    """The folder of a finished run of a spec in the current folder."""
    if not Path("runs", name).is_dir():
        assert main(["train", f"{name}.diff"]) == 0
    return f"runs/{name}"
