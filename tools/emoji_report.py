"""How a run on emoji64 did: samples of training captions and of pairs it has not seen, scored.

    python tools/emoji_report.py RUN_OR_CHECKPOINT [--out FOLDER]

writes two grids with the nearest training picture beside each sample, and prints concept and style
accuracy beside chance and the ceiling of real pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from difftrain.sampling.quality import Reals, nearest_png, report
from difftrain.training import evaluate
from difftrain.training.bundle import block
from difftrain.training.folder import open_run
from difftrain.training.samples import open_model
from difftrain.training.sources import Pictures, open_source

SHOWN, SIDE = 16, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="the folder of a run, or a checkpoint in it")
    parser.add_argument("--out", type=Path, default=Path("."), help="where the grids go")
    args = parser.parse_args()
    bundle, checkpoint = open_run(args.run)
    spec = bundle.read()
    model, options = open_model(bundle, spec.objective(), checkpoint, SIDE), block(spec, "sample")
    seen, unseen = (open_source("emoji64", split=split) for split in ("train", "test"))
    labels = {k: sorted({r.fields[k] for r in seen.records}) for k in ("label", "style")}
    real, held = reals(seen, labels), reals(unseen, labels)
    print("| captions | concept | chance | ceiling | style | chance | ceiling | copies |")
    print("|---|---|---|---|---|---|---|---|")
    spread = list(range(0, len(seen), len(seen) // len(unseen)))[: len(unseen)]
    groups = {"seen in training": (seen, spread), "held-out pairs": (unseen, range(len(unseen)))}
    for name, (pictures, rows) in groups.items():
        captions = [pictures.records[r].caption for r in rows]
        made = samples(model, options, captions)
        wanted = reals(pictures, labels, rows)
        scores = report(made, wanted.concept, wanted.style, real, held)
        cells = " | ".join(f"{scores[k]:.3f}" for k in COLUMNS)
        print(f"| {name}, {len(rows)} | {cells} |")
        shown = [round(i * (len(rows) - 1) / (SHOWN - 1)) for i in range(SHOWN)]
        file = args.out / f"emoji64-{name.split()[0]}.png"
        nearest_png(file, made[shown], [captions[i] for i in shown], real)


COLUMNS = ("concept", "concept_chance", "concept_ceiling", "style", "style_chance", "style_ceiling",
           "copies")  # fmt: skip


def reals(pictures: Pictures, labels: dict, rows=None) -> Reals:
    """Pictures [N, 3, 64, 64] in [-1, 1] with their labels."""
    rows = range(len(pictures)) if rows is None else rows
    images = torch.stack([pictures.image(r, SIDE) for r in rows]).float() / 127.5 - 1
    concept, style = (
        torch.tensor([labels[k].index(pictures.records[r].fields[k]) for r in rows]) for k in labels
    )
    return Reals(images, concept, style)


def samples(model, options, captions: list[str]) -> Tensor:
    """One picture a caption, from the averaged weights, on the CPU."""
    images = evaluate.sample(model, options, captions, SIDE)
    return images.float().cpu().clamp(-1, 1)


if __name__ == "__main__":
    main()
