"""Networks that jump, on Gaussian data: at the exact jump the expected gradient vanishes."""

import pytest
import torch
from analytic import GAUSSIAN, Mixture, Nodes
from conftest import near, spec_of

import difftrain


def column(v):
    return v.reshape(-1, 1, 1)


def still(objective, wanted: str, nodes: Nodes, t, **given) -> None:
    """The error of the network's output says nothing more about xt: its mean, and that times xt."""
    data = {"x0": nodes.x0, "eps": nodes.eps, "t": t[nodes.place], **given}
    values = objective.evaluate((wanted, "xt"), data)
    error, xt = values[wanted].flatten(), values["xt"].flatten()
    near(nodes.mean(error), [0.0] * len(t))
    near(nodes.mean(error * xt), [0.0] * len(t))


def average_flow(x, t, cond=None, r=None):
    """(x - x_r) / (t - r), where x_r is on the curve of the flow through x."""
    mean, std = GAUSSIAN.means[0], GAUSSIAN.std
    t, r = column(t), column(r)
    wide = [((1 - v) ** 2 * std**2 + v**2).sqrt() for v in (t, r)]
    earlier = (1 - r) * mean + wide[1] / wide[0] * (x - (1 - t) * mean)
    return (x - earlier) / (t - r)


def test_the_average_flow_is_the_optimum():
    """arXiv:2505.13447 eq. 6."""
    text = "process = linear\nprediction_type = flow\nstrategy = mean_flow(p = 0)\n"
    spec = spec_of(f"{text}error = pred - target", backbone="custom(times = [t, r])")
    t = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    nodes = Nodes.of(GAUSSIAN, 3, 2)
    objective = difftrain.objective(spec, average_flow)
    still(objective, "error", nodes, t, r=(t / 2)[nodes.place])


@pytest.mark.parametrize("ramp", [0.0, 1.0])
def test_the_jump_to_data_is_the_optimum_of_its_tangent(ramp):
    """Data of mean 0 and the deviation of the process stand still along the path, so the jump
    returns its input: cos(t) x - sin(t) pred = x. Before the warm-up it is the flow itself."""

    def network(x, t, cond=None):  # is fed xt / data, and gives pred / data
        return -torch.tan(column(t) / 2) * x if ramp else torch.zeros_like(x)

    text = "process = trig(data = 0.5)\nprediction_type = flow\nstrategy = sct"
    objective = difftrain.objective(spec_of(text), network)
    t = torch.tensor([0.3, 0.8, 1.4], dtype=torch.float64)
    nodes = Nodes.of(Mixture((1.0,), (0.0,), 0.5), 3, 2)
    still(objective, "sct.g", nodes, t, **{"sct.ramp": torch.tensor(ramp, dtype=torch.float64)})
