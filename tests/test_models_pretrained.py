import json
import os
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file

from difftrain.language.adopt import Described
from difftrain.models.codec import autoencoder_kl
from difftrain.models.errors import PartError
from difftrain.models.pretrained import facts
from difftrain.models.unet import sd_unet

ROOT = Path(__file__).parent.parent
WEIGHTS = "diffusion_pytorch_model.safetensors"
# as in Stable Diffusion's own scheduler_config.json
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def tiny_unet():
    return UNet2DConditionModel(
        block_out_channels=(4, 4),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        mid_block_type=None,
        cross_attention_dim=6,
        norm_num_groups=2,
        attention_head_dim=2,
        sample_size=8,
    )


def tiny_vae(**config):
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, **config)


@pytest.fixture
def pipeline(tmp_path):
    """A pretrained folder as a user has it, with tiny networks."""
    DDPMScheduler(
        **SD, prediction_type="v_prediction", rescale_betas_zero_snr=True
    ).save_pretrained(tmp_path / "scheduler")
    tiny_unet().save_pretrained(tmp_path / "unet")
    tiny_vae(scaling_factor=0.13025, shift_factor=0.1).save_pretrained(tmp_path / "vae")
    return tmp_path


def test_a_folder_is_read_in_the_languages_words(pipeline):
    assert facts(pipeline) == {
        "process": Described(
            "betas",
            {"beta": "scaled_linear(0.00085, 0.012)", "steps": "1000", "terminal_snr": "zero"},
        ),
        "steps": 1000,
        "prediction_type": "v_prediction",
        "grid": "leading",
        "network": {"channels": 4, "cross_attention_dim": 6, "sample_size": 8},
        "latent": {"scale": 0.13025, "shift": 0.1, "channels": 4},
    }


@pytest.mark.parametrize(
    "scheduler, expected",
    [
        (
            DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing"),
            {"beta": "cosine", "terminal_snr": "free", "type": "epsilon", "grid": "trailing"},
        ),
        (
            DDPMScheduler(num_train_timesteps=500, prediction_type="sample"),
            {"beta": "linear(0.0001, 0.02)", "steps": "500", "type": "sample"},
        ),
        (
            FlowMatchEulerDiscreteScheduler(shift=3.0),
            {"kind": "shifted", "k": "3.0", "type": "flow"},
        ),
        (FlowMatchEulerDiscreteScheduler(), {"kind": "straight", "type": "flow"}),
    ],
)
def test_schedulers_keep_their_meaning(tmp_path, scheduler, expected):
    scheduler.save_pretrained(tmp_path / "scheduler")
    found = facts(tmp_path, ["scheduler"])
    process = {"kind": found["process"].kind, **found["process"].arguments}
    flat = {**process, "type": found["prediction_type"], "grid": found["grid"]}
    assert expected.items() <= flat.items()


@pytest.mark.parametrize(
    "file, name, whole",
    [
        ("scheduler", "scheduler_config.json", DDPMScheduler),
        ("unet", "config.json", tiny_unet),
        ("vae", "config.json", tiny_vae),
    ],
)
def test_absent_keys_have_the_values_of_diffusers(tmp_path, file, name, whole):
    whole().save_pretrained(tmp_path / file)
    at = tmp_path / file / name
    defaults = signature(type(whole())).parameters
    written = json.loads(at.read_text())
    at.write_text(json.dumps({k: defaults[k].default for k in written if k in defaults}))
    spelt_out = facts(tmp_path, [file])
    at.write_text("{}")
    assert facts(tmp_path, [file]) == spelt_out


@pytest.mark.parametrize(
    "config, said",
    [
        ({"beta_schedule": "sigmoid"}, "the scheduler's betas `sigmoid` are not known here"),
        ({"prediction_type": "noise"}, "prediction type `noise` has no name here"),
        ({"trained_betas": [0.1, 0.2]}, "lists its betas one by one"),
    ],
)
def test_schedules_without_a_word_are_told(pipeline, config, said):
    (pipeline / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(PartError, match=said):
        facts(pipeline)


def test_missing_and_broken_files_are_told(pipeline):
    with pytest.raises(PartError, match="there is no folder `.*/none`: check the path"):
        facts(pipeline / "none")
    with pytest.raises(PartError, match="is a file: give the folder"):
        facts(pipeline / "vae" / "config.json")
    (pipeline / "vae" / "config.json").write_text("[]")
    with pytest.raises(PartError, match="holds no configuration"):
        facts(pipeline)
    (pipeline / "vae" / "config.json").write_text('{"scaling_factor": ')
    with pytest.raises(PartError, match=r"vae/config.json` is not JSON \(Expecting value"):
        facts(pipeline)
    (pipeline / "vae" / "config.json").unlink()
    with pytest.raises(PartError, match="has no vae/config.json: give the folder"):
        facts(pipeline)


def test_pickled_weights_are_refused(pipeline):
    (pipeline / "unet" / WEIGHTS).rename(pipeline / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(PartError, match=r"_model.bin` is a pickle, which can run code"):
        sd_unet(weights=str(pipeline))
    (pipeline / "unet" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(PartError, match="has no safetensors"):
        sd_unet(weights=str(pipeline))


def test_weights_are_loaded_whole_or_not_at_all(pipeline):
    path = pipeline / "unet" / WEIGHTS
    state = load_file(path)
    save_file({k: v for k, v in state.items() if k != "conv_in.bias"}, path)
    with pytest.raises(PartError, match="lack 1 tensors, such as `conv_in.bias`"):
        sd_unet(weights=str(pipeline))
    save_file({**state, "conv_in.bias": torch.zeros(99)}, path)
    with pytest.raises(PartError, match="cannot load the weights in"):
        sd_unet(weights=str(pipeline))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PartError, match="cannot load the weights in"):
        sd_unet(weights=str(pipeline))


def test_another_kind_of_module_is_told(tmp_path):
    AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4
    ).save_pretrained(tmp_path)
    with pytest.raises(
        PartError, match="holds `AutoencoderTiny`: give a folder with `AutoencoderKL`"
    ):
        autoencoder_kl(weights=str(tmp_path))


def offline(script: str, cache: Path) -> str:
    """What `script` prints in a process whose hub is this cache, and no network."""
    env = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    made = subprocess.run(
        [sys.executable, "-c", script], env=env, check=True, capture_output=True, text=True
    )
    return made.stdout


def test_hub_names_load_from_the_hubs_cache(tmp_path, pipeline):
    entry = tmp_path / "cache" / "models--someone--tiny"
    (entry / "snapshots").mkdir(parents=True)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text("0" * 40)
    (entry / "snapshots" / ("0" * 40)).symlink_to(pipeline)
    script = """
from difftrain.models.errors import PartError
from difftrain.models.codec import autoencoder_kl
from difftrain.models.pretrained import facts
from difftrain.models.unet import sd_unet
print(facts("someone/tiny")["prediction_type"])
print(sd_unet(weights="someone/tiny").module.config.sample_size)
print(autoencoder_kl(weights="someone/tiny").scale.item())
for load in (lambda: facts("someone/else"), lambda: sd_unet(weights="someone/else")):
    try:
        load()
    except PartError as error:
        print(error)
"""
    lines = offline(script, tmp_path / "cache").splitlines()
    assert lines[:2] == ["v_prediction", "8"]
    assert float(lines[2]) == pytest.approx(0.13025)
    assert lines[3].startswith("cannot load scheduler/scheduler_config.json of `someone/else`")
    assert lines[4].startswith("cannot load safetensors of `someone/else`: there is no such folder")


def test_reading_a_folder_needs_no_torch(pipeline):
    script = f"""
import sys
from difftrain.models.pretrained import facts
facts({str(pipeline)!r})
print("torch" in sys.modules)
"""
    assert offline(script, pipeline) == "False\n"
