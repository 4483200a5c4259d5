"""What is compared with what: the rows of the table, and the contenders of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

FAMILIES = {  # the side of a peer's latents; its tiny sizes, and the settings that make ours equal
    "unet": (
        64,
        {"width": 32, "layers": 1},
        {"backbone.channels": "[32, 64, 128, 128]", "backbone.layers": "1"},
    ),
    "dit": (
        32,
        {"width": 64, "depth": 2, "heads": 1},
        {"backbone.width": "64", "backbone.depth": "2", "backbone.heads": "1"},
    ),
}
Key = tuple[str, str]  # a row as it was asked for, and the label of a contender
MEMORY = {"unet": (18, 1.15), "dit": (13, 0.42)}  # GB of weights and of a sample, as measured
TINY = {"train.precision": "fp32", "train.compile": "on"}
TINY_SIDE, TINY_BATCH = 16, 4


@dataclass(frozen=True)
class Contender:
    """One training step to be measured: `spec`, a file beside this one with settings, or a peer, a
    `network` in a `form` of its loop. Its arithmetic is worth so many forward `passes`, where a
    backward counts two."""

    label: str
    family: str
    spec: str = ""
    settings: tuple[tuple[str, str], ...] = ()
    network: str = ""
    form: str = ""
    dream: bool = False
    passes: int = 3
    side: int = 0  # of the latents; 0: the family's
    update: bool = False  # whether the kernels of the update alone are counted

    def task(self, batch: int, tiny: bool, more: Mapping[str, str]) -> dict[str, object]:
        """What the process that measures it is told; specs have `more` settings."""
        side, sizes, settings = FAMILIES[self.family]
        named = {k: v for k, v in vars(self).items() if k != "label"}
        told = {**named, "batch": batch, "side": self.side or side, "sizes": {}}
        told["settings"] = {**dict(self.settings), "data.batch": str(batch), **more}
        told["precision"] = "bf16"
        if tiny:
            told |= {"side": TINY_SIDE, "sizes": sizes, "precision": "fp32"}
            told["settings"] = {**told["settings"], **settings, **TINY, **more}
        return told

    def memory(self, batch: int) -> float:
        """The GB that it may take: more where a sample has more tokens or more passes."""
        weights, sample = MEMORY[self.family]
        tokens = (self.side / FAMILIES[self.family][0]) ** 2 if self.side else 1
        return weights + sample * batch * tokens * self.passes / 3


@dataclass(frozen=True)
class Row:
    """Contenders on the same batch. What is said of them: `faster` is by how much the first label
    is faster than each of the others, `costs` how much longer a step of the first takes than
    one of the second, and `around` what the first spends beyond the second."""

    title: str
    batch: int
    contenders: tuple[Contender, ...]
    faster: tuple[str, ...] = ()
    costs: tuple[tuple[str, str], ...] = ()
    around: tuple[str, str] | tuple[()] = ()

    def beside(self, label: str) -> str:
        """The contender that this one is so near to that both need the same GPU; or none."""
        pairs = [*self.costs, *[self.around[::-1]] * bool(self.around)]
        return dict(pairs).get(label, "")


PLAIN, DREAM, BARE = "ours", "ours, DREAM", "ours, network and update alone"
EAGER, COMPILED, LAST = "(a) eager", "(b) compiled", "(b) compiled, channels-last"
OWN, FLOW, MATH = "(b) own network compiled", "ours, MeanFlow", "ours, math attention"

SD15 = Contender(PLAIN, "unet", spec="sd15")
UNETS = (
    Contender(EAGER, "unet", network="unet", form="eager"),
    Contender(COMPILED, "unet", network="unet", form="compiled"),
    Contender(LAST, "unet", network="unet", form="channels-last"),
)
GRAPHS = Contender("(b) reduce-overhead", "unet", network="unet", form="reduce-overhead")
DITS = (
    Contender(EAGER, "dit", network="dit", form="eager"),
    Contender(COMPILED, "dit", network="dit", form="compiled"),
    Contender(OWN, "dit", network="own_dit", form="compiled"),
)
ROWS = {
    "sd15": Row(
        "SD1.5 UNet",
        16,
        (*UNETS, SD15, Contender(BARE, "unet", spec="bare", update=True)),
        faster=(PLAIN, COMPILED, LAST),
        around=(PLAIN, BARE),
    ),
    "small": Row(
        "SD1.5 UNet", 2, (*UNETS, GRAPHS, SD15), faster=(PLAIN, COMPILED, LAST, GRAPHS.label)
    ),
    "dit": Row(
        "DiT-XL/2",
        64,
        (
            *DITS,
            Contender(PLAIN, "dit", spec="dit"),
            Contender(BARE, "dit", spec="bare_dit", update=True),
        ),
        faster=(PLAIN, COMPILED, OWN),
        around=(PLAIN, BARE),
    ),
    "dream": Row(
        "DREAM",
        16,
        (
            replace(UNETS[0], label="(a) plain"),
            replace(UNETS[0], label="(a) DREAM", dream=True, passes=4),
            SD15,
            Contender(DREAM, "unet", spec="sd15_dream", passes=4),
        ),
        costs=((DREAM, PLAIN), ("(a) DREAM", "(a) plain")),
    ),
    "mean_flow": Row(
        "MeanFlow on DiT-XL/2",
        64,
        (
            Contender(PLAIN, "dit", spec="sit"),
            Contender(FLOW, "dit", spec="mean_flow", passes=4),
        ),
        costs=((FLOW, PLAIN),),
    ),
    "sct": Row(
        "sCT, 1,024 tokens",
        16,
        (
            Contender(
                MATH,
                "dit",
                spec="sct",
                settings=(("backbone.attention", "math"),),
                passes=4,
                side=64,
            ),
            Contender(PLAIN, "dit", spec="sct", passes=4, side=64),
        ),
        faster=(PLAIN, MATH),
    ),
}

WHOLE = ("sd15", "small", "dit", "dit:96", "dit:128", "dream", "mean_flow", "sct")  # the table
# What is measured first, where the time may not be enough for everything. Two that need the same
# GPU, and that it has no room for at once, come before all others.
WANTED = (
    ("mean_flow", PLAIN),
    ("mean_flow", FLOW),
    ("sd15", COMPILED),
    ("sd15", PLAIN),
    ("small", COMPILED),
    ("small", PLAIN),
    ("dit", COMPILED),
    ("dit", PLAIN),
    ("dream", DREAM),
    ("sd15", BARE),
    ("sct", PLAIN),
    ("sct", MATH),
)


def rank(key: Key) -> tuple[int, bool]:
    """How soon a contender of a row is measured: what is wanted, then what need not be compiled."""
    place = WANTED.index(key) if key in WANTED else len(WANTED)
    return place, not key[1].startswith("(a)")
