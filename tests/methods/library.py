"""The library's methods as small specs: what stands in the objective, and around it."""

LIBRARIES = ("sd", "label", "sit", "vision")
LABELS = 'label.classes(field = "kind", count = 2)'
CLIP = "sd.clip(train = true, layers = 1, width = 16, heads = 2, length = 8)"
SIT = "sit.transformer(depth = 1, width = 16, heads = 2, patch = 4, codec = sd.pixels, text = {}{})"
UNET = (
    "sd.unet(text = [], codec = sd.pixels, channels = [16, 16], layers = 1, heads = 2,"
    " attention = [0], groups = 4{})"
)
SPEC = """
objective o {{
  {lines}
  backbone = {backbone}
}}
data {{ source = folder("photos"), size = 16px, batch = 4 }}
train {{ steps = 2, ema = 0.5, optimizer = adamw(0.01), compile = off, device = cpu{train} }}
sample {{ solver = {solver}, count = 2{sample} }}
"""


def spec(lines, solver="euler(steps = 2)", text=LABELS, net="", train="", sample="", backbone=""):
    """The text of a spec with these lines in its objective; the lists of options are added to."""
    net, train, sample = (more and f", {more}" for more in (net, train, sample))
    backbone = backbone or SIT.format(text, net)
    lines = lines.strip().replace("\n", "\n  ")
    body = SPEC.format(lines=lines, backbone=backbone, solver=solver, train=train, sample=sample)
    imports = [f"import std.{name}\n" for name in LIBRARIES if f"{name}." in body]
    return f"diff 1\n{''.join(imports)}{body}"


STRAIGHT = "process = linear\nprediction_type = flow\n"
EDM = "process = edm\nprediction_type = sample\n"
TRIG = "process = trig\nprediction_type = flow\n"
TABLE = "process = ddpm(steps = 40)\nprediction_type = {}\n"
SEEN = "\nvision = vision.efficientnet_lite0"
GUIDED = "guidance = 2"
TWICE = "multistep(steps = 2, times = [1.1])"
METHODS = {
    "sit": {
        "lines": STRAIGHT + "strategy = drop_condition(0.5)\nt ~ logit_normal(0, 1)",
        "sample": GUIDED,
    },
    "edm": {
        "lines": EDM + "strategy = [edm_precondition, drop_condition]",
        "solver": "heun(steps = 2)",
        "sample": GUIDED,
    },
    "vp": {
        "lines": "process = vp\nprediction_type = epsilon",
        "solver": "euler_maruyama(steps = 3)",
    },
    "subvp": {"lines": "process = subvp\nprediction_type = epsilon", "solver": "ddim(steps = 2)"},
    "ve": {"lines": "process = ve\nprediction_type = epsilon", "solver": "heun(steps = 2)"},
    "gvp": {
        "lines": "process = gvp\nprediction_type = v_prediction",
        "solver": "dpm_solver_pp(steps = 2)",
    },
    "mean_flow": {
        "lines": STRAIGHT
        + "strategy = [mean_flow(0.5, omega = 2, kappa = 0.25), drop_condition(0.5)]",
        "net": "times = [t, r]",
        "solver": "jump(steps = 2)",
    },
    "trig_flow": {
        "lines": TRIG + "strategy = [trig_flow, drop_condition(0.5)]",
        "solver": "heun(steps = 2)",
        "sample": GUIDED,
    },
    "sct": {
        "lines": TRIG + "strategy = sct(warmup = 10)",
        "solver": TWICE,
        "train": 'start_from = "trig_flow"',
    },
    "scd": {
        "lines": TRIG + "strategy = scd(warmup = 10, scale = 2)",
        "solver": TWICE,
        "train": 'start_from = "trig_flow", teacher = "trig_flow"',
    },
    "ct": {"lines": EDM + "strategy = ct(total = 2)", "solver": "multistep(times = [0.8])"},
    "ict": {
        "lines": EDM + "strategy = ict(total = 2, end = 40)",
        "net": "dropout = 0.3",
        "solver": "multistep(steps = 2)",
    },
    "ddpm": {
        "lines": TABLE.format("v_prediction") + "strategy = drop_condition(0.5)",
        "solver": "ddim(steps = 4)",
        "sample": GUIDED,
    },
    "lcm": {
        "lines": TABLE.format("v_prediction") + "strategy = lcm(low = 1, high = 4, skip = 4)",
        "net": "inputs = [lcm.w]",
        "solver": "multistep(times = [29, 19, 9])",
        "train": 'start_from = "ddpm", teacher = "ddpm"',
        "sample": "guidance = 3",
    },
    "repa": {"lines": STRAIGHT + "strategy = [repa, drop_condition]" + SEEN, "net": "tap = 1"},
    "dream": {
        "lines": TABLE.format("epsilon") + "strategy = [dream, min_snr]",
        "solver": "ddim(steps = 2, eta = 1)",
    },
    "self_condition": {"lines": STRAIGHT + "strategy = self_condition", "net": "inputs = [guess]"},
    "importance": {"lines": STRAIGHT + "strategy = importance(logit_normal(0.5, 1.5))"},
    "direction": {"lines": STRAIGHT + "strategy = direction"},
    "noise": {
        "lines": STRAIGHT + "strategy = offset_noise(0.5)\neps ~ uniform_noise(x0, -1, 1)",
    },
    "grid": {"lines": "process = discrete(linear, steps = 20)\nprediction_type = flow"},
    "no_condition": {"lines": STRAIGHT, "text": "[]"},
    "two_encoders": {
        "lines": STRAIGHT + "strategy = drop_condition",
        "text": f"[{CLIP}, {CLIP}]",
        "sample": GUIDED,
    },
    "repa_edm": {
        "lines": EDM + "strategy = [edm_precondition, repa]" + SEEN,
        "backbone": UNET.format(", tap = 1"),
        "solver": "heun(steps = 2)",
    },
    "repa_mean_flow": {
        "lines": STRAIGHT + "strategy = [mean_flow(0.5), repa]" + SEEN,
        "net": "tap = 1, times = [t, r]",
        "solver": "jump(steps = 1)",
    },
}
BEFORE = {"sct": "trig_flow", "scd": "trig_flow", "lcm": "ddpm"}  # whose weights they begin with
