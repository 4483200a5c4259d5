"""What networks are conditioned on, and the further modules of a run: labels, no condition, several
encoders, teachers, averaged copies, frozen encoders of pictures, trained heads."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from difftrain.cli import main
from difftrain.compiler.executable import unpack

LAST = "checkpoints/step-000000002.safetensors"
TEXT = tiny.TEXT.format(train="true")


def unet(text: str, more: str = "") -> str:
    return f"sd.unet(text = {text}, {tiny.NETWORK}{more})"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Makes a folder with a spec and labelled pictures, to run in."""

    def make(imports="", **parts):
        monkeypatch.chdir(tmp_path)
        spec = tiny.spec(**{"sample": "seed = 5", "train": "device = cpu", **parts})
        Path("tiny.diff").write_text(spec.replace("import std.sd\n", f"import std.sd\n{imports}"))
        if not Path("photos").exists():
            tiny.photos(tmp_path / "photos")
            relabel(tmp_path / "photos" / "metadata.jsonl")
        return tmp_path

    return make


def relabel(table: Path) -> None:
    """Adds a field `kind` of two names to every line."""
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    for i, line in enumerate(lines):
        line["kind"] = ("warm", "cold")[i % 2]
    table.write_text("\n".join(map(json.dumps, lines)))


def train(*more: str, steps: int = 2, out: str = "run") -> dict[str, torch.Tensor]:
    """The tensors of the last checkpoint of a run."""
    assert main(["train", "tiny.diff", "--steps", str(steps), "--out", out, *more]) == 0
    return load_file(f"{out}/checkpoints/step-{steps:09d}.safetensors")


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().split("\n")[-1]


# ---- conditions

LABELS = {"imports": "import std.label\n"}
LABELS["backbone"] = unet('label.classes(field = "kind", count = 2)')


def test_labels_are_the_sorted_values_of_a_field(here, capsys):
    here(**LABELS)
    train()
    assert main(["sample", "run", "--prompt", "cold", "-n", "2", "-o", "a.png"]) == 0
    assert Image.open("a.png").size == (72, 164)
    assert main(["sample", "run", "--prompt", "hot", "-o", "b.png"]) == 2
    assert last_line(capsys) == "error: `hot` is no class of `kind`: use `cold`, `warm`"
    Path("photos/metadata.jsonl").write_text("")  # the checkpoint knows them
    assert main(["sample", "run", "--prompt", "warm", "-o", "c.png"]) == 0


def test_a_field_that_is_not_there_is_told(here, capsys):
    here(imports=LABELS["imports"], backbone=unet('label.classes(field = "knd", count = 2)'))
    assert main(["train", "tiny.diff"]) == 4
    assert "line 1 has no `knd`: write one" in last_line(capsys)


def test_the_folder_of_a_picture_is_its_label(here):
    folder = here(imports=LABELS["imports"], backbone=unet("label.classes(count = 2)"))
    for i, picture in enumerate(sorted((folder / "photos").glob("*.png"))):
        home = folder / "sorted" / ("warm", "cold")[i % 2]
        home.mkdir(parents=True, exist_ok=True)
        picture.rename(home / picture.name)
    train("--data", "sorted")
    assert main(["sample", "run", "--prompt", "warm", "-o", "a.png"]) == 0


def test_no_condition_needs_no_captions(here, capsys):
    folder = here(backbone=unet("[]"))
    (folder / "photos" / "metadata.jsonl").unlink()
    tensors = train("--set", "sample.guidance=1")
    assert not [name for name in tensors if "text" in name]
    assert main(["sample", "run", "-n", "3", "-o", "a.png"]) == 0
    assert Image.open("a.png").size == (140, 140)
    assert main(["sample", "run", "--prompt", "a cat", "-o", "b.png"]) == 2
    told = "error: this network reads no condition: leave out `--prompt`"
    assert last_line(capsys) == told


def test_several_encoders_are_one(here):
    frozen = tiny.TEXT.format(train="false").replace("length = 8", "length = 6")
    here(backbone=unet(f"[{TEXT}, {frozen}]"))
    tensors = train()
    groups = {name.partition("/")[0] for name in tensors if "/text.encoders.1." in name}
    assert groups == {"frozen"}
    assert main(["sample", "run", "--prompt", "picture a", "-n", "2", "-o", "a.png"]) == 0


def test_a_frozen_random_encoder_is_kept(here):
    here(backbone=tiny.FROZEN, train="seed = 3")
    train()
    assert main(["sample", "run", "-o", "a.png"]) == 0
    assert Path("a.png").read_bytes() == Path("run/samples.png").read_bytes()


# ---- other runs

TAUGHT = "  loss = fit + mse(x0_hat, stop(x0_hat(net = teacher)))\n"


def test_a_teacher_is_the_average_of_its_run(here, capsys):
    here()
    first = train(out="first")
    here(more=TAUGHT, train='teacher = "first"', backbone=tiny.FROZEN)
    second = train(out="second")
    said = capsys.readouterr().err
    assert "the teacher is first" in said and "the text encoder is random" not in said
    assert not [name for name in second if "teacher" in name]
    frozen = {n: v for n, v in second.items() if n.startswith("frozen/text.")}
    assert frozen and all(
        torch.equal(v, first[n.replace("frozen/", "average/")]) for n, v in frozen.items()
    )
    assert main(["sample", "second", "-o", "a.png"]) == 0


def test_a_teacher_may_be_another_objective(here):
    wider = tiny.BACKBONE.replace("[16, 16]", "[16, 32]")
    here(backbone=wider)
    first = train(out="first")
    base = Path("tiny.diff").read_text().partition("objective tiny")[2].partition("\n}\n")[0]
    here(more=f"  teacher = base\n{TAUGHT}", train='teacher = "first"')
    spec = Path("tiny.diff").read_text()
    Path("tiny.diff").write_text(
        spec.replace("objective tiny", f"objective base{base}\n}}\n\nobjective tiny")
    )
    second = train(out="second")
    name = "average/student.module.mid_block.resnets.0.conv1.weight"
    assert first[name].shape[0] == 32 and second[name].shape[0] == 16


def test_a_taught_run_goes_on_as_it_was(here):
    here()
    train(out="first")
    here(more=TAUGHT, train='teacher = "first"')
    whole, _ = train(steps=3, out="whole"), train(steps=1, out="begun")
    begun = train("--resume", "auto", steps=3, out="begun")
    assert all(torch.equal(whole[n], begun[n]) for n in whole)


def test_a_teacher_without_weights_is_told(here, capsys):
    here(more=TAUGHT)
    assert main(["train", "tiny.diff"]) == 1
    assert "DIF321" in capsys.readouterr().err


def test_a_teacher_of_another_shape_is_told(here, capsys):
    here()
    train(out="first")
    wider = tiny.BACKBONE.replace("[16, 16]", "[16, 32]")
    here(more=TAUGHT, train='teacher = "first"', backbone=wider)
    assert main(["train", "tiny.diff"]) == 2
    told = last_line(capsys)
    assert told.startswith("error: `first` does not fit the teacher of this spec, since it has `")
    assert told.endswith("say `teacher =` and the objective that it was trained on")


def test_a_run_begins_from_another(here, capsys):
    here()
    train(out="first")
    here(train='start_from = "first"')
    assert main(["train", "tiny.diff", "--steps", "0", "--out", "second"]) == 0
    assert "begins from first: 95,988 of 95,988 weights\n" in capsys.readouterr().err
    drawn = [Image.open(f"{run}/samples.png").tobytes() for run in ("first", "second")]
    assert drawn[0] == drawn[1]


def test_classes_keep_their_ids_from_run_to_run(here):
    here(**LABELS)
    train(out="first")
    table = Path("photos/metadata.jsonl")
    table.write_text(table.read_text().replace('"cold"', '"warm"'))
    here(**LABELS, train='start_from = "first"')
    train(out="second")
    with safe_open(f"second/{LAST}", framework="pt") as file:
        assert json.loads(file.metadata()["vocabulary"]) == ["cold", "warm"]


def test_what_is_new_is_told(here, capsys):
    here()
    train(out="first")
    here(train='start_from = "first"', backbone=unet(TEXT, ", inputs = [guess]"))
    assert main(["train", "tiny.diff", "--steps", "0", "--out", "second"]) == 0
    told = "begins from first: 95,412 of 96,564 weights; new are `student.module.conv_in.weight`\n"
    assert told in capsys.readouterr().err


def test_nothing_in_common_is_told(here, capsys):
    here()
    train(out="first")
    labels = 'text = label.classes(field = "kind", count = 2)'
    other = f"sit.transformer({labels}, depth = 1, width = 16, heads = 2)"
    imports = "import std.label\nimport std.sit\n"
    here(imports=imports, train='start_from = "first"', backbone=other)
    assert main(["train", "tiny.diff", "--out", "second"]) == 2
    assert "nothing in `first` fits the network of this spec" in last_line(capsys)


# ---- averaged copies, heads, pictures

LAGGED = "lagged = average(0.5)\n  loss = fit + mse(pred, stop(pred(net = lagged)))\n"


def test_averaged_copies_are_in_the_state(here):
    here(more=f"  {LAGGED}")
    whole, _ = train(steps=3, out="whole"), train(steps=1, out="begun")
    copies = {n.partition("/")[0] for n in whole if n.startswith("average.")}
    assert copies == {"average.lagged"}
    lagged = next(n for n in whole if n.startswith("average.lagged/student"))
    assert not torch.equal(whole[lagged], whole[lagged.replace("average.lagged", "weights")])
    begun = train("--resume", "auto", steps=3, out="begun")
    assert all(torch.equal(whole[n], begun[n]) for n in whole)


REPA = {
    "imports": "import std.vision\n",
    "backbone": unet(TEXT, ", tap = 1"),
    "more": '  vision = vision.dinov2(weights = "", layers = 1, width = 16, heads = 2)\n'
    "  align = -mean(cosine(project(tap), vision(image)))\n"
    "  loss = fit + 0.5 * align\n",
}


def test_pictures_heads_and_frozen_encoders(here):
    here(**REPA)
    tensors = train()
    names = {name.partition("/")[2].partition(".")[0] for name in tensors if "/" in name}
    assert names == {"student", "text", "project"}
    assert main(["sample", "run", "-o", "a.png"]) == 0
    assert Path("a.png").read_bytes() == Path("run/samples.png").read_bytes()


def test_a_learned_variance_is_trained(here):
    here(more="  loss = uncertainty(fit)\n")
    tensors = train()
    assert tensors["weights/logvar.linear.weight"].abs().max() > 0


def test_compiling_counts_further_modules(here):
    here(**{**REPA, "more": REPA["more"].replace("0.5 * align", "0.5 * align + logvar(c_noise)")})
    assert main(["compile", "tiny.diff", "-o", "made"]) == 0
    manifest = json.loads(unpack("made")["manifest.json"])
    assert set(manifest["state"]["weights"]) == {"student", "text", "project", "logvar"}


# ---- many samples


def test_all_pictures_are_saved(here, capsys):
    here()
    train()
    assert main(["sample", "run", "-n", "70", "--save", "all.npz", "-o", "grid.png"]) == 0
    with np.load("all.npz") as file:
        assert file["pictures"].shape == (70, 3, 64, 64) and file["pictures"].dtype == np.uint8
        assert len(file["captions"]) == 70
    assert Image.open("grid.png").size[0] == 8 * 68 + 4
