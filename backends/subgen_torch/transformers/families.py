"""Which models can work with sketches, by their configuration."""

from __future__ import annotations

from typing import Any

__all__ = ["layer_kinds", "refuse_model"]

_INSTEAD = "use the model's own cache and attention"


def refuse_model(model: Any) -> None:
    """Raise if a model cannot run under the attention "subgen".

    Raises
    ------
    ValueError
        With the reason.
    """
    name = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"{name} computes attention in its own code and not through transformers' AttentionInterface, so no other "
            f"attention can be plugged in: {_INSTEAD}"
        )
    layer_kinds(model.config)


def layer_kinds(config: Any) -> list[int | None]:
    """Return for each layer the window it slides over, or ``None`` for full attention.

    Raises
    ------
    ValueError
        If a layer is of another kind, or the model's attention is one that a sketch cannot answer.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} has an encoder and a decoder; a SubGenCache is for decoders: {_INSTEAD}")
    text = config.get_text_config(decoder=True)
    family = text.model_type
    if not hasattr(text, "num_hidden_layers") and not hasattr(text, "layer_types"):
        raise ValueError(f"the configuration of {family} says nothing of layers that cache tokens: {_INSTEAD}")
    types = _layer_types(text)
    # Settings may differ by layer from 5.24 on, if transformers says so.
    settings = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text] * len(types)
    kinds = [_window(kind, layer, family) for kind, layer in zip(types, settings, strict=True)]
    reasons = {
        "kv_lora_rank": "caches latents from which keys are made after the cache (MLA)",
        "attn_logit_softcapping": "caps its logits",
        "num_kv_shared_layers": "shares keys and values between layers",
        "cross_attention_layers": "attends to images in layers of their own, which cache no tokens (cross-attention)",
        "keep_window_size": "masks keys by what all cached values say (dynamic mask)",
        "index_topk": "picks the keys that each query sees (sparse attention)",
        "kv_channels": "repeats keys between the cache and attention, once for each expert",
        "lambda_std_dev": "takes the difference of two attentions to other halves of the cached values",
    }
    for name, reason in reasons.items():
        if value := _setting(text, name):
            raise ValueError(f"{family} {reason} ({name}={value}), which a sketch cannot: {_INSTEAD}")
    if all(window is not None for window in kinds):
        raise ValueError(
            f"every layer of this {family} slides over a window ({kinds[0] if kinds else None} tokens): its cache is "
            f"bounded as it is, and there is nothing to compress; {_INSTEAD}"
        )
    return kinds


def _setting(text: Any, name: str) -> Any:
    """Return a setting of a configuration; of one that differs by layer, that of the first layer that has it."""
    if not getattr(text, "is_heterogeneous", False):
        return getattr(text, name, None)
    return next((value for layer in text.per_layer_config if (value := getattr(layer, name, None))), None)


def _layer_types(text: Any) -> list[str]:
    types = getattr(text, "layer_types", None)
    if types is not None:
        return list(types)
    kind = "full_attention"
    if getattr(text, "sliding_window", None) is not None:
        kind = "sliding_attention"
    elif getattr(text, "attention_chunk_size", None) is not None:
        kind = "chunked_attention"
    return [kind] * text.num_hidden_layers


def _window(kind: str, layer: Any, family: str) -> int | None:
    if kind == "full_attention":
        return None
    if kind == "sliding_attention":
        return int(layer.sliding_window)
    if kind == "chunked_attention":
        return int(layer.attention_chunk_size)
    raise ValueError(
        f"{family} has layers of the kind {kind!r}; a SubGenCache supports full, sliding and chunked attention: "
        f"{_INSTEAD}"
    )
