"""Builders from Python: a function in a user's own file, or one that an installed package offers.

They are imported when a network is built, so that reading a spec never runs anybody's code.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points

from difftrain.language.nearest import nearest
from difftrain.models.errors import PartError

GROUP = "difftrain.parts"  # entry points of packages: a name, and "package.module:function"


def offered(group: str = GROUP) -> dict[str, str]:
    """What installed packages offer in a group: name -> "package.module:function"."""
    return {entry.name: entry.value for entry in entry_points(group=group)}


def imported(place: str) -> Callable:
    """The function at "package.module:function". Raises PartError."""
    path, _, name = place.partition(":")
    module = _module(path, place)
    made = getattr(module, name, None)
    if not callable(made):
        known = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        near = nearest(name, known)
        hint = f"did you mean `{near}`?" if near else f"define it in `{path}`"
        raise PartError(f"`{path}` has no function `{name}`: {hint}")
    return made


def _module(path: str, place: str):
    try:
        return import_module(path)
    except ModuleNotFoundError as cause:
        if not f"{path}.".startswith(f"{cause.name}."):
            raise PartError(
                f"`{path}` imports `{cause.name}`, which is not installed here: install it"
            ) from cause
        raise PartError(
            f"there is no Python module `{path}` for `{place}`: put `{path.partition('.')[0]}.py`"
            " beside the spec, or install the package"
        ) from cause
    except Exception as cause:  # a user's file may do anything when it is imported
        raise PartError(f"`{path}` cannot be imported ({reason(cause)}): mend that file") from cause


def called(make: Callable, place: str, options: dict):
    """The module that a foreign builder makes of these options. Raises PartError."""
    from torch import nn

    try:
        made = make(**options)
    except PartError:
        raise
    except Exception as cause:  # and anything when it is called
        raise PartError(f"`{place}` fails ({reason(cause)}): mend that function") from cause
    if not isinstance(made, nn.Module):
        raise PartError(f"`{place}` gives a {type(made).__name__}: return a `torch.nn.Module`")
    return made


def reason(cause: Exception) -> str:
    """The kind and the first line of an error, as they stand inside a sentence."""
    words = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {words[0].rstrip('.')}" if words else type(cause).__name__
