"""What cannot be trained on or sampled from: the whole message, the exit code, and nothing lost."""

import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import tiny
import torch

import difftrain
from difftrain.cli import main
from difftrain.training import state
from difftrain.training.bundle import compile_spec

ROOT = Path(__file__).parent.parent
LAST = "runs/tiny/checkpoints/step-000000001.safetensors"


UNKNOWN = (
    "never occurred in training: this text encoder only knows the words of its captions, so use"
    " those"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of one step; tests leave it as it is."""
    folder = tiny.home(tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "--steps", "1"]) == 0
    return folder


def process(*argv: str, cwd) -> tuple[int, str]:
    """The exit code and the messages of the program itself."""
    command = [sys.executable, "-m", "difftrain", *argv]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
    return done.returncode, done.stderr


def error(capsys, *argv: str) -> tuple[int, str]:
    """The exit code, and the message after which nothing more is said."""
    code = main(list(argv))
    return code, capsys.readouterr().err.rstrip("\n").splitlines()[-1].removeprefix("error: ")


# ---- specs


def test_no_spec(tmp_path):
    code, said = process("train", "missing.diff", cwd=tmp_path)
    assert (code, said) == (2, "error: `missing.diff`: no such file or directory\n")


BINARY = """\
error[DIF002]: this file is not text
 --> a.diff:1:1
  |
1 |
  | ^
  = because: it holds bytes that no text has
  = help: give the path of a `.diff` file          (difftrain explain DIF002)
"""


def test_a_binary_spec(tmp_path):
    (tmp_path / "a.diff").write_bytes(bytes(range(256)))
    code, said = process("train", cwd=tmp_path)
    assert (code, said) == (1, BINARY)
    assert [p.name for p in tmp_path.iterdir()] == ["a.diff"]


NO_DATA = """\
error[DIF320]: `difftrain train` needs a `data` block, and this file has none
 --> tiny.diff:1:1
  |
1 | diff 1
  | ^^^^^^
  = help: add `data { source = folder("photos") }`          (difftrain explain DIF320)
"""


def test_a_spec_without_data(here, capsys):
    folder = here()
    text = "\n".join(x for x in tiny.spec().splitlines() if not x.startswith("data"))
    (folder / "tiny.diff").write_text(text + "\n")
    assert main(["train"]) == 1
    assert capsys.readouterr().err == NO_DATA


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        (
            {"backbone": "custom"},
            "`backbone = custom` takes its network from Python, and a run of its own has none:"
            " name a backbone, such as `sd.unet(text = sd.clip)`",
        ),
        (
            {"size": 60},
            "the codec takes pictures whose sides are multiples of 8, not 60 x 60: change `size`",
        ),
        ({"sample": 'prompts = ["a zebra"]'}, f"`zebra` {UNKNOWN}"),
        (
            {"train": 'resume_from = "old.safetensors"'},
            "there is no checkpoint `old.safetensors`: give a file, or `auto`",
        ),
    ],
)
def test_what_a_run_cannot_begin_with(here, capsys, parts, says):
    folder = here(**parts)
    before = tiny.contents(folder)
    assert error(capsys, "train") == (2, says)
    assert tiny.contents(folder) == before


STEPS = """\
error[DIF316]: `steps = 11` does not fit a process of 10 steps
 --> --set sample.solver.steps:1:1
  |
1 | steps = 11
  | ^^^^^^^^^^
  = help: use 1 to 10          (difftrain explain DIF316)
"""


def test_more_steps_than_the_process_has(here, capsys):
    here()
    settings = ["--set", "process.steps=10", "--set", "sample.solver.steps=11"]
    assert main(["train", *settings]) == 1
    assert capsys.readouterr().err == STEPS


def test_no_gpu(here, monkeypatch):
    folder = here()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, said = process("train", "--set", "train.device=cuda", cwd=folder)
    assert (code, said.splitlines()[-1]) == (
        3,
        "error: `device = cuda` needs a CUDA GPU, and torch finds none on this machine: leave the"
        " option out to train on the CPU",
    )
    assert not (folder / "runs").exists()


def test_no_compiler(here, capsys, monkeypatch):
    folder = here(train="compile = on")
    before = tiny.contents(folder)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert error(capsys, "train") == (
        3,
        "`compile = on` needs a C++ compiler, and there is none on this machine",
    )
    assert tiny.contents(folder) == before


# ---- pictures


def test_an_unreadable_picture(tmp_path):
    tiny.home(tmp_path)
    (tmp_path / "photos" / "5.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    before = tiny.contents(tmp_path)
    code, said = process("train", cwd=tmp_path)
    assert code == 4
    assert said.splitlines()[1:] == [
        "error: `5.png` cannot be read as a picture (cannot identify image file): save it again,"
        " or take it out of the set"
    ]
    assert tiny.contents(tmp_path) == before


def test_a_missing_caption(here, capsys):
    folder = here()
    (folder / "photos" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n')
    assert error(capsys, "train") == (
        4,
        "`photos/metadata.jsonl` line 1 has no `caption`: write one, or name the field that holds"
        ' the text, as in caption = "text"',
    )


def test_an_empty_folder(here, capsys):
    folder = here()
    (folder / "empty").mkdir()
    assert error(capsys, "train", "--data", "empty") == (
        4,
        "`empty` holds no pictures: it needs a metadata.jsonl, or pictures with a caption file of"
        " the same name beside each",
    )
    assert error(capsys, "train", "--data", "nowhere") == (
        4,
        f"there is no folder or zip `nowhere`: check the path (seen from `{folder}`)",
    )


OTHER_LATENTS = """\
error[DIF406]: latents of 4 channels here, and the network in `net` was trained with 8
 --> tiny.diff:8:21
  |
8 |   backbone        = sd.unet("net")
  |                     ^^^^^^^^^^^^^^
  |                             ----- says its unet/config.json
  = because: the network has no place for them
  = help: write `codec = sd.vae("net")`          (difftrain explain DIF406)
"""


def test_a_network_of_other_latents(here, capsys):
    from diffusers import UNet2DConditionModel

    folder = here(backbone='sd.unet("net")')
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
    }
    UNet2DConditionModel(
        in_channels=8, out_channels=8, block_out_channels=(16,), layers_per_block=1,
        cross_attention_dim=192, attention_head_dim=2, norm_num_groups=4, **blocks,
    ).save_pretrained(folder / "net")  # fmt: skip
    assert main(["train"]) == 1
    assert capsys.readouterr().err == OTHER_LATENTS


# ---- runs and checkpoints


def test_a_truncated_checkpoint(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((trained / LAST).read_bytes()[:-100])
    before = tiny.contents(trained)
    assert error(capsys, "train", "--resume", str(cut)) == (
        2,
        f"the checkpoint `{cut}` cannot be read (Error while deserializing header: incomplete"
        " metadata, file not fully covered): it was cut short or is no checkpoint; give an older"
        " one",
    )
    assert tiny.contents(trained) == before


@contextmanager
def nobody():
    """Inside, whoever is root is not."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_checkpoint_of_somebody_else():
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, "a.safetensors")
        state.write(path, {"a": torch.zeros(1)}, {})
        assert path.stat().st_mode & 0o777 == 0o644  # as open as its folder
        path.chmod(0)
        with nobody(), pytest.raises(state.CheckpointError) as told:
            state.averaged(path)
        assert str(told.value) == (
            f"the checkpoint `{path}` cannot be read (permission denied): give one that can be"
        )


def test_a_checkpoint_of_another_network(trained, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    before = tiny.contents(trained)
    wider = ["--set", "backbone.channels=[16, 32]"]
    assert error(capsys, "train", "--resume", LAST, *wider) == (
        2,
        f"the checkpoint `{LAST}` does not fit this spec: it has no"
        " `student.module.down_blocks.1.resnets.0.conv_shortcut.weight`",
    )
    other = {"prediction_type": "sample"}
    hashes = [compile_spec("tiny.diff", s).manifest["graph"] for s in ({}, other)]
    assert error(capsys, "train", "--resume", LAST, "--set", "prediction_type=sample") == (
        2,
        f"the checkpoint `{LAST}` belongs to another objective (graph {hashes[0]}, and this spec is"
        f" {hashes[1]}): use the spec it was made with",
    )
    assert tiny.contents(trained) == before


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nowhere"], "there is no run `nowhere`: give a folder that training wrote"),
        (
            ["photos"],
            "the folder `photos` has no checkpoint: give one in which training saved some",
        ),
        (
            ["tiny.diff"],
            "`tiny.diff` is not in the folder of a run: give a folder that training wrote, or a"
            " checkpoint in it",
        ),
        (["runs/tiny", "--prompt", "picture zebra"], f"`zebra` {UNKNOWN}"),
        (["runs/tiny", "-n", "0"], "`0` is no number of pictures: give one from 1 to 100000"),
        (["runs/tiny", "-n", "-2"], "`-2` is no number of pictures: give one from 1 to 100000"),
        (
            ["runs/tiny", "-n", "5000000000000"],
            "`5000000000000` is no number of pictures: give one from 1 to 100000",
        ),
        (
            ["runs/tiny", "-o", "tiny.diff"],
            "`tiny.diff` does not end in `.png`: samples of this run are pictures in a grid, so let"
            " the file that `-o` names end so",
        ),
        (
            ["runs/tiny", "-o", "photos/0.png"],
            "`photos/0.png` is there already and holds no samples: give the name of another file",
        ),
        (
            ["runs/tiny", "--set", "train.steps=5"],
            "`train.steps` is not read here: set an option of `sample` or `data`",
        ),
        (
            ["runs/tiny", "--set", "process.steps=500"],
            "`process.steps` is part of the compiled step: compile the spec again with"
            " `--set process.steps=500`",
        ),
    ],
)
def test_what_cannot_be_sampled(trained, capsys, monkeypatch, argv, says):
    monkeypatch.chdir(trained)
    before = tiny.contents(trained)
    assert error(capsys, "sample", *argv) == (2, says)
    assert tiny.contents(trained) == before


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        (
            "levels.py",
            None,
            "the run `run` has lost its `levels.py`: bring it back, or train again",
        ),
        (
            "spec.diff",
            None,
            "the run `run` has lost its `spec.diff`: bring it back, or train again",
        ),
        (
            "manifest.json",
            '{"name": ',
            "the `manifest.json` of the run `run` is damaged: bring it back, or train again",
        ),
        (
            "manifest.json",
            '{"name": "tiny", "spec": "0", "graph": "0", "difftrain": "0.0.1"}',
            "the run `run` is of difftrain 0.0.1, whose `manifest.json` says no `settings`, and"
            f" this is {difftrain.__version__}: use that version, or train again",
        ),
    ],
)
def test_a_run_that_is_not_whole(trained, capsys, monkeypatch, tmp_path, file, text, says):
    shutil.copytree(trained / "runs" / "tiny", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    Path("run", file).unlink() if text is None else Path("run", file).write_text(text)
    assert error(capsys, "sample", "run") == (2, says)


def test_a_spec_that_was_edited_after_its_run(trained, capsys, monkeypatch, tmp_path):
    shutil.copytree(trained / "runs" / "tiny", tmp_path / "run")
    spec = tmp_path / "run" / "spec.diff"
    spec.write_text(spec.read_text().replace("heads = 2", "heads = 4", 1))
    monkeypatch.chdir(tmp_path)
    assert error(capsys, "sample", "run") == (
        2,
        "the `spec.diff` of the run `run`, or a file that it uses, is not what was trained: bring"
        " it back, and change samples with `--set`",
    )


def test_a_run_where_no_folder_can_be(trained, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    assert error(capsys, "train", "--out", "tiny.diff/run") == (
        2,
        f"`tiny.diff/run` lies in `{trained}/tiny.diff`, which is no folder: give another place",
    )


def test_sampling_without_the_pictures(trained, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert error(capsys, "sample", str(trained / "runs" / "tiny")) == (
        4,
        f"there is no folder or zip `photos`: check the path (seen from `{tmp_path}`); or say with"
        " `--prompt` what to draw",
    )
