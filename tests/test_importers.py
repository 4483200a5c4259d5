"""Other trainers' configurations as specs."""

import pytest

from difftrain.importers import ConfigError, convert
from difftrain.language.check import check
from difftrain.language.format import format_text
from difftrain.language.tree import Source

FULL = """\
model:
  pretrained_model_name_or_path: runs/base
  prediction_type: v_prediction
train:
  dream_training: true
  dream_detail_preservation: 0.5
  precision: bf16
  learning_rate: 1e-5
  adam_weight_decay: 0.01
  train_batch_size: 4
  gradient_accumulation_steps: 4
  max_train_steps: 10000
  lr_scheduler: cosine
  lr_warmup_steps: 500
  max_grad_norm: 1.0
  snr_gamma: 5.0
  noise_offset: 0.1
  input_perturbation: 0.05
  use_ema: true
  ema_decay: 0.999
  seed: 7
  resume_from: latest
scheduler:
  beta_schedule: scaled_linear
  beta_start: 0.00085
  beta_end: 0.012
  num_train_timesteps: 1000
  rescale_betas_zero_snr: true
  timestep_spacing: trailing
data:
  path: photos
  caption_column: text
  resolution: 512
report_to: wandb
eval_every: 100
save_every: 500
"""

SPEC = """\
diff 1
# From full.yaml, by `difftrain import`.
# `scheduler` is read here; that trainer took the scheduler of the pretrained model, so compare
#   the two
# `train.gradient_accumulation_steps`: 4 samples 4 times a step are one batch of 16
# `report_to` was not used: losses and pictures are always written for TensorBoard
import std.sd

objective full {
  process = ddpm(
    beta = scaled_linear(low = 0.00085, high = 0.012), steps = 1000, terminal_snr = zero
  )
  prediction_type = v_prediction
  strategy = [offset_noise(0.1), input_perturbation(0.05), dream(p = 0.5), min_snr(5)]
  backbone = sd.unet(
    weights = "runs/base",
    text = sd.clip(weights = "runs/base"),
    codec = sd.vae(weights = "runs/base")
  )
}

data {
  source = folder("photos", caption = "text")
  size   = 512px
  batch  = 16
}

train {
  steps        = 10000
  warmup       = 500
  clip         = 1
  seed         = 7
  save_every   = 500
  sample_every = 100
  precision    = bf16
  optimizer    = adamw(lr = 1e-05, weight_decay = 0.01)
  decay        = cosine
  ema          = 0.999
  resume_from  = "auto"
}

sample {
  solver = ddim(grid = trailing)
}
"""


def spec_of(tmp_path, text: str, name: str = "full.yaml") -> str:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return convert(path)


def body(text: str) -> str:
    """The spec without its comments and alignment."""
    lines = [" ".join(line.split()) for line in text.splitlines() if not line.startswith("#")]
    return "\n".join(lines)


def remarks(text: str) -> str:
    lines = [line.lstrip("# ") for line in text.splitlines()[2:] if line.startswith("#")]
    return " ".join(lines)


def findings(text: str):
    return check(Source("x.diff", text))[1]


def test_everything(tmp_path):
    text = spec_of(tmp_path, FULL)
    assert body(text) == body(SPEC)
    assert remarks(text) == remarks(SPEC)
    assert [f for f in findings(text) if f.severity != "note"] == []
    assert format_text(Source("x.diff", text)) == text


@pytest.mark.parametrize(
    "empty", ["model: {}\n", "train:\n  precision: 'no'\n", "loss: {type: mse}\n"]
)
def test_almost_nothing(tmp_path, empty):
    text = spec_of(tmp_path, empty)
    assert [f for f in findings(text) if f.severity != "note"] == []
    assert "prediction_type = epsilon" in body(text)
    assert remarks(text) == "no data was named: the emoji set that comes with difftrain stands in"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {dream_detail_preservation: 2}", "`train.dream_training` is not on"),
        ("train: {use_ema: false, ema_decay: 0.9}", "`train.use_ema` is not on"),
        ("train: {lr_scheduler: polynomial}", "`train.lr_scheduler` was not used: a learning rate"),
        ("train: {noise_ofset: 0.1}", "this key is not known, did you mean `train.noise_offset`?"),
        (
            "snr_gamma: 5",
            "`snr_gamma` was not used: this key is not known, did you mean `train.snr_gamma`?",
        ),
        ("model: {zzz: {y: 1}}", "`model.zzz.y` was not used: this key is not known"),
        (
            "loss: {p2_gamma: 1}",
            "`loss.p2_gamma` was not used: that trainer's loss is a plain mean",
        ),
        ("loss: {type: huber}", "`loss.type` was not used"),
        ("model: {prediction_type: sample}", "`sample` is x0 here"),
        ("model: {prediction_type: velocity}", "`velocity` means two things"),
        (
            "model: {prediction_type: epsilon}\nscheduler: {prediction_type: sample}",
            "`scheduler.prediction_type` was not used: `model.prediction_type` says `epsilon`",
        ),
        ("scheduler: {rescale_betas_zero_snr: true}", "it goes with `v_prediction`"),
        (
            "model: {pretrained_model_name_or_path: a}\nscheduler: {beta_schedule: linear}",
            "Stable Diffusion was trained with `scaled_linear(0.00085, 0.012)`",
        ),
    ],
)
def test_remarks(tmp_path, text, says):
    spec = spec_of(tmp_path, text)
    assert says in remarks(spec)
    assert [f for f in findings(spec) if f.severity != "note"] == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: {prediction_type: velocity}", "prediction_type = v_prediction"),
        ("scheduler: {beta_schedule: squaredcos_cap_v2}", "process = ddpm(beta = cosine)"),
        (
            "train: {learning_rate: 1e-4, adam_beta1: 0.8}",
            "optimizer = adamw(lr = 0.0001, beta1 = 0.8)",
        ),
        ("train: {mixed_precision: fp16}", "precision = fp16"),
        (
            "train: {resume_from_checkpoint: runs/a/step.safetensors}",
            'resume_from = "runs/a/step.safetensors"',
        ),
        ("train: {use_ema: true}", "ema = 0.9999"),
        (
            "model: {unet: a, vae: b}",
            'backbone = sd.unet(weights = "a", codec = sd.vae(weights = "b"))',
        ),
        ("train: {dream_training: true}", "strategy = [dream(p = 1)]"),
        ("data: {batch_size: 3}", "batch = 3"),
        ("data: {path: größe}", 'source = folder("größe")'),
    ],
)
def test_lines(tmp_path, text, line):
    assert line in body(spec_of(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: [\n", "line 2: this is not YAML"),
        ("just words", "holds no `key: value` lines"),
        ("", "holds no `key: value` lines"),
        ("train: {learning_rate: fast}", "`train.learning_rate` is `fast`, and a number is needed"),
        ("train: {seed: true}", "`train.seed` is `True`, and a number is needed"),
        ("train: {snr_gamma: .inf}", "`train.snr_gamma` is inf, and a finite number is needed"),
        ("train: {dream_training: 3}", "`train.dream_training` is `3`, and `true` or `false`"),
        ("train: {precision: bf61}", "`train.precision` is `bf61`: did you mean `bf16`?"),
        ("model: {prediction_type: x}", "`model.prediction_type` is `x`: known are `epsilon`, "),
        ("model: {name: 7}", "`model.name` is `7`, and a text is needed"),
        ('data: {path: "a\\tb"}', "letters that a spec cannot hold"),
    ],
)
def test_refused(tmp_path, text, says):
    with pytest.raises(ConfigError) as problem:
        spec_of(tmp_path, text)
    assert says in str(problem.value)


def test_other_files(tmp_path):
    with pytest.raises(ConfigError, match="those end in `.yaml`, `.yml`"):
        spec_of(tmp_path, "{}", "a.toml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not a text file"):
        convert(tmp_path / "b.yaml")
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "missing.yaml")


def test_paths_are_escaped(tmp_path):
    text = spec_of(tmp_path, r"data: {path: 'C:\pics\"a'}")
    assert r'folder("C:\\pics\\\"a")' in text
    assert [f for f in findings(text) if f.severity != "note"] == []
