"""Tiny random models of transformers, and a sketch of their cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from packaging.version import Version
from subgen_torch.transformers import SubGenCache, enable

__all__ = [
    "CACHE",
    "OLD",
    "SIZES",
    "WORKING",
    "before",
    "build",
    "build_sliding",
    "cut",
    "generate",
    "given",
    "logits",
    "places",
    "small",
    "tokens",
]


def before(release: str) -> bool:
    """Whether this is a release of transformers before that one."""
    return Version(transformers.__version__) < Version(release)


OLD = before("5.11")

# The argument of models and of `generate` that takes a cache, which 5.24 renamed.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"
# 2 layers, 4 heads on 2 key-value heads of 16.
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# Families that a SubGenCache works with, and what their configs need.
WORKING: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Mixtral": {"sliding_window": None, "num_local_experts": 2},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Gemma": {"head_dim": 16},
    "Phi": {},
    "Phi3": {},
    "Olmo2": {},
    "Cohere": {},
    "Starcoder2": {"sliding_window": None},
    "Granite": {},
    "SmolLM3": {},
    "GPTNeoX": {},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 64},
    "GPTJ": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512},
    "CodeGen": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512},
}


def build(name: str, attention: str = "subgen", **more: Any) -> Any:
    """Build a tiny model of a family, the same for every call."""
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **more})
    torch.manual_seed(0)
    with torch.no_grad():
        model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config).eval()
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.15)  # peaked attention: that of the usual small weights is nearly uniform
    if attention == "subgen":
        enable(model)
    else:
        model.set_attn_implementation(attention)
    return model.requires_grad_(False)


def build_sliding(config: str, family: str, attention: str, more: dict[str, Any]) -> Any:
    """Build a tiny model of which some layers slide over a window."""
    settings = getattr(transformers, f"{config}Config")(**{**SIZES, **more})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(settings).eval()
    model.set_attn_implementation("sdpa")
    if attention == "subgen":
        enable(model)
    return model.requires_grad_(False)


def tokens(rows: int, n: int, seed: int = 0) -> Any:
    """Draw token ids."""
    return torch.randint(3, 64, (rows, n), generator=torch.Generator().manual_seed(seed))


def small(model: Any, **more: Any) -> SubGenCache:
    """Make a cache in which most of a hundred tokens are merged."""
    return SubGenCache(model.config, **{"max_clusters": 12, "window": 8, "sink": 2, **more})


def given(cache: Any) -> dict[str, Any]:
    """Return the argument that takes a cache, under the name it has in this release."""
    return {CACHE: cache}


def logits(model: Any, blocks: list[Any], cache: Any, mask: Any = None) -> Any:
    """Feed blocks one after the other; return the logits of all tokens."""
    outs, seen = [], cache.get_seq_length()
    for block in blocks:
        seen += block.shape[1]
        more = {} if mask is None else {"attention_mask": mask[:, :seen], "position_ids": places(mask, seen, block)}
        outs.append(model(block, **given(cache), use_cache=True, **more).logits)
    return torch.cat(outs, dim=1)


def places(mask: Any, seen: int, block: Any) -> Any:
    """Return positions that do not count padding, as generate makes them."""
    return (mask[:, :seen].cumsum(-1) - 1).clamp(min=0)[:, seen - block.shape[1] :]


def generate(model: Any, prompt: Any, cache: Any, **more: Any) -> Any:
    """Generate a few tokens greedily."""
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, **more}
    if "attention_mask" not in options:
        options["attention_mask"] = torch.ones_like(prompt)
    return model.generate(prompt, **given(cache), **options)


def cut(x: Any, *sizes: int) -> list[Any]:
    """Cut tokens into blocks; the last gets the rest."""
    return list(torch.split(x, [*sizes, x.shape[1] - sum(sizes)], dim=1))
