"""Solvers of a user's own: made from ours, a function beside the spec, one of a package."""

import json
from inspect import signature
from pathlib import Path

import numpy as np
import pytest

from difftrain.cli import main
from difftrain.language.check import check
from difftrain.language.explain import explain
from difftrain.language.names import standard
from difftrain.language.scope import formals
from difftrain.language.tree import Source
from difftrain.sampling import grids, walks

# x0_hat, noised again to only a share of the next level: a solver that is not in the library
WALKER = """
def go(model, x, grid, draws, share=1.0):
    for step, (t, s) in enumerate(zip(grid[:-2], grid[1:-1]), 1):
        x0_hat, eps_hat = model.estimates(x, t.expand(len(x)))
        alpha, sigma = (level(s.expand(1)) for level in (model.alpha, model.sigma))
        mixed = share * eps_hat + (1 - share**2) ** 0.5 * draws.noise(step, x)
        x = (alpha * x0_hat + sigma * mixed).to(x.dtype)
    return model.estimates(x, grid[-2].expand(len(x)))[0]


def broken(model, x, grid, draws):
    raise KeyError("nothing here")


def shapeless(model, x, grid, draws):
    return x[:1]
"""
# what it gives depends on every option
NAMED = """

def named(model, x, grid, draws, calm, name, names):
    assert isinstance(calm, bool)
    return x * (len(name) + len("".join(names)) + calm)
"""
NETWORK = """
from torch import nn


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.line = nn.Linear(4, 4)

    def forward(self, x, t, cond):
        return self.line(x)


def network():
    return Line()
"""
SPEC = """diff 1
backbone line(codec = raw) {{ module = "blocks:network" }}
{solver}
objective o {{
  process         = linear
  prediction_type = flow
  backbone        = line
}}
data   {{ source = arrays("data.npz"), batch = 4 }}
train  {{ steps = 2, device = cpu, compile = off }}
sample {{ solver = {sample}, count = 2 }}
"""
BESIDE = 'solver mine(share in 0..1 = 1) from euler { module = "walker:go" }'


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with a spec that trains in a moment, and a solver of its own."""
    monkeypatch.chdir(tmp_path)

    def make(solver=BESIDE, sample="mine(steps = 3)"):
        np.savez("data.npz", x=np.random.default_rng(0).normal(size=(8, 1, 4)))
        Path("blocks.py").write_text(NETWORK)
        Path("walker.py").write_text(WALKER)
        Path("own.diff").write_text(SPEC.format(solver=solver, sample=sample))
        return tmp_path

    return make


def drawn(*more: str) -> np.ndarray:
    """What `sample` draws from the run: [2, 1, 4]."""
    assert main(["sample", "runs/own", "-o", "out.npz", *more]) == 0
    with np.load("out.npz") as file:
        return file["x"]


def test_a_solver_that_is_made_from_ours(own):
    """It is ours with other defaults, whatever it is called."""
    own("solver mine(steps = 4) from heun { }", "mine(s_churn = 2)")
    assert main(["train"]) == 0
    plain = drawn("--set", "sample.solver=heun(steps = 4, s_churn = 2)")
    np.testing.assert_array_equal(drawn(), plain)


def test_a_function_beside_the_spec_travels_with_the_run(own):
    """All its noise from ddim, share = 1, is ddim; less is another one."""
    own()
    assert main(["train"]) == 0
    Path("walker.py").unlink()
    np.testing.assert_allclose(drawn(), drawn("--set", "sample.solver=ddim(steps = 3)"), atol=1e-6)
    less = drawn("--set", "sample.solver.share=0.5")
    assert np.isfinite(less).all() and abs(less - drawn()).max() > 0.01


def test_samples_of_a_solver_of_ones_own_are_made_again_from_what_they_say(own):
    own(sample="mine(steps = 3, share = 0.5)")
    assert main(["train"]) == 0
    first = drawn()
    with np.load("out.npz") as file:
        said = json.loads(str(file["settings"]))["solver"]
    assert said.startswith("mine(steps = 3, share = 0.5, ")
    np.testing.assert_array_equal(drawn("--set", f"sample.solver={said}"), first)
    assert abs(drawn("--set", "sample.solver=mine(steps = 3)") - first).max() > 0.01


def test_truth_values_and_texts_are_made_again_from_what_is_said_of_them(own):
    """Also where a text looks like a word, or like more than one."""
    block = (
        'solver mine(calm in [true, false] = false, name = "a", names = ["b"], grid in [auto, even]'
        ' = even) from euler {{ module = "walker:{}" }}'
    )
    given = 'steps = 3, calm = true, name = "say \\"hi\\", \\\\o/", names = ["auto", "x, y"]'
    own(block.format("named"), f"mine({given})")
    with Path("walker.py").open("a") as file:
        file.write(NAMED)
    assert main(["train"]) == 0
    first = drawn()
    with np.load("out.npz") as file:
        said = json.loads(str(file["settings"]))["solver"]
    assert said.startswith(f"mine({given}, grid = even, ")
    np.testing.assert_array_equal(drawn("--set", f"sample.solver={said}"), first)
    assert abs(drawn("--set", "sample.solver=mine(steps = 3)") - first).max() > 0.01


def test_a_package_offers_a_solver(own, tmp_path, monkeypatch):
    """Out of tree: an entry point of the group `difftrain.solvers`, and its block in the spec."""
    own("solver mine(share in 0..1 = 1) from euler { module = wandering }")
    site = tmp_path / "site"
    info = site / "wander-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wander\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[difftrain.solvers]\nwandering = wander:go\n")
    Path("walker.py").rename(site / "wander.py")
    monkeypatch.syspath_prepend(str(site))
    assert main(["train"]) == 0
    np.testing.assert_allclose(drawn(), drawn("--set", "sample.solver=ddim(steps = 3)"), atol=1e-6)


WRONG = [
    (
        "solver mine from euler { module = wandering }",
        'there is no solver called `wandering`: say where: `module = "file:function"`',
    ),
    (
        "solver mine from euler { module = heunn }",
        "there is no solver called `heunn`: did you mean `heun`?",
    ),
    (
        'solver mine from euler { module = "walker:gone" }',
        "`walker` has no function `gone`: did you mean `go`?",
    ),
    (
        "solver mine(strength = 1) from heun { }",
        "the solver `heun` has no option `strength`: take it out of its block, or add it to the"
        " function",
    ),
    (
        'solver mine from euler { module = "walker:broken" }',
        "`walker:broken` fails (KeyError: 'nothing here'): mend that function",
    ),
    (
        'solver mine from euler { module = "walker:shapeless" }',
        "`walker:shapeless` gives [1, 1, 4]: return samples of the shape [2, 1, 4]",
    ),
]


@pytest.mark.parametrize(("solver", "says"), WRONG)
def test_what_is_wrong_is_one_sentence(own, capsys, solver, says):
    own(solver)
    assert main(["train"]) == 2
    assert capsys.readouterr().err.strip().split("\n")[-1] == f"error: {says}"


@pytest.mark.parametrize(
    ("block", "origin"),
    [
        (
            'solver mine from euler { module = "walker:go" }',
            "; `mine` is the function `go` of the Python module `walker`",
        ),
        (
            "solver mine from euler { module = wandering }",
            "; `mine` is what an installed package calls `wandering`",
        ),
        ("solver mine from euler { }", "; `mine` is made from `euler`"),
    ],
)
def test_a_page_says_where_a_solver_comes_from(block, origin):
    text = f"diff 1\n{block}\nobjective o {{\n  process = linear\n  prediction_type = flow\n"
    text += "  backbone = custom\n}\nsample { solver = mine(steps = 3) }\n"
    last = " ".join(explain(check(Source("a.diff", text))[0]).split("  sample: ")[1].split())
    assert last == (
        "mine(steps = 3, grid = auto, shift = auto, low = 0.002, high = 80, rho = 7), no guidance"
        + origin
    )


def test_each_solver_of_the_library_takes_its_options():
    """The same names and the same defaults, beside those of its grid."""
    (library,) = [names for names in standard() if ("solver", "euler") in names.own]
    blocks = {d.name: d for (kind, _), d in library.own.items() if kind == "solver"}
    assert blocks.keys() == walks.OURS.keys()
    for name, definition in blocks.items():
        usual = {n: f.default.span.text for n, (f, _) in formals(definition).items()}
        own = {n: text for n, text in usual.items() if n not in grids.OPTIONS}
        taken = list(signature(walks.OURS[name]).parameters.values())[4:]
        assert own.keys() == {parameter.name for parameter in taken}
        for parameter in taken:
            assert type(parameter.default)(own[parameter.name]) == parameter.default


def test_an_option_that_waits_for_another_is_told():
    text = (
        "diff 1\nobjective o { process = linear, prediction_type = flow, backbone = custom }\n"
        "sample { solver = heun(s_noise = 1.01, s_churn = 0) }\n"
    )
    (told,) = check(Source("a.diff", text))[1]
    assert (told.code, told.message) == ("DIF301", "`s_noise` of `heun` is set and never read")
    assert told.because == "`s_churn` is 0" and told.at.span.text == "s_noise = 1.01"
    assert not check(Source("a.diff", text.replace("s_churn = 0", "s_churn = 5")))[1]


NO_NAMES = [
    ("{ x ~ normal(0, 1) }", ["DIF106"]),
    ("{ reads' = [x0_hat] }", ["DIF106"]),
    ("{ reads = [1] }", ["DIF118"]),
    ("{ reads = x0_hat }", ["DIF118"]),
    ("{ levels = [1, 2] }", ["DIF118", "DIF118"]),
    ("{ together = [zzz, a] }", ["DIF118"]),
    ("{ together = [] }", []),
    ("{ levels = [b, a] }", []),
    ("{ levels = [a] }", ["DIF118"]),
    ("{ levels = [a, low, high] }", ["DIF118"]),
    ("{ levels = [] }", []),
    ("{ whole = [a] }", []),
    ("{ whole = [aa] }", ["DIF118"]),
    ("{ between = [aa] }", ["DIF118"]),
    ("{ module = 3 }", ["DIF118"]),
]


@pytest.mark.parametrize(("body", "codes"), NO_NAMES)
def test_what_a_block_lists_are_names(body, codes):
    top = f'solver mine(a in 0..9 = 1, b = "x") from euler {body}\n'
    assert [f.code for f in told("linear", "flow", "mine(a = 2)", top)] == codes


def told(process: str, prediction: str, solver: str, top: str = "") -> list:
    """The findings about a solver that samples an objective."""
    text = f"diff 1\n{top}objective o {{ process = {process}, prediction_type = {prediction}\n"
    text += f"  backbone = custom\n}}\nsample {{ solver = {solver} }}\n"
    return check(Source("a.diff", text))[1]


POINTED = [
    ("mine", "high = 40"),
    ("mine(high = 41)", "high = 41"),
    ("mine(steps = 3, shift = 2)", "high = 40"),
    ("mine(50)", "high = 40"),
    ("mine(0)", "0"),
]


@pytest.mark.parametrize(("solver", "place"), POINTED)
def test_an_option_is_shown_where_it_is_set(solver, place):
    top = "solver mine(steps = 9, high = 40) from euler { }\n"
    top = top.replace("= 9, high = 40", "in 0..9 = 9") if place == "0" else top
    (finding,) = told("linear", "flow", solver, top)
    assert (finding.code, finding.at.span.text) == ("DIF316", place)


@pytest.mark.parametrize(
    ("solver", "fits"),
    [
        ("multistep(times = [0.98])", True),
        ("multistep(grid = power, times = [0.98])", True),
        ("multistep(grid = power, times = [0.999])", False),
        ("multistep(grid = power, high = 1000, times = [0.99])", True),
    ],
)
@pytest.mark.parametrize("process", ["linear", "discrete(linear)"])
def test_times_begin_below_where_sampling_does(process, solver, fits):
    assert [f.code for f in told(process, "flow", solver)] == ([] if fits else ["DIF316"])
