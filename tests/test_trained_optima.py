"""A compiled step trains a network on Gaussian data until it predicts what is known to be best."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from analytic import GAUSSIAN, PATHS, Nodes, row
from torch import nn

import difftrain
from difftrain.compiler.heads import LogVariance
from difftrain.compiler.layout import gather, layout
from difftrain.training import state as states
from difftrain.training.bundle import compile_text

SPEC = """diff 1
objective o {{
  process         = {process}
  prediction_type = {prediction}
  strategy        = [{strategy}]
  backbone        = custom
}}
train {{
  optimizer = adamw({rate}, weight_decay = 0)
  precision = fp32, warmup = 10, decay = cosine
}}
"""
STEPS, BATCH = 400, 256
MEAN, STD = GAUSSIAN.means[0], GAUSSIAN.std


class Bent(nn.Module):
    """out = slope(t) x + shift(t), both sums of Chebyshev polynomials of a time in -1..1; 0 at
    first."""

    def __init__(self, place, count: int):
        super().__init__()
        self.place, self.weight = place, nn.Parameter(torch.zeros(2, count))

    def forward(self, x, t, cond=None):
        u = self.place(t.to(x.dtype)).reshape(-1, 1, 1)
        basis = [torch.ones_like(u), u]
        for _ in range(self.weight.shape[1] - 2):
            basis.append(2 * u * basis[-1] - basis[-2])
        slope, shift = (sum(w * v for w, v in zip(p, basis, strict=True)) for p in self.weight)
        return slope * x + shift


def mean_of_target(process: str, prediction: str):
    """E[target | xt = x] at t."""
    path = PATHS[process]

    def best(x, t):
        levels, (a, b) = path.levels(t), row(prediction, path, t)
        x0 = GAUSSIAN.clean(x, levels)
        return a * x0 + b * (x - levels[0] * x0) / levels[1]

    return best


def jump_to_data(x, t):
    """cos(t) x - sin(t) pred = the clean end, as many deviations from the mean as x is."""
    alpha, sigma = PATHS["trig"].levels(t)
    size = ((alpha * STD) ** 2 + sigma**2).sqrt()
    end = MEAN + STD / size * (x - alpha * MEAN)
    return (alpha * x - end) / t.sin()


@dataclass(frozen=True)
class Case:
    """`place` maps the time that the network is told to -1..1; of a jump, so that the optimum is a
    line in it: a longer sum, whose own slope is in its tangent, converges slowly."""

    process: str
    prediction: str
    strategy: str
    place: Callable
    best: Callable
    rate: float = 0.03
    count: int = 8

    @property
    def text(self) -> str:
        named = vars(self) | {"process": PATHS[self.process].text}
        return SPEC.format(**named)


CASES = {
    "noise": Case(
        "ddpm",
        "epsilon",
        "",
        lambda index: 2 * (index / 999).sqrt() - 1,
        mean_of_target("ddpm", "epsilon"),
    ),
    "flow": Case("linear", "flow", "", lambda t: 2 * t - 1, mean_of_target("linear", "flow")),
    "levels": Case(
        "edm",
        "sample",
        "edm_precondition(1)",
        lambda c_noise: (c_noise + 0.3).tanh(),
        mean_of_target("edm", "sample"),
    ),
    "jump": Case(
        "trig",
        "flow",
        "sct(warmup = 50)",
        lambda t: 2 * (t / 2).tan() - 1,
        jump_to_data,
        rate=0.01,
        count=2,
    ),
}


def train(text: str, network: nn.Module) -> None:
    """Trains the network in place by the compiled step of a spec."""
    modules = {"student": network, "logvar": LogVariance()}
    step = compile_text("o", text).module("step.py")
    plan = layout(modules)
    state = states.fresh(gather(modules, plan, "cpu"), 0, STEPS)
    tables = {name: table.float() for name, table in step.tables().items()}
    made = torch.Generator().manual_seed(0)
    for k in range(STEPS):
        x0 = MEAN + STD * torch.randn(BATCH, 4, 4, generator=made)
        batch = {"x0": x0, "index": torch.arange(BATCH * k, BATCH * (k + 1))}
        step.step(state, batch, modules, plan, tables)


def distance(case: Case, network: Bent) -> torch.Tensor:
    """How far the prediction is from the best one at each time, root mean square over xt, [T]."""
    t = PATHS[case.process].t()
    nodes = Nodes.of(GAUSSIAN, len(t), 2)
    objective = difftrain.objective(compile_text("o", case.text).read(), network)
    given = {"x0": nodes.x0, "eps": nodes.eps, "t": t[nodes.place]}
    values = objective.evaluate(("pred", "xt"), given)
    error = values["pred"].detach() - case.best(values["xt"], given["t"][:, None, None])
    return nodes.mean((error**2).flatten()).sqrt()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_training_reaches_the_optimum(case):
    """To 0.04, where the data deviate by 0.5 and the noise by 1."""
    network = Bent(case.place, case.count)
    assert distance(case, copy.deepcopy(network).double()).max() > 0.2
    train(case.text, network)
    assert distance(case, network.double()).max() < 0.04
