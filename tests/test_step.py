"""The emitted training step, eager and traced whole; test_precision.py says how exact it is."""

from functools import partial

import pytest
import torch

from difftrain.compiler.layout import gather, layout
from difftrain.compiler.lowering import compiler
from difftrain.compiler.update import adamw
from difftrain.models import build
from difftrain.training import state as states
from difftrain.training.bundle import compile_text

SPEC = """diff 1
import std.sd

objective tiny {{
  process         = ddpm(beta = scaled_linear(0.00085, 0.012))
  prediction_type = v_prediction
  strategy        = [dream(1), drop_condition(0.5)]
  backbone        = sd.unet(
    text = sd.clip(train = {train}, layers = 1, width = 16, heads = 2, length = 8),
    channels = [16, 16], layers = 1, heads = 2, attention = [0], groups = 4
  )
}}

train {{ optimizer = adamw(lr = 0.01), precision = {precision}, warmup = 2, ema = ema_warmup(0.9) }}
"""
WORDS = list(range(1000, 1020))
STEPS = 4


class Bench:
    """A compiled spec with tiny modules and random batches."""

    def __init__(self, precision="fp32", train="true", text=SPEC):
        bundle = compile_text("tiny", text.format(precision=precision, train=train))
        self.bundle, self.module = bundle, bundle.module("step.py")
        self.precision = precision
        part = bundle.read().objective().backbone.part
        torch.manual_seed(0)
        codec = build(part.options["codec"])
        text_encoder = build(part.options["text"], vocabulary=[*WORDS, 49406, 49407])
        if train == "false":
            text_encoder.requires_grad_(False)
        network = build(part, codec=codec, text=text_encoder)
        self.modules = {"student": network, "text": text_encoder}
        self.plan = layout(self.modules)
        self.weights = gather(self.modules, self.plan, "cpu")
        self.tables = {k: v.float() for k, v in self.module.tables().items()}

    def fresh(self):
        return states.fresh(self.weights.clone(), 0, STEPS, precision=self.precision)

    def batch(self, k):
        made = torch.Generator().manual_seed(k)
        return {
            "x0": torch.randn(4, 4, 8, 8, generator=made),
            "index": torch.arange(4 * k, 4 * k + 4),
            "input_ids": torch.randint(1000, 1020, (4, 8), generator=made),
            "null_ids": torch.full((1, 8), 49407),
        }

    def run(self, step, steps=STEPS, state=None):
        state = self.fresh() if state is None else state
        logs = []
        for k in range(steps):
            log = step(state, self.batch(k), self.modules, self.plan, self.tables)
            logs.append({n: v.item() for n, v in log.items()})
        return state, logs


def same(a, b, tolerance):
    for name in a:
        assert torch.allclose(a[name].float(), b[name].float(), atol=tolerance, rtol=tolerance), (
            name
        )


def test_the_loss_falls_on_one_batch():
    bench = Bench()
    bench.batch = lambda k, only=bench.batch: {**only(0), "index": torch.arange(4 * k, 4 * k + 4)}
    _, logs = bench.run(bench.module.step, 60)
    losses = [log["loss"] for log in logs]
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_the_step_is_traced_whole_and_equals_eager():
    bench = Bench()
    torch._dynamo.reset()
    whole = {"fullgraph": True, "dynamic": False, "backend": "aot_eager"}
    traced = bench.module.step.each(partial(torch.compile, **whole))
    eager, expected = bench.run(bench.module.step)
    state, logs = bench.run(traced, 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for k in (2, 3):
            log = traced(state, bench.batch(k), bench.modules, bench.plan, bench.tables)
            logs.append({n: v.item() for n, v in log.items()})
    for ours, theirs in zip(logs, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    for name in ("weights", "first", "second", "average"):  # a key's bias has no true gradient
        assert (eager[name] - state[name]).norm() < 1e-5 * eager[name].norm()


def test_adamw_is_torch_s():
    bench = Bench()
    reference = bench.weights.clone().requires_grad_()
    optimizer = torch.optim.AdamW([reference], lr=0.01, weight_decay=0.01)
    gradients = [
        torch.randn(len(reference), generator=torch.Generator().manual_seed(k)) for k in range(3)
    ]
    state = bench.fresh()
    for gradient in gradients:
        reference.grad = gradient.clone()
        optimizer.step()
        adamw(
            state, gradient, state["updates"] + 1.0, torch.tensor(0.01), lambda n: 0.5,
            beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01,
        )  # fmt: skip
    assert torch.allclose(state["weights"], reference, atol=1e-6)


def test_a_frozen_text_encoder_is_not_in_the_state():
    bench = Bench(train="false")
    assert {slot.module for slot in bench.plan.slots} == {"student"}
    before = [p.clone() for p in bench.modules["text"].parameters()]
    bench.run(bench.module.step, 2)
    assert all(
        torch.equal(a, b) for a, b in zip(before, bench.modules["text"].parameters(), strict=True)
    )


def test_an_overflow_moves_nothing_but_the_scale():
    bench = Bench(precision="fp16")
    state = bench.fresh()
    held = {n: state[n].clone() for n in ("weights", "first", "second", "average", "updates")}
    batch = bench.batch(0)
    batch["x0"] = batch["x0"] * float("inf")
    bench.module.step(state, batch, bench.modules, bench.plan, bench.tables)
    same({n: state[n] for n in held}, held, 0)
    assert state["scale"] == states.SCALE / 2
    assert state["turn"] == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_stay_in_fp32(precision):
    bench = Bench(precision=precision)
    state, logs = bench.run(bench.module.step, 2)
    assert state["weights"].dtype == torch.float32
    assert all(log["loss"] == log["loss"] for log in logs)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_forward_passes_read_a_copy_that_follows_the_weights(precision):
    bench = Bench(precision=precision)
    state, _ = bench.run(bench.module.step, 2)
    assert state["half"].dtype == states.HALVES[precision]
    assert torch.equal(state["half"], state["weights"].to(state["half"].dtype))
    other = {name: value.clone() for name, value in state.items()}
    other["half"].zero_()
    (log,), (zeroed,) = (bench.run(bench.module.step, 1, s)[1] for s in (state, other))
    assert log["loss"] != zeroed["loss"]


def test_a_gradient_in_half_precision_is_near_that_in_fp32():
    benches = (Bench(precision=precision) for precision in ("fp32", "bf16"))
    exact, half = (bench.run(bench.module.step, 1)[0]["first"] for bench in benches)
    assert 0 < (half - exact).norm() < 3e-2 * exact.norm()


def test_weights_of_convolutions_lie_with_the_channel_last():
    bench = Bench()
    weight = bench.modules["student"].get_parameter("module.conv_in.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.data_ptr() >= bench.weights.data_ptr()
    names = [slot.name for slot in bench.plan.slots if slot.start < bench.plan.products]
    assert all(not name.endswith("norm.weight") for name in names)
    assert "module.conv_in.weight" in names


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_goes_on_bit_for_bit(precision, tmp_path):
    bench = Bench(precision=precision)
    whole, _ = bench.run(bench.module.step, 4)
    half, _ = bench.run(bench.module.step, 2)
    facts = {"graph": bench.bundle.manifest["graph"]}
    states.save(tmp_path / "a.safetensors", half, bench.plan, facts)
    resumed = bench.fresh()
    states.load(tmp_path / "a.safetensors", resumed, bench.plan, facts["graph"])
    for k in (2, 3):
        bench.module.step(resumed, bench.batch(k), bench.modules, bench.plan, bench.tables)
    same(whole, resumed, 0)


def test_a_checkpoint_of_another_objective_is_refused(tmp_path):
    bench = Bench()
    states.save(tmp_path / "a.safetensors", bench.fresh(), bench.plan, {"graph": "abc"})
    with pytest.raises(states.CheckpointError, match="belongs to another objective"):
        states.load(tmp_path / "a.safetensors", bench.fresh(), bench.plan, "def")


def test_a_truncated_checkpoint_is_refused(tmp_path):
    bench = Bench()
    path = tmp_path / "a.safetensors"
    states.save(path, bench.fresh(), bench.plan, {"graph": "abc"})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(states.CheckpointError, match="cannot be read"):
        states.load(path, bench.fresh(), bench.plan, "abc")


@pytest.mark.gpu
def test_on_a_gpu_derivatives_of_convolutions_are_given_what_they_read():
    """A group norm leaves the channel first; nothing is copied for that."""

    width = 128  # where no convolution is wider than 64, Inductor puts no channel last

    def block():
        norm = torch.nn.GroupNorm(4, width)
        return torch.nn.Sequential(
            torch.nn.Conv2d(width, width, 3, padding=1), norm, torch.nn.SiLU()
        )

    network = torch.nn.Sequential(block(), block(), block()).cuda()
    network.to(memory_format=torch.channels_last)
    weights = dict(network.named_parameters())
    x = torch.randn(8, width, 16, 16, device="cuda")

    def loss(weights):
        with torch.autocast("cuda", torch.bfloat16):
            made = torch.func.functional_call(network, weights, x, tie_weights=False)
        return made.float().square().mean()

    torch._dynamo.reset()
    found = compiler(forward=False)(torch.func.grad(loss))
    found(weights)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        found(weights)
    names = [event.name for event in profile.events()]
    assert any("triton" in name for name in names)
    assert not [name for name in names if "direct_copy_kernel" in name]
