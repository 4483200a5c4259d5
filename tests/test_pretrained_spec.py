"""Specs around pretrained folders: what disagrees, what is adopted, and a whole run from one."""

import json

import pipeline
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

import difftrain
from difftrain.cli import main
from difftrain.language.adopt import described, written_out
from difftrain.language.check import check
from difftrain.language.explain import explain
from difftrain.language.spec import read_text
from difftrain.language.tree import Source
from difftrain.training.bundle import compile_spec
from difftrain.training.known import Known
from difftrain.training.parts import build_parts
from difftrain.training.pretrained import disagreements

LOADED = 'sd.unet("sd", text = sd.clip("sd"), codec = sd.vae("sd"))'
ZERO = DDIMScheduler(**pipeline.SD, prediction_type="v_prediction", rescale_betas_zero_snr=True)


def text(
    process: str, prediction: str = "epsilon", backbone: str = "custom", body: str = ""
) -> str:
    return f"""diff 1
import std.sd
objective o {{
  process         = {process}
  prediction_type = {prediction}
  backbone        = {backbone}
  {body}
}}
"""


def compared(process: str, prediction: str = "epsilon", backbone: str = LOADED, body: str = ""):
    """What is said when a spec is compiled, and by `lint`."""
    spec, found = check(Source("o.diff", text(process, prediction, backbone, body)))
    assert not [f for f in found if f.code >= "DIF4"]
    return disagreements(spec)


def codes(*args, **more) -> list[tuple[str, str]]:
    return [(f.code, f.severity) for f in compared(*args, **more)]


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Saves a scheduler in `sd`, beside which specs are read."""
    monkeypatch.chdir(tmp_path)

    def save(scheduler):
        scheduler.save_pretrained(tmp_path / "sd" / "scheduler")
        return tmp_path

    return save


# ---- adopting a process


@pytest.mark.parametrize(
    ("scheduler", "prediction"),
    [
        (DDPMScheduler(**pipeline.SD), "epsilon"),
        (DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50), "sample"),
        (DDIMScheduler(), "epsilon"),
        (ZERO, "v_prediction"),
    ],
    ids=["scaled_linear", "cosine", "linear", "zero"],
)
def test_levels_are_those_of_the_scheduler(saved, scheduler, prediction):
    saved(scheduler)
    spec, found = check(Source("o.diff", text('sd.scheduler("sd")', prediction)))
    assert not found
    levels = difftrain.objective(spec, lambda x, t, cond: x).alphas_cumprod
    theirs = scheduler.alphas_cumprod.double()
    assert len(levels) == scheduler.config.num_train_timesteps
    # diffusers computes in float32, and keeps a little of the last level
    torch.testing.assert_close(levels, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_are_shifted_as_the_scheduler_does(saved, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    saved(scheduler)
    spec, found = check(Source("o.diff", text('sd.scheduler("sd")', "flow")))
    assert not found
    objective = difftrain.objective(spec, lambda x, t, cond: x)
    uniform = torch.arange(1, 1001).flip(0) / 1000
    t = objective.evaluate(("t",), {"x0": torch.zeros(1000, 1), "t": uniform})["t"]
    torch.testing.assert_close(t, scheduler.sigmas)


def test_the_law_of_an_objective_is_shifted_too(saved):
    saved(FlowMatchEulerDiscreteScheduler(shift=3.0))
    own = "t ~ logit_normal(0, 1)\n  t' = shift(t, 3)"
    first, second = (
        check(Source("o.diff", text(process, "flow", body=body)))[0].objective().quantity("loss")
        for process, body in (("linear", own), ('sd.scheduler("sd")', "t ~ logit_normal(0, 1)"))
    )
    assert first is second


def test_paths_are_beside_the_spec_or_as_given(saved, monkeypatch):
    home = saved(ZERO)
    (home / "deep").mkdir()
    monkeypatch.chdir(home / "deep")
    file = home / "sd" / "scheduler" / "scheduler_config.json"
    beside = str(home / "o.diff")
    for path, spec in (("sd", beside), (str(file), "o.diff"), ("../sd", "o.diff")):
        assert not check(Source(spec, text(f'sd.scheduler("{path}")', "v_prediction")))[1]


def test_explain_shows_the_adopted_process(saved):
    saved(ZERO)
    spec, _ = check(Source("o.diff", text('sd.scheduler("sd")', "v_prediction")))
    page = " ".join(explain(spec).split())
    adopted = "ddpm(beta = scaled_linear(0.00085, 0.012), steps = 1000, terminal_snr = zero)"
    assert f'process = {adopted}, from sd.scheduler("sd")' in page
    assert "process =" not in explain(check(Source("o.diff", text(adopted, "v_prediction")))[0])


def test_the_rules_see_the_adopted_process(saved):
    saved(ZERO)
    (finding,) = check(Source("o.diff", text('sd.scheduler("sd")', "epsilon")))[1]
    assert finding.code == "DIF203"
    assert finding.also[0].span.text == "terminal_snr = zero"
    assert finding.also[0].span.source.path == 'sd.scheduler("sd")'


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"beta_schedule": "sigmoid"}, "the scheduler's betas `sigmoid` are not known here"),
        (
            {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5},
            "`EDMEulerScheduler` has no betas",
        ),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "the scheduler shifts times by the size of the picture",
        ),
        ([], "the scheduler's configuration `sd/scheduler/scheduler_config.json` is not a mapping"),
    ],
)
def test_schedulers_that_have_no_equal_are_told(saved, config, said):
    file = saved(ZERO) / "sd" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(config))
    (finding,) = check(Source("o.diff", text('sd.scheduler("sd")')))[1]
    assert (finding.code, finding.message) == ("DIF401", said)
    file.unlink()
    (finding,) = check(Source("o.diff", text('sd.scheduler("sd")')))[1]
    assert finding.message == "`sd` holds no scheduler_config.json"


def test_a_spec_is_written_out_to_stand_alone(saved):
    saved(FlowMatchEulerDiscreteScheduler(shift=3.0))
    source = Source("o.diff", text('sd.scheduler("sd")', "flow"))
    alone = Source("elsewhere/o.diff", written_out(source).text)
    assert "process         = sd.shifted(k = 3.0)\n" in alone.text
    first, second = (check(s)[0].objective().quantity("loss") for s in (source, alone))
    assert first is second
    assert written_out(alone) is alone


def test_absent_settings_are_those_of_diffusers():
    named = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")
    spelt_out = {name: DDPMScheduler().config[name] for name in named}
    assert described({}) == described(spelt_out)


# ---- what disagrees


def test_a_spec_that_agrees_is_not_spoken_of(saved):
    pipeline.save(saved(ZERO) / "sd", ZERO)
    assert compared('sd.scheduler("sd")', "v_prediction") == []
    same = "ddpm(beta = scaled_linear, steps = 1k, terminal_snr = zero)"
    assert compared(same, "v_prediction") == []


def test_both_values_are_told(saved):
    pipeline.save(saved(ZERO) / "sd", ZERO)
    found = compared("ddpm(beta = scaled_linear(0.00085, 0.012), steps = 500)", "epsilon")
    trained = "and the network in `sd` was trained with"
    assert [f.message for f in found] == [
        f"`steps = 500` here, {trained} `steps = 1000`",
        f"`terminal_snr = free` here, {trained} `terminal_snr = zero`",
        f"`epsilon` here, {trained} `v_prediction`",
    ]
    assert {f.severity for f in found} == {"warning"}


def test_what_cannot_work_is_an_error(saved):
    home = saved(DDPMScheduler(**pipeline.SD))
    pipeline.save(home / "sd", vae=lambda: pipeline.vae(channels=8), unet=lambda: pipeline.unet(8))
    narrow = 'sd.unet("sd", text = sd.clip(width = 32))'
    assert codes("ddpm", backbone=narrow) == [("DIF406", "error"), ("DIF408", "error")]


def test_latents_of_another_codec_are_told(saved):
    pipeline.save(saved(ZERO) / "sd")
    (finding,) = compared("ddpm", backbone='sd.unet("sd", text = sd.clip("sd"))')
    assert finding.code == "DIF407"
    assert "trained with latents `(z - 0.1) * 0.18215`" in finding.message
    assert finding.help == 'write `codec = sd.vae("sd")`'


@pytest.mark.parametrize(
    ("process", "body", "expected"),
    [
        ("linear", "", [("DIF405", "warning")]),
        ("linear", "t' = shift(t, 3)", []),
        ("sd.shifted(3)", "", []),
        ('sd.scheduler("sd")', "", []),
        ("linear", "t ~ logit_normal(0, 1)", []),  # a law of its own may mean any shift
    ],
)
def test_shifts_of_time(saved, process, body, expected):
    saved(FlowMatchEulerDiscreteScheduler(shift=3.0))
    backbone = 'sd.unet("sd", time_scale = 1000)'
    assert codes(process, "flow", backbone=backbone, body=body) == expected


def test_an_own_process_with_the_same_levels_agrees(saved):
    saved(DDPMScheduler(**pipeline.SD))
    own = """process mine {
  t ~ integer(1000)
  alpha = pick(sqrt(cumprod(1 - scaled_linear(0.00085, 0.012, count(1000), 1000))), t)
  sigma = sqrt(1 - alpha^2)
}
prediction noise { target = eps }
"""
    whole = text("mine", "noise", 'sd.unet("sd")') + own
    assert disagreements(check(Source("o.diff", whole))[0]) == []


@pytest.mark.parametrize("weights", ["nowhere", "./nowhere", "somebody/unreachable"])
def test_what_is_not_there_says_nothing(saved, monkeypatch, weights):
    saved(ZERO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert compared("ddpm", backbone=f'sd.unet("{weights}")') == []


def test_a_process_from_the_hub_is_written_out(saved, monkeypatch):
    home = saved(FlowMatchEulerDiscreteScheduler(shift=3.0))
    entry = home / "cache" / "models--someone--tiny"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("0" * 40)
    (entry / "snapshots").mkdir()
    (entry / "snapshots" / ("0" * 40)).symlink_to(home / "sd")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (finding,) = compared("linear", "flow", 'sd.unet("someone/tiny", time_scale = 1000)')
    assert finding.help == "write `process = sd.shifted(k = 3.0)` unless the change is meant"


def test_a_folder_without_a_scheduler_says_nothing_of_it(saved):
    home = saved(ZERO)
    pipeline.unet().save_pretrained(home / "alone")
    assert compared("ddpm", backbone='sd.unet("alone", text = sd.clip(width = 16))') == []
    assert codes("ddpm", backbone='sd.unet("alone")') == [("DIF408", "error")]


def test_a_broken_file_is_told_once(saved):
    (saved(ZERO) / "sd" / "scheduler" / "scheduler_config.json").write_text("{")
    assert codes("ddpm") == [("DIF402", "warning")]


# ---- the whole pipe


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder with four pictures, a pretrained pipeline and the spec around it."""
    monkeypatch.chdir(tiny.home(tmp_path, backbone=LOADED))
    pipeline.save(tmp_path / "sd")
    return tmp_path


def adopting(home) -> None:
    spec = home / "tiny.diff"
    whole = spec.read_text().replace(
        "ddpm(beta = scaled_linear(0.00085, 0.012))", 'sd.scheduler("sd")'
    )
    spec.write_text(whole)


def test_lint_says_nothing_and_train_tells(run, capsys):
    assert main(["lint", "tiny.diff"]) == 0
    assert "no findings" in capsys.readouterr().err
    assert main(["train", "tiny.diff", "--steps", "2"]) == 0
    said = capsys.readouterr().err
    assert "warning[DIF404]: `v_prediction` here, and the network in `sd` was trained with" in said
    assert (run / "runs" / "tiny" / "checkpoints" / "step-000000002.safetensors").is_file()


def test_errors_end_the_run_before_it_starts(run, capsys):
    spec = run / "tiny.diff"
    spec.write_text(spec.read_text().replace('sd.clip("sd")', "sd.clip(width = 32)"))
    assert main(["train", "tiny.diff"]) == 1
    assert "error[DIF408]: text of width 32 here" in capsys.readouterr().err
    assert not (run / "runs").exists()


def test_the_weights_are_those_of_the_folder(run):
    objective = check(read_text("tiny.diff"))[0].objective()
    parts = build_parts(objective, Known(), 0, "cpu")
    student = parts.modules["student"].module
    for module, folder in (
        (student, "unet"),
        (parts.codec.model, "vae"),
        (parts.text.model, "text_encoder"),
    ):
        (file,) = (run / "sd" / folder).glob("*.safetensors")
        loaded = module.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in load_file(file).items())
    assert (parts.codec.scale.item(), parts.codec.shift.item()) == pytest.approx((0.18215, 0.1))
    assert not any(p.requires_grad for p in parts.text.parameters())


def test_pickled_weights_end_the_run(run, capsys):
    (file,) = (run / "sd" / "unet").glob("*.safetensors")
    file.rename(file.with_suffix(".bin"))
    assert main(["train", "tiny.diff", "--steps", "2"]) == 2
    assert "is a pickle, which can run code when it is read" in capsys.readouterr().err


def test_a_bundle_needs_no_scheduler_file(run, monkeypatch):
    adopting(run)
    bundle = compile_spec("tiny.diff")
    (run / "sd" / "scheduler" / "scheduler_config.json").unlink()
    levels = bundle.read().objective().quantity("alpha")
    assert "sd.scheduler" not in bundle.texts["spec.diff"] and levels.op == "pick"
