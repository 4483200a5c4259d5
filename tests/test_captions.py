"""Text of a frozen encoder: read once before the run, kept by its ids, and the same to the step."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from methods.library import METHODS, spec

from difftrain.cli import main
from difftrain.training import ahead, captions, evaluate
from difftrain.training.batches import Batches
from difftrain.training.bundle import compile_spec
from difftrain.training.captions import frozen, states
from difftrain.training.latents import prepare
from difftrain.training.parts import visiting
from difftrain.training.run import grid
from difftrain.training.session import open_session
from difftrain.training.sources import DataError, open_source
from difftrain.training.stepper import feeding

TEXTS = ["a red square", "a blue square", "a red square"]
FROZEN = "sd.clip(layers = 1, width = 16, heads = 2, length = 8)"
ONE = "checkpoints/step-000000001.safetensors"


class Letters(torch.nn.Module):
    """An encoder that counts the texts it reads: a vector for each of the first four letters."""

    def __init__(self, scale=1.0):
        super().__init__()
        table = scale * torch.randn(128, 3, generator=torch.Generator().manual_seed(0))
        self.table = torch.nn.Parameter(table, requires_grad=False)
        self.read = 0

    def ids(self, texts):
        return torch.tensor([[ord(letter) for letter in text.ljust(4)[:4]] for text in texts])

    def forward(self, ids):
        self.read += len(ids)
        return self.table[ids]

    def fingerprint(self):
        return str(self.table.sum().item())


@pytest.fixture
def encode(tmp_path):
    """Encodes TEXTS with a cache: the states, how many captions were read for it, what was said."""

    def run(text=None, texts=TEXTS, kind=torch.float32):
        text, said = text or Letters(), []
        found = states(text, texts, kind, cache=tmp_path / "cache", say=said.append)
        return found, text.read, said

    return run


# ---- the table


def test_each_caption_is_read_once_and_the_empty_one_comes_first(encode):
    found, _, said = encode()
    text = Letters()
    assert torch.equal(found.table, text(text.ids(["", *TEXTS[:2]])))
    assert torch.equal(found.null, text(text.ids([""])))
    assert found.rows(TEXTS).tolist() == [1, 2, 1]
    assert said == ["text is encoded ahead: the states of 3 captions take 0.0 MiB"]


def test_a_second_start_reads_the_kept_states(encode):
    first, read, _ = encode()
    again, later, said = encode()
    assert torch.equal(first.table, again.table) and later == read - 4 and len(said) == 1


@pytest.mark.parametrize("change", ["weights", "caption", "precision"])
def test_what_changes_the_states_changes_the_key(encode, change, tmp_path):
    before, read, _ = encode()
    match change:
        case "weights":
            after, again, _ = encode(Letters(2.0))
            assert torch.equal(after.table, 2 * before.table)
        case "caption":
            after, again, _ = encode(texts=["a red square", "no blue square"])
        case "precision":
            after, again, _ = encode(kind=torch.bfloat16)
            assert torch.equal(after.table, before.table.bfloat16())
    assert again == read and len(list((tmp_path / "cache").iterdir())) == 2
    assert torch.equal(encode()[0].table, before.table)


def test_kept_states_of_half_precision_are_read_again(encode):
    one, two = (encode(kind=torch.bfloat16)[0].table for _ in range(2))
    assert torch.equal(one, two) and two.dtype == torch.bfloat16


def test_an_encoder_without_a_fingerprint_is_never_kept(encode, tmp_path, monkeypatch):
    monkeypatch.delattr(Letters, "fingerprint")
    found, _, said = encode()
    assert len(found.table) == 3 and not (tmp_path / "cache").exists()
    assert said[0] == "the text is not kept: its encoder has no `fingerprint()` to know it by"


def test_states_that_are_not_finite_name_their_caption(encode):
    with pytest.raises(DataError, match="states of `` are not finite in float16: train in bf16"):
        encode(Letters(1e6), kind=torch.float16)


def test_an_encoder_runs_ahead_if_it_has_weights_and_trains_none():
    text = Letters()
    assert frozen(text) and not frozen(text.requires_grad_(True))
    assert not frozen(None) and not frozen(torch.nn.Identity())


# ---- memory


def test_too_many_captions_are_left_to_the_step(encode, monkeypatch, tmp_path):
    monkeypatch.setattr(captions, "memory", lambda: 8 * 3 * 4 * 3 * 4)
    assert encode()[0] is not None
    monkeypatch.setattr(captions, "memory", lambda: 8 * 3 * 4 * 3 * 4 - 1)
    found, read, said = encode(texts=TEXTS)
    assert found is None and read == 1
    assert said == [
        "text is encoded in every step: the states of 3 captions would take 0.0 MiB, more than an"
        " eighth of the memory"
    ]
    assert encode(kind=torch.bfloat16)[0] is not None


def test_a_container_has_the_memory_that_it_is_given(tmp_path, monkeypatch):
    whole = captions.memory()
    monkeypatch.setattr(captions, "LIMIT", tmp_path / "max")
    captions.LIMIT.write_text("1048576\n")
    assert captions.memory() == 2**20 < whole
    captions.LIMIT.write_text("max\n")
    assert captions.memory() >= whole


# ---- batches


@pytest.mark.parametrize("notes", [False, True])
def test_batches_have_the_states_of_their_captions(tmp_path, notes):
    tiny.photos(tmp_path / "photos")
    pictures, text = open_source("folder", tmp_path / "photos"), Letters()
    plain = prepare(pictures, _Same(), lambda texts, length: text.ids(texts), 8)
    known = states(text, pictures.texts, torch.float32, cache=tmp_path)
    told = {"seed": 1, "batch_size": 4, "notes": notes}
    for k in range(3):
        asked = Batches(plain, **told).at(k)
        batch = Batches(replace(plain, states=known), **told).at(k)
        assert torch.equal(batch["cond"], text(asked["input_ids"])) and "input_ids" not in batch


class _Same(torch.nn.Identity):
    """A codec that leaves pictures alone."""

    encode = torch.nn.Identity.forward


# ---- in a run

CASES = {
    "dream": {**METHODS["dream"], "text": FROZEN},
    "mean_flow": {**METHODS["mean_flow"], "text": FROZEN},
    "two": {**METHODS["two_encoders"], "text": f"[{FROZEN}, {FROZEN}]"},
    "ddpm": {**METHODS["ddpm"], "text": FROZEN},
    "lcm": {**METHODS["lcm"], "text": FROZEN},
}


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The folder to run in, with pictures."""
    monkeypatch.chdir(tmp_path)
    tiny.photos(tmp_path / "photos")


def begun(case: str, out: str, resume: str | None = None, **more):
    """A run of a case that is about to make a step."""
    Path(f"{case}.diff").write_text(spec(**{**CASES[case], **more}))
    return open_session(compile_spec(f"{case}.diff"), {}, None, 3, resume, out, None)


def stepped(session, step=None, steps: int = 2) -> list[dict[str, float]]:
    """What some steps log."""
    step = step or session.programs.step.step
    read, feed = Batches(session.prepared, 0, 4, notes=False), feeding(session)
    fixed = (session.parts.modules, session.parts.plan, session.programs.tables["step"])
    logs = (step(session.state, feed(read.at(k)), *fixed) for k in range(steps))
    return [{name: value.item() for name, value in log.items()} for log in logs]


@pytest.mark.parametrize("case", ["dream", "mean_flow", "two", "lcm"])
def test_a_step_has_the_loss_and_the_gradient_that_it_has_with_its_encoder(
    case, photos, monkeypatch
):
    if case == "lcm":
        Path("ddpm.diff").write_text(spec(**CASES["ddpm"]))
        assert main(["train", "ddpm.diff", "--out", "ddpm"]) == 0
    before = begun(case, "ahead")
    monkeypatch.setattr(captions, "memory", lambda: 0)
    inside = begun(case, "inside")
    assert before.prepared.states and inside.prepared.states is None
    for one, other in zip(stepped(before), stepped(inside), strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)
    for name in ("first", "weights"):
        torch.testing.assert_close(before.state[name], inside.state[name], atol=1e-6, rtol=1e-5)


def test_in_bf16_the_states_are_kept_in_bf16(photos):
    session = begun("dream", "run", train="precision = bf16")
    assert session.prepared.states.table.dtype == torch.bfloat16
    assert all(log["loss"] == log["loss"] for log in stepped(session))


def test_a_step_without_its_encoder_is_traced_whole_and_equals_eager(photos):
    one, other = begun("dream", "one"), begun("dream", "other")
    torch._dynamo.reset()
    whole = {"fullgraph": True, "dynamic": False, "backend": "aot_eager"}
    traced = one.programs.step.step.each(partial(torch.compile, **whole))
    for ours, theirs in zip(stepped(one, traced), stepped(other), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_step_is_compiled_ahead_for_what_a_run_feeds_it(photos, monkeypatch):
    for memory in (2**40, 0):
        monkeypatch.setattr(captions, "memory", lambda memory=memory: memory)
        session = begun("dream", f"run{memory}")
        fed = feeding(session)(Batches(session.prepared, 0, 4).at(0))
        seen = session.prepared.pictures.texts
        made = ahead.fed(session.parts, session.data, seen, torch.float32)
        assert {n: (v.shape, v.dtype) for n, v in made.items()} == {
            n: (v.shape, v.dtype) for n, v in fed.items()
        }


def test_a_frozen_encoder_out_of_a_checkpoint_is_the_one_that_is_read(photos):
    """A run that took its encoder from another has it nowhere but in its checkpoints."""
    Path("ddpm.diff").write_text(spec(**CASES["ddpm"]))
    assert main(["train", "ddpm.diff", "--out", "ddpm"]) == 0
    Path("next.diff").write_text(spec(**CASES["ddpm"], train='start_from = "ddpm", seed = 5'))
    assert main(["train", "next.diff", "--out", "next", "--steps", "1"]) == 0
    first, resumed = (
        open_session(compile_spec("next.diff"), {}, None, 3, again, out, None)
        for again, out in ((None, "new"), ("next/" + ONE, "next"))
    )
    assert torch.equal(first.prepared.states.table, resumed.prepared.states.table)
    other = begun("ddpm", "other", train="seed = 5")
    assert not torch.equal(first.prepared.states.table, other.prepared.states.table)


# ---- what no step needs


class Resident(torch.nn.Linear):
    """A module that notes where it is asked to be."""

    def __init__(self):
        super().__init__(2, 2)
        self.asked = []

    def to(self, device):
        self.asked.append(str(device))
        return super().to(device)


@pytest.mark.parametrize("ahead", [True, False])
def test_an_encoder_that_no_step_calls_leaves(photos, monkeypatch, ahead):
    monkeypatch.setattr(captions, "memory", lambda: 2**40 * ahead)
    asked = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, where: asked.append(module) or module)
    session = begun("dream", "run")
    parts = session.parts
    assert [asked.count(parts.text), asked.count(parts.codec) > 1] == [1 + ahead, True]
    asked.clear()
    grid(session, 1)
    assert asked == [parts.text] * 2 + [parts.codec] * 2  # there and back


def test_who_visits_goes_home_whatever_happens():
    module = Resident()
    with pytest.raises(ZeroDivisionError), visiting(module, "cpu:0"):
        raise ZeroDivisionError
    assert module.asked == ["cpu:0", "cpu"]
    with visiting(torch.nn.Identity(), "cpu"):  # which has no home
        pass


def drawn(session) -> torch.Tensor:
    """Pictures of the run as it is."""
    made = session.bundle, session.programs, session.parts, session.state["average"], 1
    return evaluate.sample(evaluate.Model(*made), session.sample, ["picture a", "picture b"], 64)


def places(session) -> set[str]:
    """The kinds of devices that hold what may wait."""
    parts = session.parts
    waiting = (*parts.text.parameters(), *parts.codec.parameters(), *parts.kept.values())
    return {tensor.device.type for tensor in waiting}


@pytest.mark.gpu
def test_on_a_gpu_what_waits_beside_it_draws_the_same(photos):
    session = begun("dream", "run")
    stepped(session)
    assert places(session) == {"cpu"}
    waiting = drawn(session)
    assert places(session) == {"cpu"}
    for module in (session.parts.text, session.parts.codec):
        module.to("cuda")
    assert torch.equal(drawn(session), waiting)
    assert places(session) == {"cuda"}
