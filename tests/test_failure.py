"""Errors of what lies below: compilers and their caches, in words."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from difftrain.commands.failure import BUG, failure

ROOT = Path(__file__).parent.parent
COMPILES = """
import torch
from difftrain.cli import guarded
from difftrain.compiler.lowering import compiler

step = compiler(False)(lambda x: x.sin() + 1)
raise SystemExit(guarded(lambda: int(step(torch.zeros(9)).sum()) - 9))
"""


def compiles(cache: Path) -> tuple[int, str]:
    """The exit code and the messages of a process that compiles a step."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", COMPILES], capture_output=True, text=True, env=env)
    return done.returncode, done.stderr


def test_a_compiled_library_that_was_cut_off(tmp_path):
    cache = tmp_path / "cache"
    assert compiles(cache) == (0, "")
    (library,) = cache.rglob("*.main.so")
    os.truncate(library, 0)
    assert compiles(cache) == (
        2,
        f"error: the compiled library `{library}` is cut off, as a killed run leaves it: remove the"
        f" folder `{cache}`, which is filled anew, and try again\n",
    )


@pytest.mark.parametrize("library", ["/usr/lib/libgomp.so", "/usr/lib/ib/libmlx5.so"])
def test_a_library_elsewhere_is_not_to_be_removed(library):
    assert "remove" not in str(failure(OSError(f"{library}: file too short")))
    assert failure(ImportError(f"{library}: file too short")).code == BUG
