"""What `explain` and `diff` say."""

import pytest

from difftrain.language.check import check
from difftrain.language.equations import equations
from difftrain.language.explain import explain
from difftrain.language.likeness import compare
from difftrain.language.tree import Source

PATH = "process path { t ~ uniform(0, 1), alpha = cos(pi * t / 2), sigma = sin(pi * t / 2) }\n"
FLOW = "process = linear\nprediction_type = flow"


def spec_of(body: str, run: str = "", before: str = "", backbone: str = "custom"):
    text = f"diff 1\n{before}objective o {{\n{body}\nbackbone = {backbone}\n}}\n{run}"
    spec, found = check(Source("o.diff", text))
    assert not [f for f in found if f.severity == "error"], found
    return spec


def lines_of(body: str, **more) -> dict[str, str]:
    derivation = spec_of(body, **more).objective().derivation()
    return {line.name: f"{line.sign} {line.text}" for line in equations(derivation)}


PAGE = """\
objective o  in o.diff

equations, after every redefinition
  t      ~ uniform(0, 1)
  alpha  = 1 - t
  sigma  = t
  eps    ~ noise(x0)
  xt     = alpha * x0 + t * eps
  flow   = eps - x0
  target = flow
  pred   = network(xt, t, cond)
  x0_hat = xt - t * pred
  fit    = mean((pred - flow)^2)
  loss   = fit

arguments
  none

time
  t ~ uniform(0, 1)
  logsnr from inf (data) to -inf (noise)
  p(lambda) is exact: t is a monotone map of one draw

prediction
  pred stands for a * x0 + b * eps with a = -1, b = 1
  det = alpha * b - sigma * a = 1

cost of a step
  1 forward with gradient, 0 forwards without

weight of each squared error
  (pred - target)^2  1
  (x0_hat - x0)^2    1 / t^2
  (eps_hat - eps)^2  1 / alpha^2
  (v_hat - v)^2      1 / (alpha^2 + t^2)
  one weight written on each error; v = (alpha * eps - sigma * x0) / sqrt(alpha^2 + sigma^2)
  reduced by the mean over the numbers of a sample, then over the batch

weight of each noise level (lambda = logsnr)
           t     alpha     sigma       snr    logsnr p(lambda)    weight w(lambda)
        0.02      0.98      0.02      2401     7.784    0.0098         1 0.0004165
         0.1       0.9       0.1        81     4.394     0.045         1  0.002268
        0.25      0.75      0.25         9     2.197   0.09375         1  0.006803
         0.4       0.6       0.4      2.25    0.8109      0.12         1   0.01361
         0.5       0.5       0.5         1         0     0.125         1   0.02041
         0.6       0.4       0.6    0.4444   -0.8109      0.12         1   0.03061
        0.75      0.25      0.75    0.1111    -2.197   0.09375         1   0.06122  #
         0.9       0.1       0.9   0.01235    -4.394     0.045         1    0.1837  ###
        0.98      0.02      0.98 0.0004165    -7.784    0.0098         1         1  ################
  w(lambda) = 2 * weight * (det / alpha)^2 * p(lambda), scaled: 1 stands for 49

run
  conditions: never dropped
  network: `custom` reads xt, t, cond
  data: this spec has no `data` block
  train: this spec has no `train` block
  sample: this spec has no `sample` block
"""


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("process = ddpm(linear, 50)\nprediction_type = epsilon",
         "  ddpm: beta = linear, steps = 50, terminal_snr = free\n"),
        ("process = edm\nprediction_type = sample\nstrategy = ct(0.7, 0.01, 2 * 500)",
         "  ct: data = 0.7, low = 0.01, total = 1000, start = 2, end = 150, decay = 0.9,"),
        (FLOW + "\nstrategy = importance(logit_normal(0, 1))",
         "  importance: law = logit_normal(0, 1)\n"),
    ],
)  # fmt: skip
def test_what_each_argument_was_given(body, says):
    assert says in explain(spec_of(body))


def test_page():
    assert explain(spec_of(FLOW)) == PAGE


def test_run():
    run = "data { batch = 8 }\ntrain { steps = 5k, precision = bf16 }\nsample { guidance = 3 }\n"
    page = explain(spec_of(FLOW + "\nstrategy = drop_condition(0.2)", run))
    text = " ".join(page.split())
    assert "conditions: dropped for a sample with probability 0.2" in text
    assert "data: emoji64(), 64 px, 8 samples a step" in text
    assert "5000 steps, forwards in bf16, weights in fp32, averaged with decay 0.999" in text
    assert "guidance u + 3 * (c - u), where 1 is none" in text


@pytest.mark.parametrize(
    ("law", "run", "says"),
    [
        ("t' = shift(t, 3)", "solver = euler", "times shifted by 3 as they were trained"),
        (
            "t' = shift(t, sqrt(numel(x0) / 4096))",
            "solver = euler",
            "times shifted as they were trained",
        ),
        (
            "strategy = drop_condition(0.1)",
            "guidance = 2, guidance_interval = 0.1..3, guidance_rescale = 0.5",
            "where sigma / alpha is in [0.1, 3], rescaled by 0.5",
        ),
        ("", 'guidance = 2, guide = "runs/small"', "where 1 is none, u from runs/small"),
    ],
)
def test_how_samples_are_made(law, run, says):
    page = explain(spec_of(f"{FLOW}\n{law}", f"sample {{ {run} }}\n"))
    assert says in " ".join(page.split())


def test_a_shift_that_the_solver_states_is_not_that_of_training():
    page = explain(spec_of(f"{FLOW}\nt' = shift(t, 3)", "sample { solver = euler(shift = 2) }\n"))
    assert "as they were trained" not in page


def test_an_earlier_version_has_a_number():
    lines = lines_of("process = ddpm\nprediction_type = epsilon\nstrategy = [offset_noise, dream]")
    assert lines["eps@1"] == "= eps@0 + 0.1 * offset_noise.level"
    assert lines["eps"] == "= eps@1 + sigma * stop(eps@1 - eps_hat@1)"
    assert lines["eps_hat@1"] == "= pred@1"
    assert lines["pred@1"] == "= network(xt@1, t, cond)"
    assert list(lines).index("eps@0") < list(lines).index("eps@1") < list(lines).index("eps")


def test_a_law_and_what_moves_it():
    lines = lines_of(FLOW + "\nt ~ logit_normal(0, 1)\nt' = shift(t, 3)")
    assert lines["t@0"] == "~ sigmoid(normal(0, 1))"
    assert lines["t"] == "= 3 * t@0 / (1 + 2 * t@0)"


def test_a_replacement_is_named():
    body = FLOW + "\ns = t / 2\ntarget' = stop(pred(t = s))"
    lines = lines_of(body)
    assert lines["target"] == "= stop(pred(t = s))"
    assert lines["pred(t = s)"] == "= network(xt(t = s), s, cond)"


def test_a_derivative_is_named():
    body = FLOW + "\nr ~ uniform(0, 1)\ntarget' = stop(target - (t - r) * ddt(pred))"
    lines = lines_of(body, backbone="custom(times = [t, r])")
    assert lines["target"] == "= stop(flow - (t - r) * ddt(pred))"
    assert lines["pred"] == "= network(xt, t, cond, r = r)"


def test_dropped_rows():
    lines = lines_of(FLOW + "\nstrategy = drop_condition(0.1)")
    assert lines["dropped"] == "~ bernoulli(0.1)"
    assert lines["pred"] == "= network(xt, t, if dropped then null else cond)"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("fit' = huber(pred, target, 0.1)", "none: no part of the loss is a weight times a square"),
        ("loss = fit + sse(pred, target)", "none: its parts are reduced in different ways"),
        ("fit' = sse(pred, target)", "reduced by the sum over the numbers of a sample (numel(x0)"),
        ("extra = mean(cosine(pred, target))\nloss = fit - extra", "beside it: -extra"),
        ("t' = shift(t, 1 + step / 1000)", "numbers below are for step = 1000"),
        ("t ~ earlier(uniform(0, 1), 0.5)", "p(lambda) is counted over 2048 points"),
    ],
)
def test_remarks(body, says):
    assert says in explain(spec_of(f"{FLOW}\n{body}"))


def test_index():
    text = explain(spec_of("process = ddpm(steps = 100)\nprediction_type = epsilon"))
    assert "indices 0 to 99, logsnr from" in text
    assert "p(lambda) of an index is its share over the distance to the level before" in text
    assert "  (pred - target)^2  1\n  (x0_hat - x0)^2    snr\n" in text


def test_every_objective_of_a_file():
    text = "diff 1\n" + "".join(
        f"objective {n} {{\n{FLOW}\nbackbone = custom\n}}\n" for n in ("one", "two")
    )
    spec, _ = check(Source("two.diff", text))
    assert explain(spec).count("objective ") == 2
    assert explain(spec, "two").startswith("objective two  in two.diff\n")


# ---- two specs


def told(first, second) -> tuple[bool, list[str]]:
    verdict = compare(first, second)
    return verdict.same, verdict.text.splitlines()


def test_the_same_equations():
    again = spec_of("prediction_type = flow\nprocess = linear\nfit = mse(pred, target)")
    assert told(spec_of(FLOW), again) == (True, ["`o`: the same equations"])


def test_the_same_up_to_a_constant():
    other = spec_of("process = path\nprediction_type = v_prediction\nfit' = 3 * fit", before=PATH)
    same, lines = told(spec_of(FLOW), other)
    assert same
    assert lines == [
        "`o`: the same objective up to a constant: w(lambda) of B is 1.90986 times that of A",
        "  the networks return different things: a * x0 + b * eps with a = -1, b = 1 in A, "
        "a * x0 + b * eps with a = -sigma, b = alpha in B",
    ]


def test_another_weight():
    body = "process = path\nprediction_type = epsilon"
    first, second = spec_of(body, before=PATH), spec_of(body + "\nstrategy = p2", before=PATH)
    same, lines = told(first, second)
    assert not same
    assert lines[0] == "`o`: another objective: w(lambda) of B is not that of A"
    assert lines[1].split() == ["logsnr", "w", "of", "A", "w", "of", "B", "B", "/", "A"]
    assert "  A: fit = mean((pred - eps)^2)" in lines


def test_fewer_levels():
    first, second = spec_of(FLOW), spec_of(FLOW + "\nt ~ uniform(0.1, 0.9)")
    same, lines = told(first, second)
    assert not same
    assert "though w(lambda) of B is 1.25 times that of A where both train" in lines[0]
    assert lines[1] == "  logsnr goes from -inf to inf in A, -4.394 to 4.394 in B"


def test_another_strategy():
    same, lines = told(spec_of(FLOW), spec_of(FLOW + "\nstrategy = dream"))
    assert not same
    assert lines[0] == "`o`: another objective"
    assert "  A: eps ~ noise(x0)" in lines and "  A: no `eps@0`" in lines


def test_another_run():
    first = spec_of(FLOW, "train { steps = 10 }\n")
    second = spec_of(FLOW, "train { steps = 20, optimizer = adamw(0.01) }\ndata { batch = 4 }\n")
    same, lines = told(first, second)
    assert not same
    assert lines[:2] == ["`o`: the same equations", "train.steps: 10 in A, 20 in B"]
    assert (
        lines[2].startswith("train.optimizer: adamw(") and lines[3] == "only B has a `data` block"
    )
