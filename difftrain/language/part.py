"""A part: a module that a spec declares, as a value that needs no tensor library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Interface:
    """What a network is given besides the scaled xt and the condition: the quantities it takes as
    times (the first is `t`) and as further inputs, and whether its dropout has masks of its own."""

    times: tuple[str, ...] = ("t",)
    inputs: tuple[str, ...] = ()
    dropout: bool = False


@dataclass(frozen=True)
class Part:
    """Which builder of `difftrain.models` makes a module, and with what.

    `kind` is "backbone", "encoder", "codec", "solver" and so on; options are numbers, strings,
    bools, tuples and nested parts. `name` is what the spec calls it, which makes no difference.
    """

    kind: str
    module: str
    options: Mapping[str, object]
    name: str = field(default="", compare=False)


def written(value: object) -> str:
    """The value of an option as it would stand in a spec."""
    match value:
        case Part(options=options):
            inside = ", ".join(f"{name} = {written(v)}" for name, v in options.items())
            return f"{value.name or value.module}({inside})"
        case tuple():
            return f"[{', '.join(map(written, value))}]"
    return str(value)
