"""The one exception of parts: a sentence for whoever wrote the spec."""


class PartError(Exception):
    """A part that cannot be built, loaded or fed; `str()` is the sentence to show."""
