"""The YAML of the MVP document: sections model, train, scheduler, loss and data."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from pathlib import PurePath

from difftrain.importers.config import Config, ConfigError, flat, told

PREDICTIONS = {
    "epsilon": "epsilon",
    "v_prediction": "v_prediction",
    "v-prediction": "v_prediction",
    "v": "v_prediction",
    "velocity": "v_prediction",
    "sample": "sample",
}
TRAPS = {
    "velocity": "`velocity` means two things: here it became `v_prediction`, which is "
    "alpha * eps - sigma * x0; the direction of a continuous path is `flow`",
    "sample": "`sample` is x0 here, as every sampler reads it; a trainer whose target is xt itself "
    "teaches the network to return its input, and nothing is denoised",
}
BETAS = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "cosine": "cosine",
}
PRECISIONS = {"no": "fp32", "fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
DECAYS = {"constant": "constant", "constant_with_warmup": "constant", "cosine": "cosine"}
GRIDS = {"leading": "leading", "trailing": "trailing", "linspace": "uniform"}
ADAM = {
    "lr": ("train.learning_rate",),
    "beta1": ("train.adam_beta1",),
    "beta2": ("train.adam_beta2",),
    "weight_decay": ("train.adam_weight_decay",),
    "eps": ("train.adam_epsilon",),
}
# Options of the `train` block that are numbers there and here.
NUMBERS = {
    "steps": ("train.max_train_steps", "max_train_steps"),
    "warmup": ("train.lr_warmup_steps",),
    "clip": ("train.max_grad_norm",),
    "seed": ("train.seed", "seed"),
    "save_every": ("save_every", "train.save_every"),
    "sample_every": ("eval_every", "train.eval_every"),
}
WEIGHTS = ("model.pretrained_model_name_or_path", "model.name")
PARTS = {"text": ("model.text_encoder", "sd.clip"), "codec": ("model.vae", "sd.vae")}
NO_LOSS = "that trainer's loss is a plain mean of squares whatever this says"
# Fields that no line of that trainer reads, and what to write for what they promise.
SILENT = {
    "loss.type": f"{NO_LOSS}; write `fit' = huber(pred, target, 0.1)` for another loss",
    "loss.snr_weighting": f"{NO_LOSS}; write `strategy = min_snr(5)` for this weight",
    "loss.p2_gamma": f"{NO_LOSS}; write `strategy = p2(k = 1, g = 1)` for this weight",
    "loss.p2_k": f"{NO_LOSS}; write `strategy = p2(k = 1, g = 1)` for this weight",
    "report_to": "losses and pictures are always written for TensorBoard",
    "train.report_to": "losses and pictures are always written for TensorBoard",
}
# What the branches below read besides the tables.
READ = (
    "model.prediction_type", "model.unet", "train.dream_training",
    "train.dream_detail_preservation", "train.precision", "train.mixed_precision",
    "train.resume_from", "train.resume_from_checkpoint", "train.train_batch_size",
    "train.snr_gamma", "train.noise_offset", "train.input_perturbation", "train.use_ema",
    "train.ema_decay", "train.gradient_accumulation_steps", "train.lr_scheduler",
    "scheduler.beta_schedule", "scheduler.beta_start", "scheduler.beta_end",
    "scheduler.num_train_timesteps", "scheduler.rescale_betas_zero_snr",
    "scheduler.prediction_type", "scheduler.timestep_spacing", "data.path", "data.train_data_dir",
    "data.dataset", "data.caption_column", "data.resolution", "data.batch_size",
)  # fmt: skip
KNOWN = (
    *READ, *WEIGHTS, *SILENT, *(p[0] for p in PARTS.values()),
    *(k for table in (ADAM, NUMBERS) for keys in table.values() for k in keys),
)  # fmt: skip


def convert(text: str, path: str) -> str:
    """The text of a spec for the text of a configuration. Raises ConfigError."""
    config = Config(flat(_tree(text, path)))
    blocks = [_objective(config, path), _data(config), _train(config), *_sample(config)]
    if config.values.get("loss.type") in ("mse", "l2"):
        config.take("loss.type")
    for key in SILENT:
        if key not in config.taken:
            config.unused(key, SILENT[key])
    config.rest(KNOWN)
    remarks = "".join(f"{line}\n" for remark in config.remarks for line in _comment(remark))
    head = f"diff 1\n# From {PurePath(path).name}, by `difftrain import`.\n"
    return "\n".join([f"{head}{remarks}import std.sd\n", *blocks])


def _tree(text: str, path: str) -> dict:
    import yaml

    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"`{path}`{where}: this is not YAML") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"`{path}` holds no `key: value` lines")
    return tree


# ---- the objective


def _objective(config: Config, path: str) -> str:
    prediction = _prediction(config)
    lines = [f"process = {_process(config, prediction)}", f"prediction_type = {prediction}"]
    strategies = list(_strategies(config))
    if strategies:
        lines.append(f"strategy = [{', '.join(strategies)}]")
    lines.append(f"backbone = {_backbone(config)}")
    return _block(f"objective {_name(path)}", lines)


def _prediction(config: Config) -> str:
    keys = ("model.prediction_type", "scheduler.prediction_type")
    _, written = config.take(*keys)
    prediction = config.word(PREDICTIONS, keys[0] if config.values.get(keys[0]) else keys[1])
    if written in TRAPS:
        config.remarks.append(TRAPS[written])
    return prediction or "epsilon"


def _process(config: Config, prediction: str) -> str:
    beta = config.word(BETAS, "scheduler.beta_schedule") or "scaled_linear"
    low, high = config.number("scheduler.beta_start"), config.number("scheduler.beta_end")
    ends = {"low": low, "high": high} if beta != "cosine" else {}
    args = _arguments({n: v for n, v in ends.items() if v is not None})
    given = {"beta": f"{beta}({args})" if args else beta}
    steps = config.number("scheduler.num_train_timesteps")
    if steps is not None:
        given["steps"] = _number(steps)
    if _zero_snr(config, prediction):
        given["terminal_snr"] = "zero"
    if any(key.startswith("scheduler.") for key in config.values):
        config.remarks.append(
            "`scheduler` is read here; that trainer took the scheduler of the pretrained model, so "
            "compare the two"
        )
    if beta == "linear" and config.values.get(WEIGHTS[0]):
        config.remarks.append(
            "`scheduler.beta_schedule = linear`: Stable Diffusion was trained with "
            "`scaled_linear(0.00085, 0.012)`"
        )
    return f"ddpm({', '.join(f'{n} = {v}' for n, v in given.items())})"


def _zero_snr(config: Config, prediction: str) -> bool:
    wanted = config.flag("scheduler.rescale_betas_zero_snr")
    if wanted and prediction == "epsilon":
        why = "epsilon has no x0 at a step of pure noise; it goes with `v_prediction`"
        config.unused("scheduler.rescale_betas_zero_snr", why)
        return False
    return bool(wanted)


def _strategies(config: Config) -> Iterator[str]:
    """In the order in which that trainer applies them."""
    for name, key in (
        ("offset_noise", "train.noise_offset"),
        ("input_perturbation", "train.input_perturbation"),
    ):
        amount = config.number(key)
        if amount:
            yield f"{name}({_number(amount)})"
    dreams = config.flag("train.dream_training")
    power = config.number("train.dream_detail_preservation")
    if dreams:
        yield f"dream(p = {_number(1 if power is None else power)})"
    else:
        config.unused("train.dream_detail_preservation", "`train.dream_training` is not on")
    gamma = config.number("train.snr_gamma")
    if gamma is not None:
        yield f"min_snr({_number(gamma)})"


def _backbone(config: Config) -> str:
    weights = config.text(*WEIGHTS)
    unet = config.text("model.unet") or weights
    options = {"weights": _text(unet)} if unet else {}
    for slot, (key, part) in PARTS.items():
        own = config.text(key) or weights
        if own:
            options[slot] = f"{part}(weights = {_text(own)})"
    return f"sd.unet({', '.join(f'{n} = {v}' for n, v in options.items())})"


# ---- the run


def _data(config: Config) -> str:
    lines = []
    source = config.text("data.path", "data.train_data_dir", "data.dataset")
    caption = config.text("data.caption_column")
    if source:
        also = f", caption = {_text(caption)}" if caption else ""
        lines.append(f"source = folder({_text(source)}{also})")
    else:
        config.remarks.append(
            "no data was named: the emoji set that comes with difftrain stands in"
        )
        config.unused("data.caption_column", "no data was named")
    size = config.number("data.resolution")
    if size is not None:
        lines.append(f"size = {_number(size)}px")
    batch, times = (
        config.number("train.train_batch_size", "data.batch_size"),
        config.number("train.gradient_accumulation_steps") or 1,
    )
    if times != 1:
        batch = batch or 1
        config.remarks.append(
            f"`train.gradient_accumulation_steps`: {batch} samples {times} times a step are one "
            f"batch of {_number(batch * times)}"
        )
    if batch is not None:
        lines.append(f"batch = {_number(batch * times)}")
    return _block("data", lines)


def _train(config: Config) -> str:
    numbers = {name: config.number(*keys) for name, keys in NUMBERS.items()}
    lines = [f"{name} = {_number(value)}" for name, value in numbers.items() if value is not None]
    precision = config.word(PRECISIONS, "train.precision", "train.mixed_precision")
    if precision:
        lines.append(f"precision = {precision}")
    adam = {name: config.number(*keys) for name, keys in ADAM.items()}
    args = _arguments({name: value for name, value in adam.items() if value is not None})
    if args:
        lines.append(f"optimizer = adamw({args})")
    decay = _decay(config)
    return _block("train", [*lines, *decay, *_ema(config), *_resume(config)])


def _decay(config: Config) -> Iterator[str]:
    key = "train.lr_scheduler"
    if config.values.get(key) in (None, *DECAYS):
        decay = config.word(DECAYS, key)
        if decay:
            yield f"decay = {decay}"
    else:
        config.unused(key, "a learning rate stays `constant` or falls as a `cosine`")


def _ema(config: Config) -> Iterator[str]:
    on, decay = config.flag("train.use_ema"), config.number("train.ema_decay")
    if on is False or (on is None and decay is None):
        yield "ema = 0"
        config.unused("train.ema_decay", "`train.use_ema` is not on")
    else:
        yield f"ema = {_number(0.9999 if decay is None else decay)}"


def _resume(config: Config) -> Iterator[str]:
    path = config.text("train.resume_from", "train.resume_from_checkpoint")
    if path:
        yield f"resume_from = {_text('auto' if path == 'latest' else path)}"


def _sample(config: Config) -> Iterator[str]:
    grid = config.word(GRIDS, "scheduler.timestep_spacing")
    if grid:
        yield _block("sample", [f"solver = ddim(grid = {grid})"])


# ---- writing


def _block(head: str, lines: list[str]) -> str:
    return f"{head} {{\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


def _arguments(values: dict[str, float]) -> str:
    return ", ".join(f"{name} = {_number(value)}" for name, value in values.items())


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _text(value: str) -> str:
    """A string literal."""
    if not value.isprintable():
        raise ConfigError(
            f"{told(value)} has letters that a spec cannot hold: give it another name"
        )
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _name(path: str) -> str:
    """A name for the objective, from the name of the file."""
    name = re.sub(r"[^a-z0-9]+", "_", PurePath(path).stem.lower()).strip("_")
    return name if name[:1].isalpha() else f"imported_{name}".rstrip("_")


def _comment(remark: str) -> list[str]:
    """The lines of a comment."""
    printable = "".join(c if c.isprintable() else " " for c in remark)
    return textwrap.wrap(
        printable, 98, initial_indent="# ", subsequent_indent="#   ", break_long_words=False
    )
