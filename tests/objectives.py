"""Objectives for tests: every process with every prediction type and strategies, and users' own."""

from itertools import product

import torch
from torch import nn

from difftrain.compiler.draws import Draws
from difftrain.language.spec import Objective, read_source
from difftrain.language.tree import Source

DDPM = "process = ddpm(beta = scaled_linear, steps = 50)"
COSINE = "process = ddpm(beta = cosine, steps = 50)"
ZERO = "process = ddpm(beta = scaled_linear, steps = 50, terminal_snr = zero)"
LINEAR = "process = linear"
OWN = """
process arc(data = 0.5) {
  t ~ uniform(0, 1.5)
  alpha = cos(t)
  sigma = data * sin(t)
}
process growing(low = 0.1, high = 20) {
  t ~ uniform(0.00001, 1)
  area  = low * t + (high - low) * t^2 / 2
  alpha = exp(-area / 2)
  sigma = sqrt(1 - exp(-area))
}
process exploding(mean = -1.2, std = 1.2) {
  t ~ log_normal(mean, std)
  alpha = 1
  sigma = t
}
prediction halves { target = 0.5 * x0 - 2 * eps }
prediction leaning { target = sigma * x0 + alpha * eps }
strategy gentle(rate = 0.3) { fit' = log(1 + rate * snr) * mse(x0_hat, x0) }
strategy nudge(rate = 0.2) { eps' = eps + rate * stop(eps_hat - eps) }
strategy wrapped(data = 0.5) {
  c_in'    = 1 / sqrt(sigma^2 + (alpha * data)^2)
  c_out'   = sigma * data / sqrt(sigma^2 + (alpha * data)^2)
  c_skip'  = alpha * data^2 / (sigma^2 + (alpha * data)^2)
  c_noise' = log(sigma / alpha) / 4
  fit'     = mse(pred, target) / c_out^2
}
strategy jumpy(ratio = 0.5) {
  one ~ again(t), two ~ again(t)
  apart ~ bernoulli(ratio)
  t'      = max(one, two)
  r       = if apart then min(one, two) else t
  target' = stop(target - (t - r) * ddt(pred))
}
"""
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow", "halves", "leaning")
STRATEGIES = (
    "",
    "dream",
    "min_snr",
    "p2",
    "dream, min_snr",
    "offset_noise, dream",
    "input_perturbation, min_snr",
    "p2, drop_condition",
    "gentle",
    "nudge, gentle",
)
LINES = {  # beside process and prediction
    "huber": "fit' = huber(pred, target, 0.1)",
    "pseudo_huber": "fit' = pseudo_huber_norm(x0_hat, x0, 0.1)",
    "noise_weighted": "fit' = mse(eps_hat, eps)",
    "two_terms": "fit' = min(snr, 5) * mse(x0_hat, x0) + 0.1 * mse(eps_hat, eps)",
    "divided": "fit' = mse(x0_hat, x0) / (1 + sigma^2)",
    "summed": "fit' = snr^(-0.5) * sse(eps_hat, eps)",
    "scaled": "loss = fit * (1 + step / 10)",
    "adaptive": "fit' = adaptive(sse(pred, target))",
}
LAWS = {
    "logit_normal": "t ~ logit_normal(0, 1)",
    "shifted": "t ~ logit_normal(0, 1)\nt' = shift(t, 3)",
    "by_size": "t' = shift(t, sqrt(numel(x0) / 4))",
    "earlier": "t ~ earlier(uniform(0, 1), 0.5)",
    "mode": "t ~ mode(1.29)",
    "primed_input": "xt' = 0.9 * xt",
    "derivative": "target' = stop(target - t * ddt(pred))",
    "jumps": "strategy = jumpy",
    "jumps_dropped": "strategy = [jumpy, drop_condition(0.5)]",
}


def _pairs() -> dict[str, str]:
    """Every process with every prediction type and strategy that has a meaning there."""
    processes = {"ddpm": DDPM, "cosine": COSINE, "zero": ZERO, "linear": LINEAR}
    processes |= {"arc": "process = arc", "exploding": "process = exploding"}
    found = {}
    for (short, process), prediction, strategy in product(
        processes.items(), PREDICTIONS, STRATEGIES
    ):
        if prediction == "flow" and short in ("ddpm", "cosine", "zero"):
            continue  # a table has no slope
        body = f"{process}\nprediction_type = {prediction}\nstrategy = [{strategy}]"
        found[f"{short}-{prediction}-{strategy.replace(', ', '+')}"] = body
    return found


PAIRS = _pairs()
OTHERS = {f"ddpm-{k}": f"{DDPM}\nprediction_type = v_prediction\n{v}" for k, v in LINES.items()}
OTHERS |= {f"linear-{k}": f"{LINEAR}\nprediction_type = flow\n{v}" for k, v in LINES.items()}
OTHERS |= {f"linear-{k}": f"{LINEAR}\nprediction_type = flow\n{v}" for k, v in LAWS.items()}
OTHERS |= {
    "growing": "process = growing\nprediction_type = epsilon\nstrategy = min_snr",
    "growing-flow": "process = growing\nprediction_type = flow\nstrategy = dream",
    "wrapped": "process = exploding\nprediction_type = sample\nstrategy = wrapped",
    "wrapped-linear": f"{LINEAR}\nprediction_type = flow\nstrategy = [wrapped, dream]",
}
TWO = "backbone = custom(times = [t, r])"
TRIG = "process = trig\nprediction_type = flow\nstrategy = {}"
EDM = "process = edm\nprediction_type = sample\nstrategy = {}"
STRAIGHT = f"{LINEAR}\nprediction_type = flow\n"
SEEN = "backbone = custom(inputs = [{}])"
METHODS = {  # with several nets, heads, copies, grids and laws of their own
    "mean-flow": f"{STRAIGHT}strategy = mean_flow\n{TWO}",
    "mean-flow-guided": f"{STRAIGHT}strategy = [mean_flow(0.5, omega = 1.5, kappa = 0.25,"
    f" start = 0.1, end = 0.9), drop_condition(0.5)]\n{TWO}",
    "mean-flow-bent": f"{STRAIGHT}strategy = mean_flow\n{TWO}\nbend = mean(ddt(ddt(pred))^2)\n"
    "loss = fit + 0.001 * bend",
    "sct": TRIG.format("sct(warmup = 10)"),
    "scd": TRIG.format("[scd(warmup = 10, scale = 2), drop_condition(0.5)]"),
    "ct": EDM.format("ct(total = 20)"),
    "ict": EDM.format("ict(total = 20, end = 40)"),
    "lcm": f"{DDPM.replace('50', '40')}\nprediction_type = epsilon\nstrategy = lcm(skip = 4)\n"
    + SEEN.format("lcm.w"),
    "lcm-v": f"{DDPM.replace('50', '40')}\nprediction_type = v_prediction\n"
    f"strategy = lcm(skip = 4)\n{SEEN.format('lcm.w')}",
    "repa": f"{STRAIGHT}strategy = [repa, min_snr]",
    "self-condition": f"{STRAIGHT}strategy = self_condition\n{SEEN.format('guess')}",
    "importance": f"{STRAIGHT}strategy = importance(logit_normal(0.5, 1.5))",
    "direction": f"{STRAIGHT}strategy = direction",
    "uncertainty": EDM.format("edm_precondition") + "\nloss = uncertainty(fit)",
    "truncated": f"{DDPM}\nprediction_type = sample\nstrategy = truncated_snr",
    "grid": "process = discrete(linear, steps = 20)\nprediction_type = flow\nstrategy = dream",
    "grid-jumps": f"process = discrete(gvp)\nprediction_type = flow\nstrategy = mean_flow\n{TWO}",
    "levels": "process = vp\nprediction_type = epsilon\nlogsnr ~ uniform(-8, 8)",
    "levels-closed": f"{STRAIGHT}logsnr ~ normal(0, 2)",
    "noise": f"{STRAIGHT}eps ~ uniform_noise(x0, -1, 1) + 0.5 * noise(pool(x0))",
    "taught": "process = trig\nprediction_type = flow\nteacher = other\n"
    "target' = stop(pred(net = teacher))",
}
OTHER = """
objective other {
  process         = vp
  prediction_type = v_prediction
  backbone        = custom
}
"""
ALL = PAIRS | OTHERS | METHODS


def declared(body: str) -> Objective:
    """The objective with this body, beside the definitions in OWN; `r` reaches those that jump."""
    if "backbone" not in body:
        body += f"\nbackbone = custom(times = {'[t, r]' if 'jumpy' in body else '[t]'})"
    other = OTHER if "teacher = other" in body else ""
    text = f"diff 1\n{OWN}\n{other}\nobjective o {{\n{body}\n}}\n"
    found = []
    spec = read_source(Source("test.diff", text), found)
    assert not found, found
    return spec.objective("o")


def wide(v, like):
    return v.to(like.dtype).reshape(-1, *(1,) * (like.dim() - 1))


class Tiny(nn.Module):
    """A network with a few weights, float64: every input changes what it returns."""

    def __init__(self, scale: float = 1.0, tapped: bool = False):
        super().__init__()
        first = scale * torch.tensor([0.3, 0.1, 0.05, 0.2, 0.15], dtype=torch.float64)
        self.weight, self.tapped = nn.Parameter(first), tapped

    def forward(self, x, t, cond=None, r=None, w=None, guess=None):
        """x [B, ...], t [B], cond [B, T, D]."""
        a, b, c, d, e = self.weight
        out = torch.tanh(a * x) + b * wide(t, x) / (1 + wide(t, x))
        out = out if r is None else out + c * wide(r, x)
        out = out if w is None else out + e * wide(w, x) / 10
        out = out if guess is None else out + e * guess
        out = out if cond is None else out + d * wide(cond.mean((1, 2)), x)
        return (out, a * x.flatten(2)) if self.tapped else out


class Curve(nn.Module):
    """A number for each sample that its weight changes."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x):
        return torch.sin(self.weight * x)


class Mixed(nn.Module):
    """Tokens whose channels are scaled by a weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, tokens):
        return torch.sin(self.weight * tokens) + tokens.flip(-1)


def nets() -> dict:
    """Every net that an objective may read."""
    lagged = {f"{name}.lagged": Tiny(0.8).requires_grad_(False) for name in ("ct", "lcm")}
    return {
        "student": Tiny(tapped=True),
        "teacher": Tiny(1.2).requires_grad_(False),
        "logvar": Curve(),
        "project": Mixed(),
        "vision": lambda image: image.flatten(2).flip(1),
        **lagged,
    }


def batch(size: int = 3) -> dict:
    """What a step is given, in float64."""
    made = torch.Generator().manual_seed(0)
    x0 = torch.randn(size, 2, 3, 4, generator=made, dtype=torch.float64)
    cond = torch.randn(size, 2, 3, generator=made, dtype=torch.float64)
    null = torch.zeros(1, 2, 3, dtype=torch.float64)
    image = torch.randn(size, 2, 3, 4, generator=made, dtype=torch.float64)
    return {"x0": x0, "cond": cond, "null": null, "step": torch.tensor(7), "image": image}


def draws(size: int = 3) -> Draws:
    """The draws of step 7, in float64."""
    return Draws(0, 7, torch.arange(size), torch.float64)
