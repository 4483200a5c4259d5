"""Time grids: published ones, diffusers, and what the options of a solver ask for."""

import math

import pytest
import torch
from conftest import spec_of
from diffusers import DDIMScheduler

from difftrain.language.horizon import horizon, own_shift
from difftrain.language.names import standard
from difftrain.language.spacing import READ
from difftrain.sampling import grids


class Trig:
    """alpha = cos t, sigma = sin t / 2."""

    def alpha(self, t):
        return t.cos()

    def sigma(self, t):
        return 0.5 * t.sin()


class Exploding:
    """alpha = 1, sigma = t."""

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return t


INDEX = ("index", 0, 1000)
UNIT = ("real", 0.0, 1.0)
SIGMA = ("open", 0.0, math.inf)
ANGLE = ("open", 0.0, math.pi / 2)


def made(law, levels=None, **options):
    return grids.grid(law, {"steps": 4, **grids.DEFAULTS, **options}, levels).tolist()


# ---- the grids


def test_index_grids_are_the_published_ones():
    assert grids.trailing(5, 1000).tolist() == [999, 799, 599, 399, 199, -1]
    assert grids.leading(5, 1000).tolist() == [800, 600, 400, 200, 0, -1]
    assert grids.leading(5, 1000, offset=1)[:2].tolist() == [801, 601]
    assert grids.uniform(5, 1000).tolist() == [999, 749, 500, 250, 0, -1]
    assert grids.trailing(1, 1000).tolist() == grids.uniform(1, 1000).tolist() == [999, -1]


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 7, 20, 30, 50, 1000])
def test_index_grids_are_those_of_diffusers(spacing, steps):
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    make = {"linspace": grids.uniform}.get(spacing) or getattr(grids, spacing)
    if (spacing, steps) != (
        "linspace",
        1,
    ):  # theirs has only the index 0 then: no noise to start on
        assert make(steps, 1000)[:-1].tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("count", [200, 500, 999, 1000])
def test_trailing_indices_are_those_of_diffusers_at_any_number_of_steps(count):
    """Theirs may have one time too many at the end, by a rounding of its length."""
    scheduler = DDIMScheduler(num_train_timesteps=count, timestep_spacing="trailing")
    for steps in range(1, 101):
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.tolist()
        assert grids.trailing(steps, count)[:-1].tolist() == theirs[:steps]
        assert theirs[steps:] in ([], [-1])


@pytest.mark.parametrize("steps", [0, 1001])
def test_more_steps_than_the_process_has_are_refused(steps):
    with pytest.raises(ValueError, match=f"`steps = {steps}` does not fit a process of 1000 steps"):
        grids.trailing(steps, 1000)


def test_continuous_grids():
    assert grids.shifted(4).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert grids.shifted(4, 3.0).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert grids.shifted(2, start=math.pi / 2).tolist() == pytest.approx([1.570796, 0.785398, 0])
    levels = grids.power(18)
    assert len(levels) == 19 and (levels.diff() < 0).all()
    assert levels[[0, 1, 17, 18]].tolist() == pytest.approx([80, 57.58598, 0.002, 0], rel=1e-5)


def test_shifting_keeps_the_ends():
    assert grids.shifted(3, 3.0, 1.5, 0.1)[[0, -1]].tolist() == pytest.approx([1.5, 0.1])


# ---- by the options of a solver


@pytest.mark.parametrize(
    ("law", "levels", "options", "expected"),
    [
        (INDEX, None, {}, [999, 749, 499, 249, -1]),
        (INDEX, None, {"grid": "leading"}, [750, 500, 250, 0, -1]),
        (INDEX, None, {"times": (759, 499), "steps": 3}, [999, 759, 499, -1]),
        (UNIT, None, {}, [1, 0.75, 0.5, 0.25, 0]),
        (UNIT, None, {"shift": 3.0}, [1, 0.9, 0.75, 0.5, 0]),
        (UNIT, None, {"shift": 1}, [1, 0.75, 0.5, 0.25, 0]),
        (SIGMA, Exploding(), {}, grids.power(4).tolist()),
        (SIGMA, Exploding(), {"grid": "even", "high": 8}, [8, 6, 4, 2, 0]),
        (SIGMA, Exploding(), {"rho": 3, "low": 0.1}, grids.power(4, 0.1, 80, 3).tolist()),
        (SIGMA, Exploding(), {"times": (), "steps": 1}, [80, 0]),
        (SIGMA, Exploding(), {"times": (0.8,), "steps": 1}, [80, 0.8, 0]),
        (ANGLE, Trig(), {"steps": 1}, [math.atan(160), 0]),
        (ANGLE, Trig(), {}, [math.atan(2 * s) for s in grids.power(4).tolist()]),
        (ANGLE, Trig(), {"times": (1.1,), "steps": 2}, [1.564546, 1.1, 0]),
    ],
)
def test_options_make_a_grid(law, levels, options, expected):
    assert made(law, levels, **options) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_times_are_shifted_as_they_were_trained_unless_the_solver_says_otherwise():
    asked = {"steps": 4, **grids.DEFAULTS}
    as_trained, other = (
        grids.grid(UNIT, {**asked, **more}, None, 3.0).tolist() for more in ({}, {"shift": 1})
    )
    assert as_trained == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert other == pytest.approx([1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize(
    ("lines", "shift"),
    [
        ("t ~ logit_normal(0.5, 1)", 1),
        ("t' = shift(t, 3)", 3),
        ("t ~ shift(uniform(0, 1), k = 2)\nt' = shift(t, 3)", 6),
        ("t' = shift(t, sqrt(numel(x0) / 4096))", 2),
        ("t ~ logit_normal(0, 1)\nt' = shift(t, 3)\nstrategy = mean_flow", 3),
    ],
)
def test_the_shift_that_an_objective_declares(lines, shift):
    text = f"process = linear\nprediction_type = flow\n{lines}"
    backbone = "custom(times = [t, r])" if "mean_flow" in lines else "custom"
    objective = spec_of(text, backbone=backbone).objective()
    assert own_shift(objective, 16_384) == pytest.approx(shift)
    assert math.isnan(own_shift(objective)) == ("numel" in lines)


def test_the_shift_of_a_process_from_the_library():
    objective = spec_of("process = sd.shifted(k = 3)\nprediction_type = flow", head="import std.sd")
    assert own_shift(objective.objective()) == 3


def test_a_process_that_reaches_less_noise_is_walked_as_far_as_it_goes():
    class Narrow(Exploding):
        def sigma(self, t):
            return 0.01 * 5000**t

    times = torch.tensor(made(("real", 0.0, 1.0), Narrow(), grid="power"))
    assert (
        times[0] == 1 and times[-2:].tolist() == pytest.approx([0, 0]) and (times.diff() <= 0).all()
    )


def test_a_solver_that_starts_afresh_does_not_go_down_to_the_lowest_level():
    assert made(SIGMA, Exploding(), times=(), steps=2) == pytest.approx(
        [*grids.power(3)[:2].tolist(), 0]
    )


@pytest.mark.parametrize(
    ("law", "options", "message"),
    [
        (UNIT, {"grid": "leading"}, "`grid = leading` does not fit this process, whose time is"),
        (INDEX, {"grid": "power"}, "use `trailing` or `leading` or `uniform`"),
        (INDEX, {"steps": 1001}, "`steps = 1001` does not fit a process of 1000 steps"),
        (INDEX, {"shift": 3}, "`shift` does nothing on the grid `trailing`: leave it out"),
        (UNIT, {"rho": 3}, "`rho` does nothing on the grid `even`: leave it out"),
        (SIGMA, {"shift": 3}, "`shift` does nothing on the grid `power`"),
        (SIGMA, {"low": 90}, "`low` is not below `high`"),
        (
            UNIT,
            {"times": (0.2, 0.5)},
            r"`times = \[0.2, 0.5\]` are not in order, or leave the process",
        ),
        (INDEX, {"times": (999,)}, "write times that fall, between 999 and -1"),
        (
            INDEX,
            {"times": (7.5,)},
            r"`times = \[7.5\]` are no whole numbers, and time is an index here",
        ),
        (
            INDEX,
            {"times": 7},
            r"`times` is a list of numbers: write one such as `times = \[700, 300\]`",
        ),
        (
            UNIT,
            {"times": 0},
            r"`times` is a list of numbers: write one such as `times = \[0.7, 0.3\]`",
        ),
        (UNIT, {"times": ((0.3,),)}, "`times` is a list of numbers: write one such as"),
        (SIGMA, {"times": (1, 2)}, "write times that fall, above 0"),
        (UNIT, {"times": (0.5,), "steps": 3}, "contradict each other: leave `steps` out"),
        (INDEX, {"times": (700,), "grid": "leading"}, "`grid = leading` begins at 0, and so above"),
        (UNIT, {"times": (True,)}, "`times` is a list of numbers"),
        (UNIT, {"steps": 3.5}, "`steps = 3.5` is not a whole number above 0: write a whole number"),
        (UNIT, {"steps": 0}, "`steps = 0` is not a whole number above 0"),
        (UNIT, {"steps": True}, "`steps = true` is not a whole number above 0"),
        (UNIT, {"shift": "two"}, '`shift = "two"` is not a number above 0'),
        (UNIT, {"grid": "odd"}, "`grid = odd` does not fit this process"),
        (SIGMA, {"rho": 0}, "`rho = 0` is not a number above 0: write a number such as 7"),
    ],
)
def test_what_does_not_fit_is_told(law, options, message):
    with pytest.raises(ValueError, match=message):
        grids.check(law, {"steps": 1, **grids.DEFAULTS, **options})


@pytest.mark.parametrize(
    ("law", "levels", "options", "below"),
    [(SIGMA, Exploding(), {"times": (100,)}, "80"), (ANGLE, Trig(), {"times": (1.57,)}, "1.56455")],
)
def test_times_above_the_first_one_are_told(law, levels, options, below):
    text = f"begin above where sampling begins: write times below {below}, or a larger `high`"
    with pytest.raises(ValueError, match=text):
        made(law, levels, **options, steps=1)


def test_the_options_are_those_of_the_library():
    (library,) = [names for names in standard() if ("solver", "euler") in names.own]
    formals = {f.name: f for f in library.own["solver", "euler"].node.formals}
    assert set(formals) == {"steps", "grid", *grids.DEFAULTS}
    usual = {name: formals[name].default.span.text for name in grids.DEFAULTS}
    assert usual == {name: str(value) for name, value in grids.DEFAULTS.items()}
    words = [item.dotted for item in formals["grid"].domain.items]
    assert set(words) == {"auto", *grids.INDEX, *READ}


# ---- where sampling begins and ends


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("process = ddpm(steps = 50)\nprediction_type = epsilon", ("index", 0, 50)),
        ("process = linear\nprediction_type = flow", UNIT),
        ("process = linear\nprediction_type = flow\nt ~ logit_normal(0, 1)", UNIT),
        ("process = linear\nprediction_type = flow\nt' = shift(t, 3)", UNIT),
        ("process = linear\nprediction_type = sample\nt ~ uniform(0.1, 0.9)", ("real", 0.1, 0.9)),
        ("process = linear\nprediction_type = flow\nt ~ earlier(uniform(0, 1), 0.5)", UNIT),
        ("process = vp\nprediction_type = epsilon", ("real", 0.00001, 1)),
        ("process = edm\nprediction_type = sample", SIGMA),
        ("process = edm\nprediction_type = sample\nt ~ log_normal(0, 1)", SIGMA),
        ("process = trig\nprediction_type = flow\nstrategy = trig_flow", ANGLE),
    ],
)
def test_the_times_of_a_process(lines, expected):
    kind, low, high = horizon(spec_of(lines).objective())
    assert (kind, low, high) == (expected[0], *map(pytest.approx, expected[1:]))
