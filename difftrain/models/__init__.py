"""Parts of a run that are networks: backbones, text encoders and codecs, made by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from inspect import signature

from difftrain.language.nearest import nearest
from difftrain.language.part import Part
from difftrain.models.errors import PartError

PLACES = {  # builder: the module of this package that holds it
    "autoencoder_kl": "codec",
    "clip": "text",
    "label": "labels",
    "pixels": "codec",
    "qwen": "encoders",
    "sd_unet": "unet",
    "siglip": "encoders",
    "t5": "encoders",
}


def _late(module: str, name: str) -> Callable:
    """The builder, imported when it is called: reading a pretrained folder needs no torch."""

    def builder(**options):
        make = getattr(import_module(f"{__name__}.{module}"), name)
        known = signature(make).parameters
        for option in options:
            if option not in known:
                raise PartError(_unknown(f"`{name}` has no option", option, known))
        return make(**options)

    return builder


BUILDERS: dict[str, Callable] = {name: _late(module, name) for name, module in PLACES.items()}


def build(part: Part | tuple[Part, ...], **context):
    """The module [torch.nn.Module] of a part, random or loaded as its options say.

    `context` adds to the options and wins over them: `sd_unet` takes `codec` and `text` as built
    modules, `clip` takes the `vocabulary` of the run. Nested parts that context leaves out are
    built first. A list of encoders is one that joins their sequences.
    """
    if isinstance(part, tuple):
        return _joined(part, context)
    if part.module not in BUILDERS:
        raise PartError(_unknown(f"there is no {part.kind} called", part.module, BUILDERS))
    options = {**part.options, **context}
    made = {k: build(v) if _declares(v) else v for k, v in options.items()}
    return BUILDERS[part.module](**made)


def _declares(value) -> bool:
    """Whether an option's value is a part, or a list of them."""
    each = value if isinstance(value, tuple) and value else (value,)
    return all(isinstance(v, Part) for v in each)


def _joined(parts: tuple[Part, ...], context: dict):
    """One encoder of several, each of them trained if its own options say so."""
    from difftrain.models.joined import Joined

    made = [build(part, **context) for part in parts]
    for part, encoder in zip(parts, made, strict=True):
        encoder.requires_grad_(bool(part.options.get("train")))
    return Joined(made)


def _unknown(what: str, name: str, known) -> str:
    near = nearest(name, known)
    hint = f"did you mean `{near}`?" if near else f"use one of {', '.join(sorted(known))}"
    return f"{what} `{name}`: {hint}"
