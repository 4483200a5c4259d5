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
from difftrain.training.bundle import open_bundle
from difftrain.training.run import Session, open_session
from difftrain.training.sources import Pictures

SHOWN = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    session = opened(args.run)
    out = args.out or session.folder
    out.mkdir(parents=True, exist_ok=True)
    seen, unseen = session.prepared.pictures, session.unseen.pictures
    labels = {k: sorted({r.fields[k] for r in seen.records}) for k in ("label", "style")}
    real, held = reals(seen, labels), reals(unseen, labels)
    print("| captions | concept | chance | ceiling | style | chance | ceiling | copies |")
    print("|---|---|---|---|---|---|---|---|")
    spread = range(0, len(seen), len(seen) // 68)
    for name, pictures, rows in (
        ("seen in training", seen, list(spread)[:68]),
        ("held-out pairs", unseen, list(range(len(unseen)))),
    ):
        captions = [pictures.records[r].caption for r in rows]
        made = samples(session, captions)
        wanted = reals(pictures, labels, rows)
        scores = report(made, wanted.concept, wanted.style, real, held)
        cells = [scores[k] for k in COLUMNS]
        print(f"| {name}, {len(rows)} | " + " | ".join(f"{c:.3f}" for c in cells) + " |")
        shown = spaced(len(rows))
        file = out / f"emoji64-{name.split()[0]}.png"
        nearest_png(file, made[shown], [captions[i] for i in shown], real)


COLUMNS = ("concept", "concept_chance", "concept_ceiling", "style", "style_chance", "style_ceiling",
           "copies")  # fmt: skip


def opened(run: Path) -> Session:
    """The run as it stood at a checkpoint, the last one where its folder is given."""
    folder = run if run.is_dir() else run.parent.parent
    names = [p.name for p in folder.iterdir() if p.suffix in (".diff", ".json", ".py", ".txt")]
    files = {n: (folder / n).read_text() for n in names if n != "validation.json"}
    return open_session(open_bundle(files), {}, None, None, str(run), str(folder), None)


def spaced(count: int) -> list[int]:
    return [round(i * (count - 1) / (SHOWN - 1)) for i in range(SHOWN)]


def reals(pictures: Pictures, labels: dict, rows=None) -> Reals:
    """Pictures [N, 3, 64, 64] in [-1, 1] with their labels."""
    rows = range(len(pictures)) if rows is None else rows
    images = torch.stack([pictures.image(r, 64) for r in rows]).float() / 127.5 - 1
    concept, style = (
        torch.tensor([labels[k].index(pictures.records[r].fields[k]) for r in rows]) for k in labels
    )
    return Reals(images, concept, style)


def samples(session: Session, captions: list[str]) -> Tensor:
    """One picture a caption, from the averaged weights, on the CPU."""
    images = evaluate.sample(
        session.bundle, session.programs, session.parts, session.state["average"], session.sample,
        captions, session.data["size"],
    )  # fmt: skip
    return images.float().cpu().clamp(-1, 1)


if __name__ == "__main__":
    main()
