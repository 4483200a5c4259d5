"""Processes adopted from a sampler's scheduler_config.json.

A process block that says `module = scheduler_config` stands for one of the processes that it
names: `betas` where the file has a schedule of betas, `straight` where it has the straight path of
flow matching, `shifted` where that path is walked at shifted times.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from difftrain.language.finding import Finding, Label
from difftrain.language.names import Definition, collect
from difftrain.language.scope import Equations, Scope, Use
from difftrain.language.syntax import parse
from difftrain.language.tree import Block, Call, Define, Expr, Name, Source
from difftrain.language.uses import bind, use_of
from difftrain.language.values import read_value

MODULE = "scheduler_config"
FILES = ("scheduler_config.json", "scheduler/scheduler_config.json")
# What a schedule is called there, and here.
BETAS = {
    "linear": "linear({low!r}, {high!r})",
    "scaled_linear": "scaled_linear({low!r}, {high!r})",
    "squaredcos_cap_v2": "cosine",
}


class NotAdopted(ValueError):
    """A scheduler that has no equal here: what is wrong, and what to do."""

    def __init__(self, text: str, help: str):
        self.text, self.help = text, help
        super().__init__(f"{text}: {help}")


# ---- a configuration, in the language's words


@dataclass(frozen=True)
class Described:
    """A process by its kind (`betas`, `straight` or `shifted`) and its arguments as text."""

    kind: str
    arguments: Mapping[str, str]

    def written(self, process: str) -> str:
        """The use of a process of this kind that is called `process`."""
        inside = ", ".join(f"{name} = {text}" for name, text in self.arguments.items())
        return f"{process}({inside})" if inside else process


def described(config: Mapping) -> Described:
    """The process of a scheduler's configuration. Raises NotAdopted.

    What is absent has the value that diffusers gives it.
    """
    if config.get("trained_betas") is not None:
        text = "the scheduler lists its betas one by one"
        raise NotAdopted(text, "write them as a function of `i` and `n`")
    if "sigma_data" in config:  # the mark of schedulers that are made of sigmas
        text = f"`{config.get('_class_name', 'the scheduler')}` has no betas"
        raise NotAdopted(text, "write the process out")
    return _flow(config) if "FlowMatch" in config.get("_class_name", "") else _betas(config)


def _betas(config: Mapping) -> Described:
    name = config.get("beta_schedule", "linear")
    if name not in BETAS:
        listed = ", ".join(f"`{b}`" for b in BETAS)
        text = f"the scheduler's betas `{name}` are not known here"
        raise NotAdopted(text, f"there are {listed}")
    low, high = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    arguments = {
        "beta": BETAS[name].format(low=low, high=high),
        "steps": str(config.get("num_train_timesteps", 1000)),
        "terminal_snr": "zero" if config.get("rescale_betas_zero_snr") else "free",
    }
    return Described("betas", arguments)


def _flow(config: Mapping) -> Described:
    if config.get("use_dynamic_shifting"):
        text = "the scheduler shifts times by the size of the picture"
        raise NotAdopted(text, "write `t' = shift(t, k)` with the `k` of your size")
    shift = config.get("shift", 1.0)
    return Described("straight", {}) if shift == 1 else Described("shifted", {"k": str(shift)})


def configuration(scheduler) -> Mapping:
    """The settings of a scheduler: an object with `config`, a mapping, or the path of its
    configuration file or of a folder that holds one. Raises ValueError."""
    if isinstance(scheduler, Mapping):
        return scheduler
    if isinstance(scheduler, (str, Path)):
        return read_config(config_file(scheduler))
    config = getattr(scheduler, "config", None)
    if isinstance(config, Mapping):
        return config
    raise ValueError("the scheduler has no `config`: give a scheduler, or the path of its file")


def config_file(path: str | Path) -> Path:
    """The file that a path means: itself, or the one in the folder."""
    path = Path(path).expanduser()
    return next((path / f for f in FILES if (path / f).is_file()), path)


def read_config(file: Path) -> Mapping:
    """The settings in a configuration file. Raises NotAdopted."""
    title = f"the scheduler's configuration `{file}`"
    if file.is_dir():
        raise NotAdopted(f"`{file}` holds no scheduler_config.json", "give the folder that has it")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as problem:
        text = f"{title} cannot be read ({(problem.strerror or str(problem)).lower()})"
        raise NotAdopted(text, "check the path") from None
    except ValueError:
        raise NotAdopted(f"{title} is not JSON", "save the scheduler again") from None
    if isinstance(config, Mapping):
        return config
    raise NotAdopted(f"{title} is not a mapping", "save the scheduler again")


# ---- a use of such a process


def adopts(definition: Definition) -> bool:
    """Whether a process is read from a file."""
    return any(
        s.name == "module" and isinstance(s.value, Name) and s.value.path == (MODULE,)
        for s in definition.node.body
        if isinstance(s, Define)
    )


def adopted(use: Use | None, found: list[Finding]) -> Use | None:
    """What a use of a process comes to: where it names a file, the process in there."""
    if use is None or not adopts(use.definition):
        return use
    process = _process(use, found)
    return process and use_of(process, "process", Scope("", use.definition.home), found)


def _process(use: Use, found: list[Finding]) -> Expr | None:
    """The process in the file, its places in a source of its own; or None with a finding."""
    before = len(found)
    bound = bind(use, found)
    paths = [read_value(expr, scope, Equations(), found) for expr, scope in bound.values()]
    if len(found) > before:
        return None
    try:
        file = _file(str(paths[0]), use.scope.home.path)
        process = described(read_config(file))
    except NotAdopted as problem:
        at = Label(use.call.span)
        found.append(Finding("DIF401", problem.text, at, help=problem.help))
        return None
    meant = {s.name: s.value.dotted for s in use.definition.node.body}[process.kind]
    source = Source(use.call.span.text, f"process = {process.written(meant)}")
    return parse(source, found).body[0].value


def _file(path: str, spec: str) -> Path:
    """The file of a path beside the spec, or else of the path as it is given."""
    beside = config_file(Path(spec).parent / Path(path).expanduser())
    return beside if beside.exists() else config_file(path)


# ---- a spec that stands alone


def written_out(source: Source) -> Source:
    """The source with processes where it names their files, so that it needs no file beside it."""
    tree = parse(source, [])
    scope = Scope("", collect(tree, []))
    blocks = [b for b in tree.body if isinstance(b, Block) and b.kind == "objective"]
    slots = [s.value for b in blocks for s in b.body if isinstance(s, Define)]
    text = source.text
    for call in reversed([value for value in slots if isinstance(value, Call)]):
        process = _read(call, scope)
        text = text[: call.span.start] + process + text[call.span.end :]
    return source if text == source.text else Source(source.path, text)


def _read(call: Call, scope: Scope) -> str:
    """The text of the process that a call reads from a file; any other call as it is."""
    definition = scope.home.find("process", call.path)
    if definition is None or not adopts(definition):
        return call.span.text
    process = _process(Use(definition, "process", call, scope), [])
    if process is None:
        return call.span.text
    own = ("process", process.dotted) in definition.home.own
    space = "".join(f"{part}." for part in call.path[:-1]) if own else ""
    return space + process.span.text
