"""Agreement with diffusers itself. Its tables are float32, so levels agree to about 1e-6 relative;
what is computed from them then agrees to 1e-4 at the noisiest indices, where 1 - levels cancels."""

import pytest
import torch
from conftest import spec_of
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_dream_and_update_latents, compute_snr

import difftrain

SCHEDULES = {
    "linear": "linear(0.0001, 0.02)",
    "scaled_linear": "scaled_linear(0.00085, 0.012)",
    "squaredcos_cap_v2": "cosine",
}
LIMITS = {"scaled_linear": (0.00085, 0.012)}
SHAPE = (4, 4, 8, 8)
T = torch.tensor([0, 120, 600, 999])


def scheduler(name="scaled_linear", **more) -> DDPMScheduler:
    low, high = LIMITS.get(name, (0.0001, 0.02))
    return DDPMScheduler(beta_schedule=name, beta_start=low, beta_end=high, **more)


def declare(body: str, network=None, name="scaled_linear", more=""):
    process = f"process = ddpm(beta = {SCHEDULES[name]}, steps = 1000{more})"
    return difftrain.objective(spec_of(f"{process}\n{body}"), network)


@pytest.fixture
def data():
    made = torch.Generator().manual_seed(3)
    return tuple(torch.randn(SHAPE, generator=made) for _ in range(2))


# ---- levels


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("zero", [False, True])
def test_levels(name, zero):
    theirs = scheduler(name, rescale_betas_zero_snr=zero).alphas_cumprod.double()
    more = ", terminal_snr = zero" if zero else ""
    ours = declare("prediction_type = v_prediction", name=name, more=more).alphas_cumprod
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_and_velocity(name, data):
    theirs, ours = scheduler(name), declare("prediction_type = epsilon", name=name)
    for member in ("add_noise", "get_velocity"):
        both = [getattr(s, member)(*data, T) for s in (ours, theirs)]
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("zero", [False, True])
def test_a_scheduler_object_stands_in(name, zero, data):
    theirs = scheduler(name, rescale_betas_zero_snr=zero)
    spec = spec_of("process = ddpm(steps = 10)\nprediction_type = v_prediction")
    ours = difftrain.objective(spec, None, modules={"scheduler": theirs})
    torch.testing.assert_close(
        ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=1e-4, atol=2e-6
    )
    both = [s.add_noise(*data, T) for s in (ours, theirs)]
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-4)


def test_a_saved_scheduler_stands_in(tmp_path):
    theirs = scheduler("linear", num_train_timesteps=200)
    theirs.save_pretrained(tmp_path)
    spec = spec_of("process = ddpm\nprediction_type = epsilon")
    ours = difftrain.objective(spec, None, modules={"scheduler": tmp_path})
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod)


@pytest.mark.parametrize("more", [{"trained_betas": [0.1, 0.2]}, {"beta_schedule": "sigmoid"}])
def test_a_scheduler_of_another_kind_is_told(more):
    spec = spec_of("process = ddpm\nprediction_type = epsilon")
    with pytest.raises(ValueError, match="the scheduler"):
        difftrain.objective(spec, None, modules={"scheduler": DDPMScheduler(**more)})


# ---- strategies


class Answer(tuple):
    sample = property(lambda self: self[0])


def network(x, t, cond=None):
    """A small nonlinear function with the calls that diffusers makes: an object with `.sample`."""
    return Answer((torch.tanh(0.7 * x) + (t / 1000).float().reshape(-1, 1, 1, 1) + cond.mean(),))


COND = torch.full((4, 2, 3), 0.1)


@pytest.mark.parametrize("p", [0.0, 1.0, 2.0])
def test_dream(data, p):
    """arXiv:2312.00210: the noisy latents and the target after rectification, and the loss."""
    x0, eps = data
    theirs = scheduler()
    noisy = theirs.add_noise(x0, eps, T)
    xt, target = compute_dream_and_update_latents(
        network, theirs, T, eps, noisy, eps, COND, dream_detail_preservation=p
    )
    loss = (network(xt, T, COND).sample - target).square().mean((1, 2, 3))
    ours = declare(f"prediction_type = epsilon\nstrategy = dream(p = {p})", network)
    given = {"x0": x0, "eps": eps, "t": T, "cond": COND}
    values = ours.evaluate(("xt", "target", "loss"), given)
    for name, expected in (("xt", xt), ("target", target), ("loss", loss)):
        torch.testing.assert_close(values[name], expected, rtol=1e-4, atol=1e-4)


def test_dream_with_a_unet(data):
    """The same through a real conditional UNet: the first forward without gradient."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=3,
        layers_per_block=1, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    x0, eps = data
    noisy = scheduler().add_noise(x0, eps, T)
    xt, target = compute_dream_and_update_latents(unet, scheduler(), T, eps, noisy, eps, COND)
    theirs = (unet(xt, T, COND).sample - target).square().mean((1, 2, 3))
    ours = declare("prediction_type = epsilon\nstrategy = dream", unet)
    loss = ours.loss(x0, COND, t=T, eps=eps)
    torch.testing.assert_close(loss, theirs, rtol=1e-4, atol=1e-4)
    slopes = [torch.autograd.grad(v.mean(), unet.conv_in.weight)[0] for v in (loss, theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-4)


# The weights of diffusers' text-to-image examples (`--snr_gamma 5`), by prediction type.
THEIRS = {
    "epsilon": lambda snr, least: least / snr,
    "v_prediction": lambda snr, least: least / (snr + 1),
    "sample": lambda snr, least: least,
}


@pytest.mark.parametrize("prediction", THEIRS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_min_snr(data, prediction, name):
    x0, eps = data
    snr = compute_snr(scheduler(name), T)
    weight = THEIRS[prediction](snr, snr.clamp(max=5))
    body = f"prediction_type = {prediction}\nstrategy = min_snr(5)"
    values = declare(body, network, name).evaluate(
        ("pred", "target", "loss"), {"x0": x0, "eps": eps, "t": T, "cond": COND}
    )
    by_hand = weight * (values["pred"] - values["target"]).square().mean((1, 2, 3))
    torch.testing.assert_close(values["loss"], by_hand, rtol=1e-4, atol=1e-6)


def test_min_snr_at_terminal_noise():
    """Where diffusers' epsilon weight is 0 / 0, ours is its limit; for v both are 0."""
    theirs = scheduler(rescale_betas_zero_snr=True)
    snr = compute_snr(theirs, torch.tensor([999]))
    assert (snr.clamp(max=5) / snr).isnan()
    body = "prediction_type = v_prediction\nstrategy = min_snr"
    ours = declare(body, network, more=", terminal_snr = zero")
    loss = ours.loss(torch.randn(1, *SHAPE[1:]), COND[:1], t=torch.tensor([999]))
    assert loss.tolist() == [0.0]
