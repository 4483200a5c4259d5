"""Text encoders besides CLIP's: T5, SigLIP's, and the language half of Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from difftrain.models.errors import PartError
from difftrain.models.loading import load
from difftrain.models.pieces import pieces
from difftrain.models.text import TextEncoder, divisible, frozen, positioned, rows, sizes, small
from difftrain.models.tokenizer import END

UNMARKED = {"bos_token_id": None, "eos_token_id": None}  # of models that pool nothing at a mark


def t5(
    *,
    weights: str = "",
    train: bool = False,
    layers: int = 3,
    width: int = 192,
    heads: int = 4,
    length: int = 77,
    padding: str = "hidden",
    place: int = 1,
    vocabulary: Sequence[int] = (),
) -> TextEncoder:
    """T5's encoder (arXiv:1910.10683, its 1.1 form), pretrained, or small and random.

    `padding` is "hidden", or "read" as any other token. `place` says which text encoder of a
    folder that has several.
    """
    from transformers import T5Config, T5EncoderModel

    hidden = padding == "hidden"
    if weights:
        model = frozen(
            _plain(load(T5EncoderModel, weights, _numbered("text_encoder", place))), train
        )
        tokens = pieces(weights, _numbered("tokenizer", place))
        seen = tokens.padding if hidden else None
        return TextEncoder(model, tokens, width=model.config.d_model, length=length, padding=seen)
    divisible(width, heads)
    config = T5Config(
        vocab_size=rows(vocabulary),
        d_model=width,
        d_kv=width // heads,
        d_ff=4 * width,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    model = _plain(T5EncoderModel(config))
    return small(model, width, length, vocabulary, padding=END if hidden else None)


def _plain(model: nn.Module) -> nn.Module:
    """The model with attention in plain arithmetic: its positions are a trained part of the scores,
    and the fused kernels give those no gradient in mixed precision."""
    model.set_attn_implementation("eager")
    return model


def siglip(
    *,
    weights: str = "",
    train: bool = False,
    layers: int = 3,
    width: int = 192,
    heads: int = 4,
    length: int = 64,
    vocabulary: Sequence[int] = (),
) -> TextEncoder:
    """SigLIP's text encoder (arXiv:2303.15343), pretrained, or small and random.

    It was trained without a mask, and so reads its padding.
    """
    from transformers import SiglipTextConfig, SiglipTextModel

    if weights:
        model = frozen(_headless(load(SiglipTextModel, weights, "text_encoder")), train)
        return positioned(model, pieces(weights, "tokenizer"), length)
    shape = {**sizes(layers, width, heads, vocabulary), "max_position_embeddings": length}
    config = SiglipTextConfig(**shape, **UNMARKED)
    return small(_headless(SiglipTextModel(config)), width, length, vocabulary)


def _headless(model: nn.Module) -> nn.Module:
    """The model without the head of its pooled output, which no sequence needs."""
    holder = getattr(model, "text_model", model)
    holder.head = nn.Identity()
    return model


def qwen(
    *,
    weights: str = "",
    train: bool = False,
    layers: int = 3,
    width: int = 192,
    heads: int = 4,
    length: int = 77,
    template: str = "",
    vocabulary: Sequence[int] = (),
) -> TextEncoder:
    """The language model of Qwen2.5-VL (arXiv:2502.13923): its last states, the padding's being 0.

    `template` is a text with `{}` where the prompt stands; the states of what comes before the
    prompt are left out.
    """
    before, after = _around(template)
    if not weights:
        if template:
            raise PartError("a random text encoder knows no `template`: leave it out")
        # rotary positions turn pairs of time, height and width
        model = _qwen(sizes(layers, width, heads, vocabulary, multiple=4))
        return small(model, width, length, vocabulary, padding=END, causal=True)
    tokens = pieces(weights, "tokenizer", after)
    model = frozen(_language(weights), train)
    return TextEncoder(
        model,
        tokens,
        width=model.config.hidden_size,
        length=length,
        padding=tokens.padding,
        causal=True,
        before=tokens.bare(before) if before else (),
    )


def _around(template: str) -> tuple[str, str]:
    if template and template.count("{}") != 1:
        raise PartError("`template` needs one {} where the prompt stands: put it there")
    before, _, after = template.partition("{}")
    return before, after


def _language(weights: str) -> nn.Module:
    from transformers import Qwen2_5_VLForConditionalGeneration

    whole = load(Qwen2_5_VLForConditionalGeneration, weights, "text_encoder")
    model = whole.model.language_model
    model.config.use_cache = False
    return model


def _qwen(shape: dict[str, int]) -> nn.Module:
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    heads = shape["num_attention_heads"]
    half = shape["hidden_size"] // heads // 2
    config = Qwen2_5_VLTextConfig(
        **shape,
        **UNMARKED,
        num_key_value_heads=heads,
        use_cache=False,
        rope_parameters={"rope_type": "default", "mrope_section": _sections(half)},
    )
    return Qwen2_5_VLTextModel(config)


def _sections(half: int) -> list[int]:
    """How many rotary pairs time, height and width get: a quarter and the rest, as published."""
    side = half * 3 // 8
    return [half - 2 * side, side, side]


def _numbered(sub: str, place: int) -> str:
    return sub if place == 1 else f"{sub}_{place}"
