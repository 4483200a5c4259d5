"""What the modules of a run take from its data: found once, and kept with the weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from difftrain.language.part import Part
from difftrain.models import reads_names
from difftrain.training.arrays import Arrays
from difftrain.training.sources import Pictures


@dataclass(frozen=True)
class Known:
    """The vocabulary of the encoder: token ids, or the values of a field. Of arrays also the shape
    of a sample, and the mean and standard deviation of each of its channels."""

    vocabulary: tuple[int | str, ...] = ()
    shape: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def facts(self) -> dict[str, str]:
        """Itself, as a checkpoint says it."""
        return {name: json.dumps(value) for name, value in asdict(self).items()}


def told(facts: Mapping[str, str]) -> Known:
    """What a checkpoint says of itself."""
    return Known(**{name: tuple(json.loads(facts.get(name, "[]"))) for name in asdict(Known())})


def found(
    encoder: Part | tuple[Part, ...] | None,
    seen: Pictures | Arrays,
    unseen: Pictures | Arrays | None,
) -> Known:
    """What the training data hold; tokens may also be those of what is held out."""
    words = () if encoder is None else _vocabulary(encoder, seen, unseen)
    if not isinstance(seen, Arrays):
        return Known(words)
    channels = seen.values.transpose(0, 1).flatten(1).double()
    std, mean = (tuple(s.tolist()) for s in (channels.std(1, correction=0), channels.mean(1)))
    return Known(words, tuple(seen.values.shape[1:]), mean, tuple(s or 1.0 for s in std))


def _vocabulary(encoder, seen, unseen) -> tuple[int | str, ...]:
    """The values of a field in order, or the ids of the tokens in use."""
    from difftrain.models.tokenizer import clip_tokenizer

    if isinstance(encoder, Part) and reads_names(encoder):
        return tuple(sorted(set(seen.texts)))
    return tuple(clip_tokenizer().used(_all(seen, unseen)))


def _all(*sets: Pictures | Arrays | None) -> Iterable[str]:
    return [text for one in sets if one is not None for text in one.texts]
