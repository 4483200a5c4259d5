"""The network of signals.diff and, run as a program, its data: `python signals.py`."""

import numpy as np
from torch import Tensor, nn

SHAPES = {
    "sine": np.sin,
    "square": lambda phase: np.sign(np.sin(phase)),
    "saw": lambda phase: (phase / np.pi) % 2 - 1,
}
LENGTH, EACH, HELD_OUT = 64, 256, 16


class Block(nn.Module):
    """A residual convolution along the signal, moved by an embedding of time and class."""

    def __init__(self, width: int, reach: int):
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.first = nn.Conv1d(width, width, 3, padding=reach, dilation=reach)
        self.moved = nn.Linear(width, width)
        self.last = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        hidden = self.first(nn.functional.silu(self.norm(x))) + self.moved(at)[:, :, None]
        return x + self.last(nn.functional.silu(hidden))


class Network(nn.Module):
    """x [B, C, L], t [B] and classes cond [B, 1] to [B, C, L]."""

    def __init__(self, channels: int, width: int, classes: int):
        super().__init__()
        self.begin = nn.Conv1d(channels, width, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.kind = nn.Embedding(classes + 1, width)  # the last one is the null class
        self.blocks = nn.ModuleList(Block(width, 2**depth) for depth in range(6))
        self.end = nn.Conv1d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        at = self.time(t[:, None]) + self.kind(cond[:, 0])
        hidden = self.begin(x)
        for block in self.blocks:
            hidden = block(hidden, at)
        return self.end(hidden)


def network(width: int, text, shape) -> nn.Module:
    """What `module = "signals:network"` names: `width` comes from the spec, the encoder `text` and
    the `shape` [C, L] of a sample from the run."""
    return Network(shape[0], width, text.classes)


def write(path: str) -> None:
    """Signals x [N, L] of three shapes, with a pitch and a phase of their own."""
    random = np.random.default_rng(0)
    place = np.linspace(0, 2 * np.pi, LENGTH, endpoint=False)
    names = np.repeat(list(SHAPES), EACH)
    pitch, start = random.integers(1, 4, (len(names), 1)), random.uniform(0, 6, (len(names), 1))
    phases = pitch * place + start
    x = np.stack([SHAPES[name](phase) for name, phase in zip(names, phases, strict=True)])
    split = np.where(np.arange(len(names)) % EACH < HELD_OUT, "test", "train")
    np.savez(path, x=x.astype(np.float32), shape=names, split=split)


if __name__ == "__main__":
    write("signals.npz")
