"""Solvers that draw noise, by the law of what they make of Gaussian data: nothing is sampled.

There a solver is an affine map of x and of every draw. Run on a basis it says its coefficients, and
so the exact mean and variance of its end: how these near those of the data is its weak order.
"""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from test_solvers import EXPLODING, LINEAR, MEAN, STD, TRIG

from difftrain.sampling import grids, solvers

EXACT = 1e-12


class Basis:
    """Draws of which that for the move to `grid[step]` is 1 in row step + 1 alone."""

    def noise(self, step, like):
        drawn = torch.zeros_like(like)
        drawn[step + 1] = 1
        return drawn


def errors(solver, model, grid):
    """What the end of a solver is off by, in mean, variance and covariance with the start, where
    the start has the law that data have at `grid[0]`.

    The covariance is that of data with what the forward process made of them: alpha STD^2.
    """
    x = torch.zeros(len(grid) + 1, 1, dtype=torch.float64)
    x[1] = 1
    first, *rest = solver(model, x, grid, Basis())[:, 0].tolist()
    kept, *drawn = (end - first for end in rest)
    alpha, sigma = (float(level(grid[:1])) for level in (model.alpha, model.sigma))
    spread = (alpha * STD) ** 2 + sigma**2
    mean = first + kept * alpha * MEAN
    variance = kept**2 * spread + sum(c**2 for c in drawn)
    return mean - MEAN, variance - STD**2, kept * spread - alpha * STD**2


def orders(solver, model, walks):
    """log2 of how much nearer mean and variance get from each grid to the next, of those that are
    not exact."""
    seen = zip(*(errors(solver, model, grid)[:2] for grid in walks), strict=True)
    inexact = [off for off in seen if max(map(abs, off)) > EXACT]
    return [math.log2(abs(a / b)) for off in inexact for a, b in pairwise(off)]


def even(start):
    return [grids.shifted(n, start=start) for n in (128, 256, 512)]


def logarithmic(model, end):
    """Times that are even in the logarithm of sigma / alpha, then the clean end."""
    noise = [torch.logspace(0.6, -5, n, dtype=torch.float64) for n in (128, 256, 512)]
    return [torch.cat([grids.at_noise(model, s, 0, end), s.new_zeros(1)]) for s in noise]


ENDS = [(LINEAR, 1.0), (EXPLODING, 9.0), (TRIG, 1.57)]
FORWARD = [  # as noisy as the forward process
    solvers.ancestral,
    partial(solvers.ancestral, variance="large"),
    partial(solvers.ddim, eta=1.0),
    partial(solvers.dpm_solver_pp, scale=1.0),
]


# scale = 1 is better than that on EXPLODING, and 2 on LINEAR: what leads in the error vanishes
@pytest.mark.parametrize(
    ("model", "start", "scale"),
    [
        (LINEAR, 1.0, 0.5),
        (LINEAR, 1.0, 1.0),
        (EXPLODING, 4.0, 0.5),
        (EXPLODING, 4.0, 2.0),
        (TRIG, 1.5, 0.5),
        (TRIG, 1.5, 1.0),
        (TRIG, 1.5, 2.0),
    ],
)
def test_euler_maruyama_is_of_weak_order_one(model, start, scale):
    found = orders(partial(solvers.euler_maruyama, scale=scale), model, even(start))
    assert found and found == pytest.approx([1] * len(found), abs=0.1)


@pytest.mark.parametrize("solver", [*FORWARD[:3], partial(solvers.ddim, eta=0.5)])
@pytest.mark.parametrize(("model", "end"), ENDS)
def test_ancestors_are_of_weak_order_one(solver, model, end):
    found = orders(solver, model, logarithmic(model, end))
    assert found == pytest.approx([1, 1], abs=0.07)  # of the variance: the mean is exact


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("model", "end"), ENDS)
def test_dpm_solver_pp_with_noise_is_of_weak_order_two(model, end, scale):
    solver = partial(solvers.dpm_solver_pp, scale=scale)
    found = orders(solver, model, logarithmic(model, end))
    assert found == pytest.approx([2, 2], abs=0.05)


@pytest.mark.parametrize("s_churn", [0.5, 2.0])
@pytest.mark.parametrize(("model", "start"), [(LINEAR, 1.0), (EXPLODING, 4.0), (TRIG, 1.5)])
def test_churn_leaves_the_order_of_heun(model, start, s_churn):
    found = orders(partial(solvers.heun, s_churn=s_churn), model, even(start))
    assert found and found == pytest.approx([2] * len(found), abs=0.15)


@pytest.mark.parametrize("solver", FORWARD)
@pytest.mark.parametrize(("model", "start"), [(LINEAR, 0.9), (EXPLODING, 4.0), (TRIG, 1.5)])
def test_the_posterior_leaves_data_as_near_to_their_noise_as_they_were(solver, model, start):
    assert abs(errors(solver, model, grids.shifted(16, start=start))[2]) < EXACT
