"""Parts of a run that are networks: backbones, text encoders and codecs, made by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from inspect import Parameter, signature

from difftrain.language.nearest import nearest
from difftrain.language.part import Part
from difftrain.models.errors import PartError
from difftrain.models.foreign import called, imported, offered

PLACES = {  # builder: the module of this package that holds it
    "adapted": "adapters",
    "autoencoder_kl": "codec",
    "clip": "text",
    "dinov2": "vision",
    "efficientnet_lite0": "vision",
    "label": "labels",
    "pixels": "codec",
    "qwen": "encoders",
    "raw": "raw",
    "sd_unet": "unet",
    "siglip": "encoders",
    "t5": "encoders",
    "transformer": "transformer",
}


# options that the run reads as well: builders get those that they take
OFFERED = ("codec", "text", "times", "inputs", "field", "train")


def builder(part: Part) -> Callable:
    """The function that makes the module of a part, imported when it is asked for: reading a
    pretrained folder needs no torch. `package.module:function` is one from Python."""
    name = part.module
    if name in PLACES:
        return getattr(import_module(f"{__name__}.{PLACES[name]}"), name)
    place = name if ":" in name else offered().get(name)
    if place is None:
        raise PartError(_unknown(f"there is no {part.kind} called", name, PLACES))
    return imported(place)


def reads_names(part: Part) -> bool:
    """Whether an encoder takes whole texts, such as labels, and not their tokens."""
    return part.module == "label" or is_foreign(part)


def is_foreign(part: Part) -> bool:
    """Whether a part is built by Python that is not difftrain's."""
    return part.module not in PLACES


def build(part: Part | tuple[Part, ...], **context):
    """The module [torch.nn.Module] of a part, random or loaded as its options say.

    `context` adds to the options and wins over them: `sd_unet` takes `codec` and `text` as built
    modules, `clip` takes the `vocabulary` of the run. What a builder does not take of it is left
    out. Nested parts that context leaves out are built first. A list of encoders is one that joins
    their sequences.
    """
    if isinstance(part, tuple):
        return _joined(part, context)
    make = builder(part)
    options = _taken(part, signature(make).parameters, context)
    made = {k: build(v) if _declares(v) else v for k, v in options.items()}
    network = make(**made) if part.module in PLACES else called(make, part.module, made)
    return _still(network) if context.get("forward_mode") else network


def _still(network):
    """The network that will be differentiated forward, where its weights stand still."""
    from difftrain.models.still import stand

    return stand(network)


def _taken(part: Part, known: Mapping[str, Parameter], context: Mapping) -> dict:
    """The options and what of the context a builder takes. Raises PartError."""
    options = {**part.options, **context}
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return options
    for option in part.options:
        if option not in known and option not in OFFERED:
            raise PartError(_unknown(f"`{part.module}` has no option", option, known))
    wanted = [n for n, p in known.items() if p.default is p.empty and p.kind != p.VAR_POSITIONAL]
    lost = [n for n in wanted if n not in options]
    if lost:
        raise PartError(f"`{part.module}` needs `{lost[0]}`: add it to the parameters of its block")
    return {n: v for n, v in options.items() if n in known}


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
