"""A run as a pipeline folder of diffusers, which samples as the run does.

The folder is written, loaded again and run beside the run on the same noise; where the two part,
nothing is left of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import difftrain
from difftrain.export import saved
from difftrain.export.beside import Made, compare, prompts
from difftrain.export.continuous import preconditioned
from difftrain.export.errors import ExportError, no_pipeline
from difftrain.export.manifest import staged
from difftrain.export.opened import Opened
from difftrain.export.pipelines import pipeline
from difftrain.language.forms import clock
from difftrain.language.term import is_const

WRAPPED = {"c_in": 1, "c_out": 1, "c_skip": 0}  # what a network is called bare with


def export(run: Opened, folder: Path, say: Callable[[str], object] = print) -> Path:
    """Writes the pipeline folder of a run. Raises ExportError."""
    with staged(folder) as beside:
        _samples_bare(run)
        made = pipeline(run)
        made.pipe.save_pretrained(beside)
        saved.label(beside, _facts(run))
        error = compare(run, beside, made)
        say(f"latents and pictures are those of the run: relative error {error:.1e}")
        if made.known:
            say(made.known)
        (beside / "README.md").write_text(_card(run, made, folder, error), encoding="utf-8")
    return folder


# ---- what diffusers has no form for


def _samples_bare(run: Opened) -> None:
    """Refuses what no pipeline does: more than a network at (x, t, condition) that returns the
    prediction or what a scheduler makes it of, and noise that is not standard normal."""
    objective, student = run.objective, run.parts.modules["student"]
    derivation = objective.derivation()
    wrapped = [n for n, v in WRAPPED.items() if not is_const(derivation.read(n), v)]
    if derivation.read("c_noise") is not derivation.read(clock(objective.equations)):
        wrapped.append("c_noise")
    further = [*objective.backbone.interface.times[1:], *getattr(student, "further", ())]
    if further:
        raise ExportError(no_pipeline(f"a network that is told `{further[0]}` as well"))
    if run.guess:
        raise ExportError(no_pipeline("a network that is shown its earlier estimate"))
    if wrapped and preconditioned(run) is None:
        raise ExportError(
            f"the network is trained inside `{wrapped[0]}`, and diffusers calls it bare where it"
            " does not know the process and the factors: sample the run with `difftrain sample`, or"
            " train it without preconditioning"
        )
    if run.model.programs.noise is not None:
        raise ExportError(no_pipeline("noise that is not standard normal"))


def _facts(run: Opened) -> dict[str, str]:
    """What a file of weights says of itself."""
    manifest, step = run.bundle.manifest, str(run.model.step)
    own = {name: manifest[name] for name in ("name", "spec", "graph")}
    return {**own, "step": step, "difftrain": difftrain.__version__}


def _card(run: Opened, made: Made, folder: Path, error: float) -> str:
    manifest = run.bundle.manifest
    given = {**made.told(prompts(run)[:1]), **made.call}
    begun = float(getattr(made.pipe.scheduler, "init_noise_sigma", 1))
    call = ",".join(f"\n    {name}={value!r}" for name, value in given.items())
    known = f"\nNote: {made.known}.\n" if made.known else ""
    return f"""# {manifest["name"]}

A pipeline of diffusers, exported by difftrain {difftrain.__version__} from step {run.model.step} of
the spec {manifest["spec"]} (graph {manifest["graph"]}).

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{folder.name}")
picture = pipe({call},
).images[0]
```

On the same first latents it makes those of `difftrain sample`: the relative error was {error:.1e}.
It begins with noise of standard deviation {begun:.7g}; the run begins with sigma of its first time.
{known}"""
