"""What foreign modules answer with, reduced to one tensor."""

from __future__ import annotations

from torch import Tensor

from difftrain.models.errors import PartError

FIELDS = ("latent_dist", "latents", "sample", "last_hidden_state")


def unwrap(answer) -> Tensor:
    """The tensor in an answer: itself, the first of a tuple, or a field; of a law its mode."""
    if isinstance(answer, Tensor):
        return answer
    if isinstance(answer, tuple | list) and answer:
        return unwrap(answer[0])
    if callable(getattr(answer, "mode", None)):
        return answer.mode()
    for name in FIELDS:
        if getattr(answer, name, None) is not None:
            return unwrap(getattr(answer, name))
    fields = ", ".join(f"`.{name}`" for name in FIELDS)
    raise PartError(
        f"a module answered with {type(answer).__name__}: return a tensor, a tuple that starts "
        f"with one, or an object with one of {fields}"
    )
