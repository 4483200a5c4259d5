import json
import math
from pathlib import Path

import pytest
import tiny
import torch

import difftrain
from difftrain.compiler.objective import Objective
from difftrain.language.check import check
from difftrain.language.tree import Source

SHAPE = (2, 1, 2, 2)
torch.set_num_threads(1)  # the networks here are too small to share


@pytest.fixture(scope="session")
def golden() -> dict:
    """Reference numbers: see tests/README.md."""
    return json.loads((Path(__file__).parent / "golden.json").read_text())


@pytest.fixture
def x0():
    return torch.arange(8, dtype=torch.float64).sin().reshape(SHAPE)


@pytest.fixture
def eps():
    return torch.arange(8, dtype=torch.float64).cos().reshape(SHAPE)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Makes a folder with a spec and pictures, to run in."""

    def make(**parts):
        monkeypatch.chdir(tiny.home(tmp_path, **parts))
        return tmp_path

    return make


@pytest.fixture(autouse=True)
def compiling_afresh():
    """A run forbids compiling anything twice; that holds for its process, not for the next test."""
    yield
    torch._dynamo.config.error_on_recompile = False


def wide(t: torch.Tensor) -> torch.Tensor:
    return t.double().reshape(-1, 1, 1, 1)


def student(x, t, cond=None, r=None):
    """F(x, tau) = 0.30 x + 0.10 tau (+ 0.05 r)."""
    out = 0.30 * x + 0.10 * wide(t)
    return out if r is None else out + 0.05 * wide(r)


def on_index(network, count: int = 1000):
    """The network of a discrete process: it receives the index and divides it by `count`."""
    return lambda x, t, cond=None: network(x, t.double() / count, cond)


def spec_of(body: str, name: str = "o", backbone: str = "custom", head: str = ""):
    """The checked spec of one objective with this body."""
    text = f"diff 1\n{head}\nobjective {name} {{\n{body}\nbackbone = {backbone}\n}}\n"
    spec, found = check(Source("test.diff", text))
    if errors := [f for f in found if f.severity == "error"]:
        raise difftrain.SpecError(errors)
    return spec


def declare(body: str, network=student) -> Objective:
    """The objective with this body around a network."""
    return difftrain.objective(spec_of(body), network)


def near(value, expected, tolerance: float = 1e-9):
    """Asserts that a tensor holds the expected numbers."""
    value = value.detach() if isinstance(value, torch.Tensor) else torch.tensor(value)
    expected = torch.tensor(expected, dtype=torch.float64).reshape(-1)
    gap = (value.double().reshape(-1) - expected).abs().max().item()
    assert gap <= tolerance and not math.isnan(gap), (value.reshape(-1), expected)


def pytest_collection_modifyitems(config, items):
    """Tests that need a GPU are left out, not skipped, where there is none."""
    if not torch.cuda.is_available():
        wanted = [i for i in items if "gpu" not in i.keywords]
        config.hook.pytest_deselected(items=[i for i in items if "gpu" in i.keywords])
        items[:] = wanted
