"""A step that is compiled ahead is the one that a run looks for, in a process that has nothing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
SPEC = """diff 1

backbone wave(codec = raw) {
  module = "waves:network"
  times  = [t]
}

objective waves {
  process         = linear
  prediction_type = flow
  backbone        = wave
}

data   { source = arrays("waves.npz"), batch = 4 }
train  { steps = 6, log_every = 1, compile = on, save_every = 0, sample_every = 3 }
sample { solver = euler(steps = 2), count = 2 }
"""
NETWORK = """from torch import nn


class Network(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x, t, cond=None):
        return self.linear(x) + t[:, None, None]


def network(shape):
    return Network(shape[-1])
"""


def _python(home: Path, cache: str, *argv: str) -> str:
    """What a new process says that finds nothing compiled in its cache."""
    env = {"TORCHINDUCTOR_CACHE_DIR": str(home / cache), "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **env, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *argv]
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=env)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_fresh_process_finds_its_step_in_the_file(tmp_path):
    (tmp_path / "waves.diff").write_text(SPEC)
    (tmp_path / "waves.py").write_text(NETWORK)
    values = np.random.default_rng(0).standard_normal((8, 1, 4), dtype=np.float32)
    np.savez(tmp_path / "waves.npz", x=values)
    said = _python(tmp_path, "one", "-m", "difftrain", "compile", "waves.diff")
    assert "the step is compiled for " in said
    said = _python(tmp_path, "two", "-I", "waves", "--out", "run")
    assert "the compiled step is out of this file: " in said
    said = _python(
        tmp_path, "two", "-I", "waves", "--out", "run", "--resume", "auto", "--steps", "8"
    )
    assert "resumed at step 6" in said and "the compiled step is out of this file: " in said
