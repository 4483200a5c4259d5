"""Settings: what a path means, what a value may be, and where mistakes are told."""

import pytest

import difftrain
from difftrain.language.check import check
from difftrain.language.finding import SpecError
from difftrain.language.tree import Source

TEXT = """diff 1
param gamma in 1..20 = 5
objective o {
  process         = ddpm(scaled_linear, 500)
  prediction_type = v_prediction
  strategy        = [min_snr(gamma), dream]
  align           = mse(x0_hat, x0)
  loss            = fit + 0.1 * align
  backbone        = custom
}
train { optimizer = adamw(1e-5), resume_from = "" }
"""


def read(path: str, value: object, text: str = TEXT):
    return check(Source("spec.diff", text), {path: value})


def changed(path: str, value: object, text: str = TEXT):
    spec, found = read(path, value, text)
    assert found == []
    return spec


def number(spec, name: str) -> float:
    return spec.objective().quantity(name).value


# ---- places


@pytest.mark.parametrize(
    ("path", "value", "name", "expected"),
    [
        ("gamma", 3, "min_snr.gamma", 3),
        ("gamma", "2 * 4", "min_snr.gamma", 8),
        ("process.steps", 50, "process.steps", 50),
        ("min_snr.gamma", 7, "min_snr.gamma", 7),
        ("dream.p", "0.5", "dream.p", 0.5),
        ("o.dream.p", 2, "dream.p", 2),
        ("o.process.steps", 20, "process.steps", 20),
    ],
)
def test_numbers_of_an_objective(path, value, name, expected):
    text = TEXT if path != "min_snr.gamma" else TEXT.replace("param gamma in 1..20 = 5\n", "")
    text = text.replace("min_snr(gamma)", "min_snr(2)") if text is not TEXT else text
    assert number(changed(path, value, text), name) == expected


@pytest.mark.parametrize(
    ("path", "value", "block", "option", "expected"),
    [
        ("train.steps", 200, "train", "steps", 200),
        ("train.steps", "100k", "train", "steps", 100_000),
        ("train.precision", "bf16", "train", "precision", "bf16"),
        ("train.resume_from", "auto", "train", "resume_from", "auto"),
        ("train.resume_from", '"auto"', "train", "resume_from", "auto"),
        ("train.resume_from", 'runs/a "b"', "train", "resume_from", 'runs/a "b"'),
        ("data.size", "128px", "data", "size", 128),
        ("data.batch", 4, "data", "batch", 4),
        ("sample.prompts", ["a red apple", "two"], "sample", "prompts", ("a red apple", "two")),
    ],
)
def test_options(path, value, block, option, expected):
    assert changed(path, value).runs[block][option] == expected


@pytest.mark.parametrize(
    ("path", "value", "block", "option", "argument", "expected"),
    [
        ("train.optimizer.lr", 0.001, "train", "optimizer", "lr", 0.001),
        ("train.optimizer.weight_decay", 0, "train", "optimizer", "weight_decay", 0),
        ("sample.solver.steps", 7, "sample", "solver", "steps", 7),
        ("data.source.split", "dev", "data", "source", "split", "dev"),
    ],
)
def test_arguments_of_options(path, value, block, option, argument, expected):
    text = TEXT + 'data { source = folder("photos") }\n'
    spec = changed(path, value, text)
    assert spec.runs[block][option].options[argument] == expected


def test_an_argument_given_by_position_is_replaced():
    spec = changed("process.beta", "cosine")
    assert number(spec, "process.steps") == 500


def test_slots():
    spec = changed("prediction_type", "epsilon")
    assert spec.objective().slots["prediction_type"][0].definition.name == "epsilon"
    spec, found = read("strategy", "[]")
    assert not spec.objective().slots["strategy"]
    assert [f.code for f in found] == ["DIF302"]


def test_a_slot_that_is_not_there_is_added():
    text = TEXT.replace("  strategy        = [min_snr(gamma), dream]\n", "").replace("param", "#")
    assert changed("strategy", "dream", text).objective().slots["strategy"]


def test_equations_and_draws():
    loss = changed("align", "mse(eps_hat, eps)").objective().quantity("loss")
    assert loss is not check(Source("spec.diff", TEXT))[0].objective().quantity("loss")
    text = TEXT.replace("  align ", "  t ~ integer(500)\n  align ")
    assert changed("t", "integer(100)", text).objective().quantity("t").args[0].value == 100


def test_a_name_in_front_where_there_are_several_objectives():
    second = TEXT[TEXT.index("objective") : TEXT.index("train")].replace(
        "objective o", "objective p"
    )
    spec = changed("p.process.steps", 20, TEXT + second)
    steps = {n: o.quantity("process.steps").value for n, o in spec.objectives.items()}
    assert steps == {"o": 500, "p": 20}
    _, (finding,) = read("process.steps", 20, TEXT + second)
    assert finding.code == "DIF150"
    assert finding.help == "write `--set o.process.steps=…`"


def test_several_settings():
    spec, found = check(Source("spec.diff", TEXT), {"gamma": 3, "process.steps": 40})
    assert found == []
    assert number(spec, "min_snr.gamma") == 3
    assert number(spec, "process.steps") == 40
    assert spec.settings == {"gamma": "3", "process.steps": "40"}


# ---- mistakes


@pytest.mark.parametrize(
    ("path", "value", "code", "at"),
    [
        ("gamma", 30, "DIF130", "30"),
        ("gamma", "foo", "DIF120", "foo"),
        ("gamma", "3 +", "DIF015", ""),
        ("gamma", "3\nx = 4", "DIF151", "gamma = 3\nx = 4"),
        ("gamma", "", "DIF015", ""),
        ("gama", 3, "DIF150", "gama"),
        ("train.stepz", 3, "DIF150", "train.stepz"),
        ("train.precision", "bf17", "DIF131", "bf17"),
        ("train.steps", -1, "DIF130", "-1"),
        ("train.optimizer.lrr", 1, "DIF111", "lrr"),
        ("process.stepz", 1, "DIF111", "stepz"),
        ("dream.p", "-1", "DIF130", "-1"),
        ("prediction_type", "velocity", "DIF119", "velocity"),
    ],
)
def test_mistakes_point_at_the_setting(path, value, code, at):
    _, (finding,) = read(path, value)
    assert (finding.code, finding.at.span.text) == (code, at)
    assert finding.place[0] == f"--set {path}"


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("gama", "gamma"),
        ("steps", "train.steps"),
        ("train.stepz", "train.steps"),
        ("onnx.precision", "export.onnx.precision"),
        ("tensorrt.refitt", "export.tensorrt.refit"),
    ],
)
def test_did_you_mean(path, meant):
    _, (finding,) = read(path, 3)
    assert finding.help == f"write `--set {meant}=…`"


def test_a_setting_may_make_a_spec_wrong():
    _, (finding,) = read("process.terminal_snr", "zero", TEXT.replace("v_prediction", "epsilon"))
    assert finding.code == "DIF203"


def test_from_python(tmp_path):
    file = tmp_path / "spec.diff"
    file.write_text(TEXT)
    spec = difftrain.read(file, set={"gamma": 3, "train.compile": "off", "train.steps": 2_000})
    assert spec.runs["train"]["steps"] == 2_000
    with pytest.raises(SpecError) as problem:
        difftrain.read(file, set={"gamma": 30})
    assert [f.code for f in problem.value.findings] == ["DIF130"]
