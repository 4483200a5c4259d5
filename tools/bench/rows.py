"""What is compared with what: the rows of the table, and the contenders of each."""

from __future__ import annotations

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

    def task(self, batch: int, tiny: bool) -> dict[str, object]:
        """What the process that measures it is told."""
        side, sizes, settings = FAMILIES[self.family]
        named = {k: v for k, v in vars(self).items() if k != "label"}
        told = {**named, "batch": batch, "side": self.side or side, "sizes": {}}
        told["settings"] = {**dict(self.settings), "data.batch": str(batch)}
        told["precision"] = "bf16"
        if tiny:
            told |= {"side": TINY_SIDE, "sizes": sizes, "precision": "fp32"}
            told["settings"] |= {**settings, **TINY}
        return told


@dataclass(frozen=True)
class Row:
    """Contenders on the same batch. What is said of them: `faster` is by how much the first label
    is faster than the fastest of the others, `costs` how much longer a step of the first takes than
    one of the second, and `around` what the first spends beyond the second."""

    title: str
    batch: int
    contenders: tuple[Contender, ...]
    faster: tuple[str, ...] = ()
    costs: tuple[tuple[str, str], ...] = ()
    around: tuple[str, str] | tuple[()] = ()


PLAIN, DREAM, BARE = "ours", "ours, DREAM", "ours, network and update alone"
EAGER, COMPILED, LAST = "(a) eager", "(b) compiled", "(b) compiled, channels-last"

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
    Contender("(b) own network compiled", "dit", network="own_dit", form="compiled"),
)
ROWS = {
    "sd15": Row(
        "SD1.5 UNet",
        16,
        (*UNETS, SD15, Contender(BARE, "unet", spec="bare")),
        faster=(PLAIN, COMPILED, LAST),
        around=(PLAIN, BARE),
    ),
    "small": Row("SD1.5 UNet", 2, (*UNETS, GRAPHS, SD15), faster=(PLAIN, COMPILED, LAST)),
    "dit": Row(
        "DiT-XL/2",
        64,
        (*DITS, Contender(PLAIN, "dit", spec="dit")),
        faster=(PLAIN, COMPILED, "(b) own network compiled"),
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
            Contender("ours, MeanFlow", "dit", spec="mean_flow", passes=4),
        ),
        costs=(("ours, MeanFlow", PLAIN),),
    ),
    "sct": Row(
        "sCT, 1,024 tokens",
        16,
        (
            Contender(
                "ours, math attention",
                "dit",
                spec="sct",
                settings=(("backbone.attention", "math"),),
                passes=4,
                side=64,
            ),
            Contender(PLAIN, "dit", spec="sct", passes=4, side=64),
        ),
        faster=(PLAIN, "ours, math attention"),
    ),
}
