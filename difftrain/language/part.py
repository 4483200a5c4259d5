"""A part: a module that a spec declares, as a value that needs no tensor library."""

from __future__ import annotations

from collections.abc import Container, Mapping
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
    bools, tuples and nested parts. `name` is what the spec calls it, and `said` are all arguments
    as they would stand there: neither makes a difference.
    """

    kind: str
    module: str
    options: Mapping[str, object]
    name: str = field(default="", compare=False)
    said: str = field(default="", compare=False)


MODULE = "module"  # as a block names what builds a part


def told(part: Part) -> dict[str, str]:
    """All that a part is made of: its builder as `module`, options by their names, and those of
    parts inside as `text.layers`, a part before what is in it."""
    found = {MODULE: part.module}
    for name, value in part.options.items():
        several = value if isinstance(value, tuple) else (value,)
        inner = [told(v) if isinstance(v, Part) else {MODULE: written(v)} for v in several]
        shown = [each[MODULE] for each in inner]
        found[name] = f"[{', '.join(shown)}]" if isinstance(value, tuple) else shown[0]
        for i, each in enumerate(inner):
            place = f"{name}.{i}" if isinstance(value, tuple) else name
            found |= {f"{place}.{n}": v for n, v in each.items() if n != MODULE}
    return found


def written(value: object, words: Container[str] | None = None) -> str:
    """The value of an option as it would stand in a spec; of texts those which are in `words` (all,
    if that is None) stand without quotes."""
    match value:
        case Part(name=name, said=said):
            return f"{name}({said})"
        case bool():
            return "true" if value else "false"
        case tuple():
            return f"[{', '.join(written(v, words) for v in value)}]"
        case str() if words is not None and value not in words:
            return quoted(value)
    return str(value)


def quoted(text: str) -> str:
    """A text as it stands in a spec."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
