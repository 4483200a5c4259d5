"""Text encoders besides CLIP's: T5, SigLIP's, and the language half of Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from difftrain.models.errors import PartError
from difftrain.models.loading import load
from difftrain.models.pieces import pieces
from difftrain.models.text import TextEncoder, divisible, frozen, rows
from difftrain.models.tokenizer import END, clip_tokenizer


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
    return _small(model, width, length, vocabulary, END if hidden else None)


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
        most, wide = model.config.max_position_embeddings, model.config.hidden_size
        tokens = pieces(weights, "tokenizer")
        return TextEncoder(model, tokens, width=wide, length=min(length, most))
    divisible(width, heads)
    config = SiglipTextConfig(
        vocab_size=rows(vocabulary),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
        bos_token_id=None,
        eos_token_id=None,
    )
    return _small(_headless(SiglipTextModel(config)), width, length, vocabulary, None)


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
        model = _qwen(layers, width, heads, rows(vocabulary))
        return _small(model, width, length, vocabulary, END, causal=True)
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


def _qwen(layers: int, width: int, heads: int, count: int) -> nn.Module:
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    divisible(width, 4 * heads)  # rotary positions turn pairs of time, height and width
    half = width // heads // 2
    config = Qwen2_5_VLTextConfig(
        vocab_size=count,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
        rope_parameters={"rope_type": "default", "mrope_section": _sections(half)},
    )
    return Qwen2_5_VLTextModel(config)


def _sections(half: int) -> list[int]:
    """How many rotary pairs time, height and width get: a quarter and the rest, as published."""
    side = half * 3 // 8
    return [half - 2 * side, side, side]


def _small(
    model, width: int, length: int, vocabulary, padding: int | None, causal: bool = False
) -> TextEncoder:
    """A random model that reads the package's own tokens, its table cut to `vocabulary`."""
    return TextEncoder(
        model,
        clip_tokenizer(),
        width=width,
        length=length,
        vocabulary=vocabulary,
        padding=padding,
        causal=causal,
    )


def _numbered(sub: str, place: int) -> str:
    return sub if place == 1 else f"{sub}_{place}"
