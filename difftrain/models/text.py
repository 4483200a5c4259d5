"""Text encoders: token ids to the sequence that a backbone attends to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from difftrain.answer import unwrap
from difftrain.models.errors import PartError
from difftrain.models.fingerprint import fingerprint
from difftrain.models.loading import load
from difftrain.models.tokenizer import END, clip_tokenizer

ALL_TOKENS = 49_408
HIDDEN = -1e9  # added to the score of a token that is not looked at


class TextEncoder(nn.Module):
    """A function of ids [B, T] that gives [B, T, width].

    `compact` [49408] maps ids to rows of the token table where that was cut to a vocabulary; ids
    outside it read as the end mark, which `check` refuses before they get here. `padding` is the
    id that the model does not see, and whose states are 0; None: it reads everything. A `causal`
    model looks only back. `before` stands in front of every text, and its states are left out.
    """

    field = "caption"  # of a record of the data

    def __init__(
        self,
        model: nn.Module,
        tokens: Callable,
        *,
        width: int,
        length: int = 77,
        vocabulary: Sequence[int] = (),
        padding: int | None = None,
        causal: bool = False,
        before: Sequence[int] = (),
    ):
        super().__init__()
        self.model, self.tokens = model, tokens
        self.width, self.length, self.padding, self.causal = width, length, padding, causal
        self.register_buffer("compact", _compact(vocabulary) if vocabulary else None)
        self.register_buffer("before", torch.tensor([before]) if before else None, persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        ids = input_ids if self.compact is None else self.compact[input_ids]
        if self.padding is None:
            return unwrap(self.model(input_ids=ids))
        # the first token is always seen: attention to nothing has no value
        seen = pad(input_ids[:, 1:] != self.padding, (1, 0), value=True)
        return self._seeing(ids, seen) * seen[:, :, None]

    def _seeing(self, ids: Tensor, seen: Tensor) -> Tensor:
        first = 0 if self.before is None else self.before.shape[1]
        if first:
            ids = torch.cat([self.before.expand(len(ids), -1), ids], dim=1)
            seen = pad(seen, (first, 0), value=True)
        looks = seen[:, None, None, :].expand(-1, 1, seen.shape[1], -1)
        hidden = (~(looks.tril() if self.causal else looks)).float() * HIDDEN
        return unwrap(self.model(input_ids=ids, attention_mask=hidden))[:, first:]

    def ids(self, texts: Iterable[str]) -> Tensor:
        """Checked ids [B, length] of texts."""
        ids = self.tokens(texts, self.length)
        self.check(ids)
        return ids

    def check(self, ids: Tensor) -> None:
        """Refuse ids that the token table does not hold, naming their words."""
        if self.compact is None:
            return
        held = set(self.vocabulary)
        lost = {
            word: None
            for row in ids.tolist()
            for word, spelling in self.tokens.words(row)
            if not held.issuperset(spelling)
        }
        if lost:
            raise PartError(
                f"{', '.join(f'`{word}`' for word in lost)} never occurred in training: this text "
                "encoder only knows the words of its captions, so use those"
            )

    def fingerprint(self) -> str:
        """Equal for encoders that give equal states of equal ids."""
        before = None if self.before is None else self.before.tolist()
        config = getattr(self.model, "config", None)
        return fingerprint(self, config, self.padding, self.causal, before)

    @property
    def vocabulary(self) -> list[int]:
        """The ids in the token table, sorted; empty where it is not cut."""
        if self.compact is None:
            return []
        known = self.compact != self.compact[END]
        known[END] = True
        return known.nonzero().flatten().tolist()


def _compact(vocabulary: Sequence[int]) -> Tensor:
    ids = torch.tensor(sorted({*vocabulary, END}))
    places = torch.full((ALL_TOKENS,), len(ids) - 1)  # END is the greatest id, so the last row
    places[ids] = torch.arange(len(ids))
    return places


def rows(vocabulary: Sequence[int]) -> int:
    """How many tokens a table has that is cut to a vocabulary; all where there is none."""
    return len({*vocabulary, END}) if vocabulary else ALL_TOKENS


def divisible(width: int, heads: int) -> None:
    """Refuse a width that the heads cannot share."""
    if width % heads:
        raise PartError(f"a width of {width} cannot be split over {heads} heads: use a multiple")


def clip(
    *,
    weights: str = "",
    train: bool = False,
    layers: int = 3,
    width: int = 192,
    heads: int = 4,
    length: int = 77,
    vocabulary: Sequence[int] = (),
) -> TextEncoder:
    """A CLIP text encoder: a pretrained one, frozen unless `train`, or a small one to be trained.

    The small one's token table is cut to `vocabulary`, the ids in use, where that is given.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    if weights:
        model = frozen(load(CLIPTextModel, weights, "text_encoder"), train)
        return positioned(model, clip_tokenizer(weights), length)
    count = rows(vocabulary)
    marks = {"bos_token_id": count - 2, "eos_token_id": count - 1, "pad_token_id": count - 1}
    config = CLIPTextConfig(
        **sizes(layers, width, heads, vocabulary), **marks, max_position_embeddings=length
    )
    return small(CLIPTextModel(config), width, length, vocabulary)


def sizes(
    layers: int, width: int, heads: int, vocabulary: Sequence[int], multiple: int = 1
) -> dict[str, int]:
    """What the configuration of a small transformer says of its sizes; the width is a multiple of
    `multiple` times the heads."""
    divisible(width, multiple * heads)
    return {
        "vocab_size": rows(vocabulary),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def small(
    model: nn.Module, width: int, length: int, vocabulary: Sequence[int], **more
) -> TextEncoder:
    """The encoder around a random model that reads the package's own tokens, its table cut to
    `vocabulary`."""
    own = clip_tokenizer()
    return TextEncoder(model, own, width=width, length=length, vocabulary=vocabulary, **more)


def positioned(model: nn.Module, tokens: Callable, length: int) -> TextEncoder:
    """The encoder around a pretrained model, no longer than it has positions for."""
    most, width = model.config.max_position_embeddings, model.config.hidden_size
    return TextEncoder(model, tokens, width=width, length=min(length, most))


def frozen(model: nn.Module, train: bool) -> nn.Module:
    """The module, in evaluation mode and without gradients unless it is trained."""
    return model if train else model.requires_grad_(False).eval()
