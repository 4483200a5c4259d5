"""Checking whole files: it never raises, and says each thing once and in order."""

import random
import re
import time
from pathlib import Path

import pytest

from difftrain.language.check import check, need
from difftrain.language.codes import split_examples
from difftrain.language.spec import read_text
from difftrain.language.tree import Source

ROOT = Path(__file__).parent.parent
SPECS = sorted((ROOT / "specs").rglob("*.diff"))
OBJECTIVE = (
    "objective o {{\n  process = {}\n  prediction_type = {}\n  {}\n  backbone = custom\n}}\n"
)


def found_in(text: str, settings=None, path: str = "spec.diff"):
    return check(Source(path, text), settings)[1]


def said(process: str, prediction: str, body: str = "", top: str = "") -> list[str]:
    """The codes of what is said about an objective."""
    return [
        f.code for f in found_in("diff 1\n" + top + OBJECTIVE.format(process, prediction, body))
    ]


@pytest.mark.parametrize("path", SPECS, ids=lambda p: p.stem)
def test_shipped_specs_are_clean(path):
    assert check(read_text(path))[1] == []


def test_a_library_of_ones_own_is_clean():
    text = """diff 1
    weighted(e, w = 2) = w * e
    process early { t ~ uniform(0, 0.5), alpha = 1 - t, sigma = t }
    prediction noisy { target = 2 * eps }
    strategy heavier(w in 0..10 = 2) { fit' = weighted(fit, w) }
    """
    assert found_in(text) == []


def test_broken_syntax_is_the_only_thing_spoken_of():
    text = "diff 1\nobjective o {\n  process = linar\n  prediction_type = = flow\n}\n"
    assert [f.code for f in found_in(text)] == ["DIF015"]


def test_findings_are_in_the_order_of_their_places():
    text = "diff 1\nparam unused = 3\n" + OBJECTIVE.format("linear", "flow", "loss = fitt + alhpa")
    found = found_in(text)
    assert [f.place for f in found] == sorted(f.place for f in found)


def test_warnings_stay_on_the_spec():
    spec, found = check(Source("spec.diff", "diff 1\n" + OBJECTIVE.format("linear", "epsilon", "")))
    assert [f.severity for f in found] == ["warning"]
    assert spec.findings == tuple(found)


def test_a_long_chain_of_equations_is_no_trouble():
    chain = "\n".join(f"a{i} = a{i - 1} + 1" for i in range(1, 400))
    body = f"a0 = 1\n{chain}\nloss = a399 * fit"
    assert said("linear", "flow", body) == []


def test_a_large_spec_is_checked_in_no_time():
    body = "\n".join(f"a{i} = mse(pred, x0) * {i}" for i in range(100))
    total = " + ".join(f"a{i}" for i in range(100))
    start = time.perf_counter()
    assert said("ddpm", "v_prediction", f"{body}\nloss = fit + {total}") == []
    assert time.perf_counter() - start < 3


# ---- damage


def damaged(text: str, rng: random.Random) -> str:
    """The text with one word or sign replaced by another."""
    words = [
        "x0",
        "eps",
        "t",
        "pred",
        "fit",
        "snr",
        "stop",
        "again",
        "dot",
        "ddt",
        "dream",
        "0",
        "foo",
    ]
    tokens = re.findall(r"\w+'?|\s+|.", text)
    at = rng.choice([i for i, token in enumerate(tokens) if token.strip()])
    tokens[at] = rng.choice(words if re.match(r"\w", tokens[at]) else list("+-*/(),=~^"))
    return "".join(tokens)


def examples() -> list[str]:
    files = sorted((ROOT / "tests" / "rules").glob("DIF[123]*.diff"))
    parts = [p for f in files for p in split_examples(f.read_text(encoding="utf-8"))]
    return [p.text for p in parts if p.kind in ("good", "bad")]


@pytest.mark.parametrize("seed", range(8))
def test_damage_is_told_and_never_raised(seed):
    rng, texts = random.Random(seed), examples()
    counts = [len(found_in(damaged(rng.choice(texts), rng))) for _ in range(60)]
    assert max(counts) <= 6


# ---- imports


def test_what_is_imported_is_checked_like_ones_own(tmp_path):
    (tmp_path / "own.diff").write_text("diff 1\nstrategy heavier(w) { fit' = w * fitt }\n")
    text = "diff 1\nimport own\n" + OBJECTIVE.format("linear", "flow", "strategy = own.heavier(2)")
    (finding,) = found_in(text, path=str(tmp_path / "spec.diff"))
    assert (finding.code, finding.at.span.text) == ("DIF120", "fitt")
    assert finding.place[0] == str(tmp_path / "own.diff")


def test_imports_may_be_in_several_files(tmp_path):
    (tmp_path / "a.diff").write_text("diff 1\nimport b\nstrategy heavier { fit' = b.twice(fit) }\n")
    (tmp_path / "b.diff").write_text("diff 1\ntwice(e) = 2 * e\n")
    text = "diff 1\nimport a\n" + OBJECTIVE.format("linear", "flow", "strategy = a.heavier")
    assert found_in(text, path=str(tmp_path / "spec.diff")) == []


# ---- blocks that a command needs


@pytest.mark.parametrize(
    ("blocks", "command", "missing"),
    [
        ("", "train", ["`data`", "`train`"]),
        ("train { steps = 5 }", "train", ["`data`"]),
        ("train { steps = 5 }\ndata { batch = 2 }", "compile", []),
        ("", "sample", ["`sample`"]),
        ("", "lint", []),
    ],
)
def test_missing_blocks(blocks, command, missing):
    spec, _ = check(
        Source("spec.diff", "diff 1\n" + OBJECTIVE.format("linear", "flow", "") + blocks)
    )
    asked = [re.search(r"a (`\w+`) block", f.message)[1] for f in need(spec, command)]
    assert asked == missing


def test_what_help_adds_is_enough():
    text = "diff 1\n" + OBJECTIVE.format("linear", "flow", "")
    spec, _ = check(Source("spec.diff", text))
    added = [f.help.split("`")[1] for f in need(spec, "train")]
    spec, found = check(Source("spec.diff", text + "\n".join(added)))
    assert found == need(spec, "train") == []


# ---- rules, where one example does not tell enough


@pytest.mark.parametrize("process", ["ddpm(steps = 50)", "ddpm(beta = cosine)", "linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "flow"])
def test_what_the_shipped_processes_and_predictions_say(process, prediction):
    expected = {
        ("linear", "epsilon"): ["DIF203"],
        ("linear", "v_prediction"): ["DIF205"],
    }
    if prediction == "flow" and process != "linear":
        expected[process, prediction] = ["DIF201"]
    assert said(process, prediction) == expected.get((process, prediction), [])


def test_a_zero_at_the_data_end_is_fine():
    assert said("linear", "sample") == []


def test_a_zero_between_the_points_of_the_grid_is_found():
    top = "prediction mixed { target = 1.7 * eps + 2.9 * x0 }\n"
    assert said("linear", "mixed", top=top) == ["DIF203"]


def test_a_pole_is_no_zero():
    top = "prediction far { target = eps / (t - 0.37) }\n"
    assert said("linear", "far", "t ~ uniform(0, 0.9)", top) == []


def test_a_redefined_time_counts():
    assert said("linear", "epsilon", "t' = 0.9 * t") == []
    assert said("ddpm(steps = 100, terminal_snr = zero)", "epsilon", "t ~ integer(99)") == []


@pytest.mark.parametrize(
    "target", ["xt", "2 * xt", "stop(xt)", "t * xt", "alpha * x0 + sigma * eps"]
)
def test_every_way_to_ask_for_the_input(target):
    assert said("linear", "flow", f"target' = {target}") == ["DIF204"]


@pytest.mark.parametrize("target", ["xt - x0", "2 * target", "stop(target - t * ddt(pred))"])
def test_other_targets_are_fine(target):
    assert said("linear", "flow", f"target' = {target}") == []


@pytest.mark.parametrize(
    ("process", "law", "codes"),
    [
        ("linear", "t ~ logit_normal(0, 1)", []),
        ("linear", "t ~ mode(1.29)", []),
        ("linear", "t' = shift(t, 3)", []),
        ("linear", "t ~ uniform(0, 1.1)", ["DIF206"]),
        ("linear", "t ~ normal(0, 1)", ["DIF206"]),
        ("linear", "t = 0.5", []),
        ("linear", "t ~ integer(2)", ["DIF206"]),
        ("ddpm", "t ~ integer(500)", []),
        ("ddpm", "t ~ integer(2000)", ["DIF206"]),
        ("ddpm", "t' = 999 - t", []),
        ("ddpm", "t' = t / 2", ["DIF206"]),
    ],
)
def test_where_t_may_go(process, law, codes):
    prediction = "flow" if process == "linear" else "v_prediction"
    assert said(process, prediction, law) == codes


NO_VALUE = [
    ("(snr - 2)^0.5 * mse(pred, target)", ["DIF220"]),
    ("log(snr - 2) * mse(pred, target)", ["DIF220"]),
    ("mean(sqrt(t - 0.5) * (pred - target)^2)", ["DIF220"]),
    ("mean((pred - target)^1.5)", ["DIF220"]),
    ("mean(acos(2 * t) * (pred - target)^2)", ["DIF220"]),
    ("(if t > 0.5 then sqrt(t - 0.5) else 0) * mse(pred, target)", []),
    ("max(snr - 2, 0)^0.5 * mse(pred, target)", []),
    ("mean(abs(pred - target)^1.5)", []),
    ("mean((pred - target)^3)", []),
    ("sqrt(sse(pred, target))", []),
    ("acos(cosine(x0, xt)) * (pred - target)^2", ["DIF207"]),
]


@pytest.mark.parametrize(("fit", "codes"), NO_VALUE)
def test_roots_and_logarithms_of_what_may_be_negative(fit, codes):
    assert said("linear", "flow", f"loss = {fit}") == codes


@pytest.mark.parametrize(
    ("index", "codes"),
    [
        ("t - 1", ["DIF221"]),
        ("t + 1", ["DIF221"]),
        ("1000", ["DIF221"]),
        ("999", []),
        ("max(t - 1, 0)", []),
        ("min(t + 0.5, 999)", []),
        ("step", []),
    ],
)
def test_entries_of_tables(index, codes):
    assert said("ddpm", "epsilon", f"loss = alpha(t = {index}) * fit") == codes


@pytest.mark.parametrize(
    ("process", "codes"),
    [
        ("discrete(linear, steps = 1, spacing = even)", ["DIF220"]),
        ("discrete(linear, steps = 2, spacing = even)", []),
        ("discrete(linear, steps = 1)", []),
        ("ve(low = 50, high = 0.01)", ["DIF205"]),
        ("ddpm(beta = linear(0.02, 2))", ["DIF220"]),
    ],
)
def test_paths_without_a_value(process, codes):
    prediction = "flow" if "discrete" in process else "epsilon"
    assert said(process, prediction) == codes


@pytest.mark.parametrize("noise", ["eps ~ uniform(0, 1)", "eps = 3", "eps ~ bernoulli(0.5)"])
def test_noise_has_the_shape_of_the_data(noise):
    assert said("linear", "flow", noise) == ["DIF121"]


ONE_CAUSE = {
    "strategy = drop_condition(10)": "DIF130",
    "strategy = edm_precondition(data = 0)": "DIF130",
    "strategy = meanflow\n  times = 2": "DIF119",
    "strategy = [sct, scd]": "DIF120",
    "t ~ normal(0, 1)": "DIF206",
    "strategy = importance(uniform)": "DIF120",
    "loss = dream * fit": "DIF120",
}


@pytest.mark.parametrize(("line", "code"), ONE_CAUSE.items())
def test_one_cause_is_one_finding(line, code):
    assert [c for c in said("linear", "flow", line) if c != "DIF304"] == [code]


ODD = "process odd { t ~ uniform(0, log(-1)), alpha = 1 - t, sigma = t }"
SINGLE = """process single(n in 1..9 = 1) {
  t ~ integer(n)
  alpha = pick(level, t)
  level = sqrt(cumprod(0.5 + count(n)))
  sigma = sqrt(1 - alpha^2)
}"""
BESIDE_A_RUN = [
    ("", "discrete(linear, steps = 1, spacing = even)", "euler", ["DIF220"]),
    (ODD, "odd", "euler(steps = 1)", ["DIF220"]),
    (SINGLE, "single", "ddim(steps = 1)", []),
    (SINGLE, "single", "ddim(steps = 2)", ["DIF316"]),
]


@pytest.mark.parametrize(("top", "process", "solver", "codes"), BESIDE_A_RUN)
def test_a_process_of_one_time_or_none_beside_a_run(top, process, solver, codes):
    text = f"diff 1\n{top}\n{OBJECTIVE.format(process, 'sample', '')}"
    assert [f.code for f in found_in(f"{text}sample {{ solver = {solver} }}")] == codes


def test_a_base_is_applied_once_however_it_comes():
    assert said("trig", "flow", "strategy = [sct, scd]") == []
    assert said("trig", "flow", "strategy = [trig_flow, scd]") == []


@pytest.mark.parametrize(
    ("inputs", "written"),
    [("w", "lcm.w"), ("lcm.ww", "lcm.w"), ("guesss", "guess"), ("lcm.w", "")],
)
def test_what_a_network_is_given_is_looked_for(inputs, written):
    body = "process = ddpm, prediction_type = epsilon, strategy = lcm"
    text = f"diff 1\nobjective o {{\n {body}\n backbone = custom(inputs = [{inputs}])\n}}\n"
    assert [f.help for f in found_in(text)] == ([f"write `{written}`"] if written else [])


def test_a_tap_is_one_of_the_blocks():
    backbone = "objective o {{\n process = linear, prediction_type = flow, strategy = repa\n{}}}\n"
    text = "diff 1\nimport std.sit\n" + backbone
    for tap, codes in ((12, []), (13, ["DIF217"]), (0, ["DIF217"])):
        found = found_in(text.format(f" backbone = sit.s2(tap = {tap})\n"))
        assert [f.code for f in found] == codes


SNR_WEIGHTS = [
    ("min(snr, 5) * mse(x0_hat, x0)", []),
    ("min(snr, 5) * mse(pred, target)", ["DIF209"]),
    ("mse(eps_hat, eps) * min(3, snr)", ["DIF209"]),
    ("min(snr, 5) / 2 * mse(pred, target)", []),
    ("(1 + snr)^(-1) * mse(eps_hat, eps)", []),
    ("mse(eps, eps_hat) / (snr + 1)^0.5", []),
    ("mse(pred, target) / (1 + snr)", ["DIF209"]),
    ("snr * mse(pred, target)", []),
]


@pytest.mark.parametrize(("fit", "codes"), SNR_WEIGHTS)
def test_weights_and_their_residuals(fit, codes):
    assert said("ddpm", "v_prediction", f"fit' = {fit}") == codes
    assert said("ddpm", "v_prediction", f"loss = {fit} + mse(x0_hat, x0)") == codes


def test_a_weight_before_an_equal_residual_is_right():
    assert said("ddpm", "sample", "fit' = min(snr, 5) * mse(pred, target)") == []
    assert said("ddpm", "epsilon", "fit' = mse(pred, target) / (1 + snr)") == []


def test_what_a_sampler_reads_is_read():
    assert said("linear", "flow", "x0_hat' = max(min(x0_hat, 1), -1)") == []


def test_parameters_of_a_strategy_that_is_thrown_away_are_told_once():
    strategies = "strategy = [p2(k = 2, g = 0.5), min_snr(gamma = 3)]"
    assert said("ddpm", "v_prediction", strategies) == ["DIF211"]


def test_a_parameter_may_be_used_by_another_parameter_or_an_option():
    text = "diff 1\nparam a = 2\nparam b = a * 3\n" + OBJECTIVE.format(
        "linear", "flow", "loss = b * fit"
    )
    assert found_in(text) == []
    text = (
        "diff 1\nparam n = 50\n" + OBJECTIVE.format("linear", "flow", "") + "train { steps = n }\n"
    )
    assert found_in(text) == []


def test_definitions_may_be_used_through_others():
    top = "twice(e) = 2 * e\nfour(e) = twice(twice(e))\nstrategy big { fit' = four(fit) }\n"
    assert said("linear", "flow", "strategy = big", top) == []


def test_a_wrong_law_names_the_same_one_for_this_process():
    (finding,) = found_in(
        "diff 1\n" + OBJECTIVE.format("linear", "flow", "t ~ log_normal(0.2, 1.6)")
    )
    assert "`t ~ logit_normal(0.2, 1.6)`" in finding.help


def test_help_was_tried_out():
    (finding,) = found_in("diff 1\n" + OBJECTIVE.format("linear", "epsilon", ""))
    first, second = re.findall(r"`([^`]*)`", finding.help)
    assert said("linear", first) == []
    assert said("linear", "epsilon", second) == []


def test_what_a_base_needs_is_needed_by_what_is_made_from_it():
    text = """diff 1
strategy mine from consistency { needs = [alpha <= 2] }
objective o { process = ve, prediction_type = epsilon, strategy = mine, backbone = custom }
"""
    _, found = check(Source("test.diff", text))
    assert "DIF205" in [f.code for f in found]


def test_a_computed_number_that_is_whole_is_whole():
    text = "diff 1\nparam n = 7 / 2\n" + OBJECTIVE.format("linear", "flow", "")
    spec, found = check(Source("a.diff", text + "train { steps = 1000 / 2, keep = 2 * n }\n"))
    steps, keep = (spec.runs["train"][name] for name in ("steps", "keep"))
    assert found == [] and (steps, keep) == (500, 7)
    assert type(steps) is type(keep) is int


def test_a_parameter_may_be_given_as_a_range_where_one_goes():
    text = "diff 1\nparam n = 2..4\n" + OBJECTIVE.format("linear", "flow", "")
    spec, found = check(Source("a.diff", text + "export { onnx { batch = n } }\n"))
    assert found == [] and spec.runs["onnx"]["batch"] == (2, 4)
    assert [f.code for f in found_in(text + "train { steps = n }\n")] == ["DIF124"]


def test_words_and_a_range_may_stand_together():
    text = "diff 1\nstrategy s(p in [auto, 0..2] = auto) { fit' = p * fit }\n"
    told = [f.code for f in check(Source("a.diff", text.replace("0..2", "2..0")))[1]]
    assert not check(Source("a.diff", text))[1] and told == ["DIF132"]
