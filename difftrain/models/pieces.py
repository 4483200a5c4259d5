"""The tokenizers that pretrained text encoders bring with them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from difftrain.models.errors import PartError
from difftrain.models.pretrained import folder, hub_failed, is_hub_name
from difftrain.models.tokenizer import Say, warn

FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")


class Pieces:
    """A function of texts and a length that gives ids [B, length], marks and padding as the
    tokenizer was saved with; `after` follows every text."""

    def __init__(self, backend, after: str = "", say: Say = warn):
        self.backend, self.after, self.say = backend, after, say
        backend.padding_side = "right"
        self._told = False

    @property
    def padding(self) -> int:
        return self.backend.pad_token_id

    def __call__(self, texts: Iterable[str], length: int) -> Tensor:
        """Ids, int64 [B, length]; what is longer is cut, and that said once."""
        rows = [self._row(text, length) for text in texts]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length)

    def bare(self, text: str) -> list[int]:
        """The ids of a text without marks."""
        return self.backend(text, add_special_tokens=False).input_ids

    def _row(self, text: str, length: int) -> list[int]:
        text += self.after
        count = len(self.backend(text).input_ids)
        if count > length and not self._told:
            self.say(f"`{text[:40]}...` has {count} tokens and {length} fit: such texts are cut")
            self._told = True
        cut = {"max_length": length, "truncation": True, "padding": "max_length"}
        return self.backend(text, **cut).input_ids


def pieces(weights: str, sub: str, after: str = "", say: Say = warn) -> Pieces:
    """The tokenizer in a folder or hub name, or in its subfolder `sub` if it has one."""
    found = _hub(weights, sub) if is_hub_name(weights) else _local(weights, sub)
    if found.pad_token_id is None:
        raise PartError(f"the tokenizer in `{weights}` has no padding: save it with a `pad_token`")
    return Pieces(found, after, say)


def _local(weights: str, sub: str):
    at = folder(weights)
    at = at / sub if (at / sub).is_dir() else at
    if not any((at / name).is_file() for name in FILES):
        raise PartError(f"`{at}` has no tokenizer: save the encoder's tokenizer in `{sub}` there")
    return _read(at, f"cannot read the tokenizer in `{at}`: save the folder again")


def _hub(name: str, sub: str):
    try:
        return _read(name, hub_failed(name, "the tokenizer"), subfolder=sub)
    except PartError:  # an encoder alone has it in the first place
        return _read(name, hub_failed(name, "the tokenizer"))


def _read(at, failed: str, **where):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(at, **where)
    except ImportError as cause:
        raise PartError(
            f"the tokenizer in `{at}` needs the package sentencepiece: install it"
        ) from cause
    except (OSError, ValueError, KeyError) as cause:
        raise PartError(failed) from cause
