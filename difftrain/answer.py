"""What networks, codecs and encoders may answer with, reduced to one tensor. Needs no torch."""

from __future__ import annotations

FIELDS = ("latent_dist", "latents", "sample", "last_hidden_state")


def unwrap(answer):
    """The tensor in an answer: itself, the first of a tuple, or a field; of a law its mode.

    Raises TypeError for anything else.
    """
    if hasattr(answer, "shape") and hasattr(answer, "dtype"):
        return answer
    if isinstance(answer, tuple | list) and answer:
        return unwrap(answer[0])
    if callable(getattr(answer, "mode", None)):
        return answer.mode()
    for name in FIELDS:
        if getattr(answer, name, None) is not None:
            return unwrap(getattr(answer, name))
    fields = ", ".join(f"`.{name}`" for name in FIELDS)
    raise TypeError(
        f"a module answered with {type(answer).__name__}: return a tensor, a tuple that starts "
        f"with one, or an object with one of {fields}"
    )
