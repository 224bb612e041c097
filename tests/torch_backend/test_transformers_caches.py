"""A model under `enable` with a cache of transformers: plain attention, to the last bit that of "sdpa"."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_models import WORKING, build, build_sliding, cut, given, places, tokens  # noqa: E402
from transformers import cache_utils  # noqa: E402

HYBRID = {
    "num_hidden_layers": 3,
    "sliding_window": 16,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "head_dim": 16,
}


@functools.cache
def model_of(family: str, attention: str) -> Any:
    if family == "Gemma3":
        return build_sliding("Gemma3Text", "Gemma3", attention, HYBRID)
    if family == "Qwen2 that slides":
        return build_sliding("Qwen2", "Qwen2", attention, HYBRID)
    return build(family, attention, **WORKING[family])


CACHES: dict[str, Callable[[Any], Any]] = {
    "no cache": lambda config: None,
    "DynamicCache": lambda config: transformers.DynamicCache(config=config),
    "DynamicCache without a config": lambda config: transformers.DynamicCache(),
    "StaticCache": lambda config: transformers.StaticCache(config=config, max_cache_len=96),
    **{
        # Before transformers 5; aliases of StaticCache or gone since then.
        name: lambda config, name=name: getattr(cache_utils, name)(config, max_cache_len=96)
        for name in ("HybridCache", "SlidingWindowCache")
        if hasattr(cache_utils, name)
    },
}
if hasattr(cache_utils, "Fp8QuantizedLayer"):
    CACHES["QuantizedCache, fp8"] = lambda config: transformers.QuantizedCache("fp8", config)
if importlib.util.find_spec("optimum.quanto" if importlib.util.find_spec("optimum") else "optimum"):
    CACHES["QuantizedCache, quanto"] = lambda config: transformers.QuantizedCache("quanto", config)
CUTS = [(), (30,), (30, 1, 1, 9, 1, 1), (1, 1, 20)]


def answers(model: Any, make: Callable[[Any], Any], blocks: list[Any], mask: Any) -> Any:
    """Logits of all tokens, block by block."""
    cache, outs, seen = make(model.config), [], 0
    more: dict[str, Any] = {"use_cache": False} if cache is None else given(cache)
    for block in blocks:
        seen += block.shape[1]
        if mask is not None:
            more |= {"attention_mask": mask[:, :seen], "position_ids": places(mask, seen, block)}
        outs.append(model(block, **more).logits)
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma3", "Qwen2 that slides"])
def test_every_cache_answers_as_under_sdpa(family: str, name: str, padded: bool) -> None:
    if name.startswith("QuantizedCache") and family not in ("Llama", "GPT2"):
        pytest.skip("transformers quantizes no layers that slide")
    ids, mask = tokens(2, 60), None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :9] = mask[1, 12:20] = 0
    for sizes in CUTS if name != "no cache" else CUTS[:1]:
        blocks = cut(ids, *sizes)
        plain, got = (answers(model_of(family, x), CACHES[name], blocks, mask) for x in ("sdpa", "subgen"))
        assert torch.equal(got, plain), f"{sizes}"


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 16}, {"use_cache": False}])
@pytest.mark.parametrize("name", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_generate_chooses_the_tokens_of_sdpa(family: str, name: str, options: dict[str, Any]) -> None:
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    if "prefill_chunk_size" not in options:
        mask[0, :9] = 0
    more = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True, "attention_mask": mask, **options}
    if options.get("use_cache", True):
        more["cache_implementation"] = name
    plain, got = (model_of(family, x).generate(ids, **more) for x in ("sdpa", "subgen"))
    assert torch.equal(got, plain)


def test_a_token_with_a_static_cache_in_one_compiled_graph() -> None:
    """As generate compiles decoding on a GPU; without a SubGenCache nothing breaks the graph."""
    model, ids = model_of("Llama", "subgen"), tokens(1, 20)
    found = []
    for call in (model, torch.compile(model.forward, backend="eager", fullgraph=True)):
        cache = transformers.StaticCache(config=model.config, max_cache_len=32)
        model(ids[:, :19], **given(cache))
        found.append(call(ids[:, 19:], **given(cache)).logits)
    torch.compiler.reset()
    # A graph rounds in another order, with plain attention too: 1.4e-6 in trials.
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
