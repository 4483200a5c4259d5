"""Other trainers' configurations as specs. The only Python sources that may name methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from difftrain.importers import mvp
from difftrain.importers.config import ConfigError
from difftrain.language.format import format_text
from difftrain.language.tree import Source

# By the ending of the file: the text of a configuration, and a name for it, to the text of a spec.
READERS: dict[str, Callable[[str, str], str]] = {
    ".yaml": mvp.convert,
    ".yml": mvp.convert,
}


def convert(path: str | Path) -> str:
    """The text of a spec that says what a configuration file says.

    Raises ConfigError with a sentence, and OSError for a file that cannot be read.
    """
    path = Path(path)
    data = path.read_bytes()
    if path.suffix.lower() not in READERS:
        known = ", ".join(f"`{suffix}`" for suffix in READERS)
        raise ConfigError(
            f"`{path}` is no configuration that can be imported: those end in {known}"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"`{path}` is not a text file") from None
    spec = READERS[path.suffix.lower()](text, str(path))
    return format_text(Source(str(path.with_suffix(".diff")), spec))


__all__ = ["READERS", "ConfigError", "convert"]
