"""`SubGenCache` in transformers: equalities that hold for tiny random models, on every release that is supported."""

from __future__ import annotations

import copy
import importlib
import io
import logging
import pickle
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from subgen_torch.transformers import SubGenCache, disable, enable  # noqa: E402
from subgen_torch.transformers.functions import subgen_attention  # noqa: E402
from tiny_models import (  # noqa: E402
    CACHE,
    OLD,
    SIZES,
    WORKING,
    before,
    build,
    build_sliding,
    cut,
    generate,
    given,
    logits,
    places,
    small,
    tokens,
)


@pytest.fixture(scope="module")
def model() -> Any:
    return build("Llama")


@pytest.fixture(scope="module")
def plain() -> Any:
    return build("Llama", attention="sdpa")


def roomy(model: Any, **more: Any) -> SubGenCache:
    """Nothing is ever compressed."""
    return SubGenCache(model.config, **{"max_clusters": 4096, **more})


SLIDING: dict[str, Any] = {
    "num_hidden_layers": 3,
    "sliding_window": 8,
    "use_sliding_window": True,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "head_dim": 16,
}


# 1. Nothing compressed: the same as without.


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("sizes", [(50,), (20, 1, 1, 7, 1), (1, 1)])
def test_logits_equal_plain_attention_while_nothing_is_compressed(
    model: Any, plain: Any, prefill: str, sizes: tuple[int, ...]
) -> None:
    ids = tokens(2, 60)
    expected = plain(ids).logits
    got = logits(model, cut(ids, *sizes), roomy(model, prefill=prefill))
    # Float32 sums in another order through two layers.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
def test_padding_on_any_side_equals_plain_attention(model: Any, plain: Any, prefill: str) -> None:
    ids = tokens(3, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0  # on the left
    mask[1, 12:20] = 0  # within
    mask[2, :3] = mask[2, 25:28] = 0
    where = {"attention_mask": mask, "position_ids": places(mask, 40, ids)}
    expected = plain(ids, **where).logits
    got = logits(model, cut(ids, 30, 1, 1), roomy(model, prefill=prefill), mask)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)


def test_generate_equals_plain_attention(model: Any, plain: Any) -> None:
    prompt = tokens(2, 40)
    expected = generate(plain, prompt, transformers.DynamicCache(config=plain.config))
    assert torch.equal(generate(model, prompt, roomy(model)), expected)


@pytest.mark.skipif(CACHE == "past_key_values", reason="is the only name before transformers 5.24")
@pytest.mark.skipif(not before("5.40"), reason="transformers announced to drop the name in 5.40")
def test_the_name_before_5_24_gives_the_same_and_transformers_warns(model: Any) -> None:
    prompt = tokens(2, 40)
    expected, found = small(model), small(model)
    first, rest = generate(model, prompt, expected), logits(model, [tokens(2, 5, seed=1)], expected)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
        assert torch.equal(model.generate(prompt, past_key_values=found, **options), first)
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
        assert torch.equal(model(tokens(2, 5, seed=1), past_key_values=found).logits, rest)


# 2. Rows of a batch know nothing of each other.


@pytest.mark.parametrize("prefill", ["exact", "streaming"])
@pytest.mark.parametrize("budget", [{}, {"max_clusters": None, "compression_ratio": 0.6}])
def test_a_padded_row_equals_the_same_row_alone(model: Any, prefill: str, budget: dict[str, Any]) -> None:
    ids = tokens(4, 90)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 25, 7, 25)):
        mask[row, :padding] = 0
    got = logits(model, cut(ids, 70, *[1] * 19), small(model, prefill=prefill, **budget), mask)
    for row in range(4):
        own = ids[row : row + 1, mask[row].bool()]
        first = 70 - 90 + own.shape[1]
        alone = logits(model, cut(own, first, *[1] * 19), small(model, prefill=prefill, **budget))
        # The same numbers in matrix products of other shapes.
        torch.testing.assert_close(got[row, mask[row].bool()], alone[0], rtol=1e-4, atol=1e-4)


def test_a_padded_batch_generates_what_its_rows_do(model: Any) -> None:
    ids = tokens(2, 60)
    ids[0, :13] = 0
    mask = (ids != 0).long()
    together = generate(model, ids, small(model), attention_mask=mask)
    for row in range(2):
        alone = generate(model, ids[row : row + 1, mask[row].bool()], small(model))
        assert torch.equal(together[row, 60:], alone[0, -12:])


def test_a_second_turn_with_other_padding(model: Any) -> None:
    first, second = tokens(2, 40), tokens(2, 12, seed=1)
    mask = torch.ones(2, 54, dtype=torch.long)
    mask[0, :5] = mask[1, 40:47] = 0
    blocks = [first, second, tokens(2, 1, seed=2), tokens(2, 1, seed=3)]
    got = logits(model, blocks, small(model), mask)
    for row in range(2):
        real = [mask[row, :40].bool(), mask[row, 40:52].bool(), *[torch.ones(1, dtype=torch.bool)] * 2]
        own = [block[row : row + 1, keep] for block, keep in zip(blocks, real, strict=True)]
        alone = logits(model, own, small(model))
        torch.testing.assert_close(got[row, mask[row].bool()], alone[0], rtol=1e-4, atol=1e-4)


# 3. Beams, several sequences of one prompt, sampling.


def test_beam_search(model: Any, plain: Any) -> None:
    prompt = tokens(2, 40)
    prompt[0, :6] = 0
    options = {"num_beams": 3, "num_return_sequences": 2, "attention_mask": (prompt != 0).long()}
    expected = generate(plain, prompt, transformers.DynamicCache(config=plain.config), **options)
    assert torch.equal(generate(model, prompt, roomy(model), **options), expected)
    together = generate(model, prompt, small(model), **options)
    assert torch.equal(together, generate(model, prompt, small(model), **options))
    alone = generate(model, prompt[1:], small(model), num_beams=3, num_return_sequences=2)
    assert torch.equal(together[2:], alone)


def test_beams_that_swap_take_their_sketches_along(model: Any) -> None:
    ids = tokens(3, 80)
    cache = small(model)
    logits(model, cut(ids, 60), cache)
    rows = torch.tensor([2, 0, 0, 1])
    cache.reorder_cache(rows)
    more = tokens(4, 10, seed=1)
    got = logits(model, cut(more, *[1] * 9), cache)
    fresh = small(model)
    logits(model, cut(ids[rows], 60), fresh)
    torch.testing.assert_close(got, logits(model, cut(more, *[1] * 9), fresh), rtol=1e-4, atol=1e-4)
    repeated = small(model)
    logits(model, cut(ids, 60), repeated)
    repeated.batch_repeat_interleave(2)
    assert logits(model, [tokens(6, 1)], repeated).shape[0] == 6


def test_sampling_with_a_seed(model: Any, plain: Any) -> None:
    prompt, options = tokens(1, 40), {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(5)
    expected = generate(plain, prompt, transformers.DynamicCache(config=plain.config), **options)
    torch.manual_seed(5)
    assert torch.equal(generate(model, prompt, roomy(model), **options), expected)


# 4. and 5. Prompts in chunks, second turns.


def test_a_prompt_in_chunks_equals_the_prompt_at_once(model: Any) -> None:
    ids = tokens(1, 60)
    whole, chunks = (logits(model, cut(ids, *sizes), roomy(model)) for sizes in ((), (16, 16, 16)))
    torch.testing.assert_close(chunks, whole, rtol=1e-5, atol=1e-5)
    # In streaming also after compression: each token is answered from what is held at its moment.
    streaming = {"prefill": "streaming"}
    whole, chunks = (logits(model, cut(ids, *sizes), small(model, **streaming)) for sizes in ((), (16, 1, 20)))
    torch.testing.assert_close(chunks, whole, rtol=1e-4, atol=1e-4)


def test_generate_with_chunked_prefill(model: Any, plain: Any) -> None:
    prompt = tokens(1, 50)
    expected = generate(plain, prompt, transformers.DynamicCache(config=plain.config))
    assert torch.equal(generate(model, prompt, roomy(model), prefill_chunk_size=16), expected)


def test_a_second_turn_counts_logical_tokens(model: Any, plain: Any) -> None:
    prompt, question = tokens(1, 40), tokens(1, 9, seed=1)

    def turns(model: Any, cache: Any) -> Any:
        first = generate(model, prompt, cache)
        return generate(model, torch.cat([first, question], dim=1), cache)

    expected = turns(plain, transformers.DynamicCache(config=plain.config))
    assert torch.equal(turns(model, roomy(model)), expected)
    cache = small(model)
    assert turns(model, cache).shape == expected.shape
    assert cache.get_seq_length() == expected.shape[1] - 1  # the last token was never fed


# 6. Speculative decoding.


@pytest.mark.parametrize("make", [roomy, small])
def test_prompt_lookup_equals_greedy(model: Any, make: Any) -> None:
    prompt = tokens(1, 20).repeat(1, 4)
    # In streaming a draft is answered as greedy decoding would answer it, whatever was compressed.
    options = {"max_new_tokens": 30, "eos_token_id": 2}  # older releases want one here
    greedy = generate(model, prompt, make(model, prefill="streaming"), **options)
    cache = make(model, prefill="streaming", rollback=8)
    drafted = generate(model, prompt, cache, prompt_lookup_num_tokens=5, **options)
    assert torch.equal(drafted, greedy)


def test_assisted_decoding_equals_greedy(model: Any) -> None:
    assistant, prompt = build("Llama", num_hidden_layers=1, attention="sdpa"), tokens(1, 50)
    greedy = generate(model, prompt, small(model, prefill="streaming"), max_new_tokens=30)
    cache = small(model, prefill="streaming", rollback=64)
    assert torch.equal(generate(model, prompt, cache, max_new_tokens=30, assistant_model=assistant), greedy)


def test_tokens_taken_back_leave_no_trace(model: Any) -> None:
    ids, other = tokens(2, 80), tokens(2, 6, seed=1)
    cache, expected = small(model, rollback=64), small(model, rollback=64)
    logits(model, cut(ids[:, :70], 60), cache)
    cache.crop(-7)
    assert cache.get_seq_length() == 63
    logits(model, cut(ids[:, :63], 60), expected)
    torch.testing.assert_close(logits(model, [other], cache), logits(model, [other], expected))
    if not OLD:
        cache.activate_past_recording()
        for token in cut(other, 1, 1, 1, 1, 1):
            logits(model, [token], cache)
        cache.crop(-6)
        torch.testing.assert_close(logits(model, [other], cache), logits(model, [other], logits_of(model, ids, other)))
    with pytest.raises(ValueError, match="can be taken back"):
        cache.crop(-70)


def logits_of(model: Any, ids: Any, other: Any) -> Any:
    cache = small(model, rollback=64)
    logits(model, [*cut(ids[:, :63], 60), other], cache)
    return cache


@pytest.mark.skipif(OLD, reason="no cache records its past before transformers 5.11")
def test_a_step_too_many_leaves_no_trace(model: Any) -> None:
    """On some devices generate learns one step late that it is done: after each step it says that this one stays."""
    ids, cache, expected = tokens(2, 70), small(model, rollback=8), small(model, rollback=8)
    logits(model, [ids[:, :60]], cache)
    cache.activate_past_recording()
    for step in cut(ids[:, 60:], *[1] * 9)[:-1]:
        logits(model, [step], cache)
        cache.crop(0)
    logits(model, [ids[:, 69:]], cache)
    cache.crop(-1)
    logits(model, cut(ids[:, :69], 60, *[1] * 8), expected)
    assert torch.equal(logits(model, [ids[:, 69:]], cache), logits(model, [ids[:, 69:]], expected))


def test_a_cache_says_whether_tokens_can_be_taken_back(model: Any) -> None:
    assert [small(model, rollback=size).layers[0].is_croppable for size in (0, 1)] == [False, True]


def test_by_default_no_token_can_be_taken_back(model: Any) -> None:
    """Keeping the last tokens, and the state before them, takes the memory of a second cache."""
    cache = small(model)
    logits(model, cut(tokens(1, 70), 60), cache)
    with pytest.raises(ValueError, match="rollback=64"):
        cache.crop(-1)
    assert cache.get_seq_length() == 70


def test_recording_that_never_ends_keeps_few_tokens(model: Any) -> None:
    cache = small(model, rollback=8)
    cache.layers[0].activate_past_recording()
    cache.layers[1].activate_past_recording()
    ids = tokens(1, 100)
    logits(model, cut(ids[:, :90], *[1] * 89), cache)
    assert 8 <= cache.layers[0].state.rollback.size <= 16
    cache.crop(-8)
    fresh = small(model)
    logits(model, cut(ids[:, :82], *[1] * 81), fresh)
    torch.testing.assert_close(logits(model, [ids[:, 90:]], cache), logits(model, [ids[:, 90:]], fresh))


# 7. Copies, files, caches in turn.


def saved_and_loaded(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


AGAIN = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("way", AGAIN)
@pytest.mark.parametrize(("storage", "padded"), [("input", True), ("int8", False)])
def test_a_cache_resumed_equals_one_that_was_not_interrupted_bit_for_bit(
    model: Any, way: str, storage: str, padded: bool
) -> None:
    ids = tokens(2, 60)
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :7] = 0
    blocks = cut(ids, 40, 1, 1, 9, 1, 1, 6)
    whole = small(model, storage=storage)
    expected = logits(model, blocks, whole, mask)
    for stop in (0, 1, 4):
        first = small(model, storage=storage)
        start = [logits(model, blocks[:stop], first, mask)] if stop else []
        resumed = AGAIN[way](first)
        # The one that was kept goes on too, and in turns: neither knows of the other.
        both = [[*start], [*start]]
        for block in blocks[stop:]:
            for cache, out in zip((resumed, first), both, strict=True):
                out.append(logits(model, [block], cache, mask))
        for cache, out in zip((resumed, first), both, strict=True):
            assert torch.equal(torch.cat(out, dim=1), expected)
            assert cache.report() == whole.report()


def test_a_cache_that_was_loaded_takes_tokens_back(model: Any) -> None:
    ids, other = tokens(2, 80), tokens(2, 6, seed=1)
    cache = small(model, rollback=64)
    logits(model, cut(ids[:, :70], 60), cache)
    loaded = saved_and_loaded(cache)
    for each in (cache, loaded):
        each.crop(-7)
    assert torch.equal(logits(model, [other], loaded), logits(model, [other], cache))


def test_loading_weights_alone_refuses_a_cache(model: Any) -> None:
    """A cache is objects, not weights; torch says so, and executes nothing."""
    file = io.BytesIO()
    torch.save(small(model), file)
    file.seek(0)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(file, weights_only=True)


def test_caches_in_turn(model: Any) -> None:
    prefix, a, b = tokens(1, 60), tokens(1, 15, seed=1), tokens(1, 15, seed=2)
    cache = small(model)
    logits(model, [prefix], cache)
    loaded, copied = saved_and_loaded(cache), copy.deepcopy(cache)

    def alone(ids: Any) -> Any:
        fresh = small(model)
        logits(model, [prefix], fresh)
        return logits(model, cut(ids, *[1] * 14), fresh)

    expected_a, expected_b = alone(a), alone(b)
    # The two caches in turn, token by token.
    turns = zip(a.split(1, 1), b.split(1, 1), strict=True)
    pairs = [(logits(model, [x], copied), logits(model, [y], loaded)) for x, y in turns]
    assert torch.equal(torch.cat([x for x, _ in pairs], dim=1), expected_a)
    assert torch.equal(torch.cat([y for _, y in pairs], dim=1), expected_b)
    assert torch.equal(logits(model, cut(a, *[1] * 14), cache), expected_a)


def test_reset_forgets(model: Any) -> None:
    cache = small(model)
    first = generate(model, tokens(2, 50), cache)
    cache.reset()
    assert cache.get_seq_length() == cache.report().total.nbytes == 0
    assert torch.equal(generate(model, tokens(2, 50), cache), first)
    cache.reset()
    generate(model, tokens(1, 30), cache)  # another batch


# 8. bfloat16, torch.compile, no cache, another cache.


def test_bfloat16(model: Any) -> None:
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    cache = small(narrow)
    out = logits(narrow, cut(tokens(2, 80), 60, *[1] * 19), cache)
    assert out.dtype == torch.bfloat16
    assert bool(torch.isfinite(out).all())
    wide = roomy(narrow)
    plain = copy.deepcopy(narrow)
    plain.set_attn_implementation("sdpa")
    ids = tokens(2, 40)
    # Eight bits of mantissa through two layers; logits are of order 3.
    torch.testing.assert_close(logits(narrow, cut(ids, 30), wide), plain(ids).logits, rtol=0.05, atol=0.1)


def test_means_in_eight_bits_take_fewer_bytes(model: Any) -> None:
    tokens = torch.randint(3, 60, (2, 150), generator=torch.Generator().manual_seed(3))
    held = {}
    # More clusters than tokens: nothing merges, and rounding is all the difference.
    for storage in ("input", "int8"):
        cache = SubGenCache(model.config, max_clusters=200, window=16, storage=storage)
        with torch.inference_mode():
            model(tokens, **given(cache))
            held[storage] = model(tokens[:, :5], **given(cache)).logits, cache.report().total.nbytes
    assert held["int8"][1] < 0.75 * held["input"][1]
    torch.testing.assert_close(held["int8"][0], held["input"][0], atol=0.1, rtol=0.1)


def test_without_a_cache_and_with_the_default_one(model: Any, plain: Any) -> None:
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    where = {"attention_mask": mask, "position_ids": places(mask, 40, ids)}
    expected = plain(ids, **where).logits[mask.bool()]
    torch.testing.assert_close(model(ids, use_cache=False, **where).logits[mask.bool()], expected)
    default = logits(model, cut(ids, 20, 1), transformers.DynamicCache(config=model.config), mask)
    torch.testing.assert_close(default[mask.bool()], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False),
        plain.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False),
    )


def test_torch_compile(model: Any) -> None:
    ids = tokens(1, 40)
    expected = logits(model, cut(ids, 36, 1, 1, 1), small(model))
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    got = logits(compiled, cut(ids, 36, 1, 1, 1), small(model))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


# Budgets and the report.


def test_the_report_tells_bytes(model: Any) -> None:
    cache = small(model, max_clusters=[12, 20])
    logits(model, cut(tokens(2, 100), 80, *[1] * 19), cache)
    report = cache.report()
    assert [layer.n_clusters for layer in report.layers] == [12, 20]
    exact = 2 * 2 * 100 * 16 * 2 * 4  # rows, heads, tokens, head_dim, keys and values, bytes
    assert [layer.exact_nbytes for layer in report.layers] == [exact, exact]
    assert report.total.nbytes == sum(layer.nbytes for layer in report.layers)
    assert 0 < report.total.ratio < 1
    assert "12" in str(report)
    assert len(str(report).splitlines()) == 4


def test_memory_does_not_grow(model: Any) -> None:
    cache = small(model, prefill="streaming")
    held = []
    for seed in range(12):
        logits(model, [tokens(1, 50, seed), tokens(1, 1)], cache)
        held.append(cache.report().total.nbytes)
    assert len(set(held[2:])) <= 4  # the window is between half full and full
    assert max(held[6:]) <= max(held[2:6])


@pytest.mark.parametrize("ratio", [0.5, 0.75, [0.5, 0.9]])
def test_the_ratio_is_the_share_removed(model: Any, ratio: Any) -> None:
    cache = SubGenCache(model.config, compression_ratio=ratio, window=32)
    logits(model, [tokens(1, 400)], cache)
    ratios = ratio if isinstance(ratio, list) else [ratio] * 2
    for layer, removed in zip(cache.report().layers, ratios, strict=True):
        pairs = 400 * (1 - removed)
        # 4 sinks; the window is 32, or a sixth of what the sinks leave.
        assert layer.n_clusters == pytest.approx(pairs - 4 - min(32, (pairs - 4) // 6), abs=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", ["input", "int8"])
def test_the_ratio_is_the_share_of_bytes_held(dtype: Any, storage: str) -> None:
    """At most 12% of an exact cache after the prompt: heads of 64, whose variances and counts weigh little."""
    model = build("Llama", head_dim=64).to(dtype)
    cache = SubGenCache(model.config, compression_ratio=0.9, storage=storage)
    logits(model, [tokens(1, 1536)], cache)
    assert cache.report().total.ratio < 0.12


def test_chunks_with_a_ratio_are_warned_of(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    cache = SubGenCache(model.config, compression_ratio=0.5)
    with caplog.at_level(logging.WARNING, logger="subgen_torch.transformers"):
        logits(model, cut(tokens(1, 60), 30), cache)
    assert "max_clusters" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({}, ValueError, "give one of"),
        ({"max_clusters": 5, "compression_ratio": 0.5}, ValueError, "give one of"),
        ({"max_clusters": [1, 2, 3]}, ValueError, "each of the 2 layers"),
        ({"max_clusters": 0}, ValueError, "at least 1"),
        ({"max_clusters": 2.5}, TypeError, "integer"),
        ({"compression_ratio": 1.0}, ValueError, "leave nothing"),
        ({"compression_ratio": -0.1}, ValueError, "at least 0"),
        ({"max_clusters": 5, "prefill": "fast"}, ValueError, "streaming"),
        ({"max_clusters": 5, "window": 1}, ValueError, "window"),
        ({"max_clusters": 5, "rollback": -1}, ValueError, "rollback"),
    ],
)
def test_bad_arguments(model: Any, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        SubGenCache(model.config, **options)


@pytest.mark.parametrize("storage", ["input", "int8"])
@pytest.mark.parametrize(("ratio", "size"), [(0.9, 20), (0.9, 1), (0.99, 200), (0.5, 22)])
def test_a_prompt_too_short_for_its_ratio_stays_exact(
    model: Any, plain: Any, ratio: float, size: int, storage: str
) -> None:
    """A server does not choose its prompts: a share of 2 pairs holds no sketch, and nothing is removed."""
    ids = tokens(2, size + 20)
    cache = SubGenCache(model.config, compression_ratio=ratio, window=40, storage=storage)
    got = logits(model, cut(ids, size, 5, *[1] * 14), cache)
    # The first tokens after the prompt, too: half of the window of 40.
    torch.testing.assert_close(got, plain(ids).logits, rtol=1e-5, atol=2e-5)


def test_memory_does_not_grow_after_a_prompt_too_short_for_its_ratio(model: Any) -> None:
    cache = SubGenCache(model.config, compression_ratio=0.9, window=8)
    logits(model, cut(tokens(1, 100), 20, *[1] * 79), cache)
    report = cache.report()
    assert [layer.n_clusters for layer in report.layers] == [20, 20]  # as many as the prompt had tokens
    logits(model, [tokens(1, 400), tokens(1, 1)], cache)
    assert cache.report().total.n_clusters == 20


def test_padded_rows_too_short_for_their_ratio_stay_exact(model: Any, plain: Any) -> None:
    """Beside a row that is long enough, and is compressed as it would be alone."""
    ids = tokens(3, 220)
    mask = torch.ones_like(ids)
    mask[0, :180] = mask[1, :199] = 0  # 20 and 1 of the 200 tokens of the prompt are real
    options = {"compression_ratio": 0.9, "window": 32}
    got = logits(model, cut(ids, 200, *[1] * 15), SubGenCache(model.config, **options), mask)
    exact = plain(ids, attention_mask=mask, position_ids=places(mask, 220, ids)).logits
    for row in (0, 1):
        real = mask[row].bool()
        torch.testing.assert_close(got[row, real], exact[row, real], rtol=1e-5, atol=2e-5)
    alone = logits(model, cut(ids[2:], 200, *[1] * 15), SubGenCache(model.config, **options))
    torch.testing.assert_close(got[2], alone[0], rtol=1e-4, atol=1e-4)


# torch's modes.


CALLS = {
    "in all calls": [True] * 4,
    "while the prompt is read": [True, False, False, False],
    "after the prompt": [False, True, True, False],
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("when", CALLS)
@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_autocast_answers_as_with_the_cache_of_transformers(family: str, when: str, dtype: str, padded: bool) -> None:
    """Queries and keys come in float32 from the rotary embedding, values in 16 bits from their projection."""
    sliding = {**SLIDING, "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    model = build("Llama") if family == "Llama" else build_sliding("Gemma3Text", family, "subgen", sliding)
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    if padded:
        mask[0, :7] = 0

    def answers(cache: Any) -> list[Any]:
        found, seen = [], 0
        for block, on in zip(cut(ids, 30, 1, 7), CALLS[when], strict=False):
            seen += block.shape[1]
            where = {"attention_mask": mask[:, :seen], "position_ids": places(mask, seen, block)}
            with torch.autocast("cpu", dtype=getattr(torch, dtype), enabled=on):
                found.append(model(block, **given(cache), **where).logits)
        return found

    expected = answers(transformers.DynamicCache(config=model.config))
    for prefill in ("exact", "streaming"):
        cache = roomy(model, window=64, prefill=prefill)
        for mine, theirs in zip(answers(cache), expected, strict=True):
            assert mine.dtype == theirs.dtype
            # Eight bits of mantissa (eleven) through two layers; padded tokens have no meaning.
            near = 0.03 if dtype == "bfloat16" else 0.004
            bound = near * float(theirs.abs().max())
            torch.testing.assert_close(mine[:, 7:].float(), theirs[:, 7:].float(), rtol=0, atol=bound)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4, "eos_token_id": 2}])
def test_generate_under_autocast(model: Any, options: dict[str, Any]) -> None:
    prompt = tokens(1, 20).repeat(1, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = generate(model, prompt, small(model, rollback=8), min_new_tokens=12, **options)
    assert out.shape == (1, 72)


def test_mixed_dtypes_without_autocast_are_promoted(model: Any) -> None:
    """A rotary embedding that computes in float32 gives queries and keys in it, beside values in 16 bits."""
    narrow = copy.deepcopy(model).to(torch.bfloat16)
    for layer in narrow.model.layers:
        for name in ("q_proj", "k_proj"):
            getattr(layer.self_attn, name).register_forward_hook(lambda module, args, out: out.float())
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: args[0].to(torch.bfloat16))
    ids = tokens(2, 40)
    got = logits(narrow, cut(ids, 30, 1, 7), roomy(narrow))
    # The bits of bfloat16, through two layers; logits are of order 3.
    torch.testing.assert_close(got.float(), model(ids, use_cache=False).logits, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
@pytest.mark.parametrize("options", [{}, {"storage": "int8"}, {"max_clusters": None, "compression_ratio": 0.6}])
def test_the_default_device_is_not_where_the_cache_is(family: str, options: dict[str, Any]) -> None:
    """The device "meta" stands for a GPU: whatever were made on it could not be read."""
    model = build("Llama") if family == "Llama" else build_sliding("Gemma3Text", family, "subgen", SLIDING)
    ids, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[0, :7] = mask[1, 12:20] = 0
    sizes, rows = (50, 51, 59, 60), torch.tensor([1, 0])
    where = [places(mask, seen, block) for seen, block in zip(sizes, cut(ids, 50, 1, 8), strict=True)]

    def answers() -> tuple[list[Any], str]:
        cache, found = small(model, **options), []
        for seen, block, position_ids in zip(sizes, cut(ids, 50, 1, 8), where, strict=True):
            more = {"attention_mask": mask[:, :seen], "position_ids": position_ids}
            found.append(model(block, **given(cache), **more).logits)
        cache.reorder_cache(rows)
        if family == "Llama":
            cache.batch_repeat_interleave(2)
        return found, str(cache.report())

    expected = answers()
    with torch.device("meta"):
        got = answers()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got[0], expected[0], strict=True))
    assert got[1] == expected[1]


# What must not be silently wrong.


def test_another_attention_raises(plain: Any) -> None:
    with pytest.raises(RuntimeError, match="enable"):
        plain(tokens(1, 10), **given(roomy(plain)))


def test_masks_that_are_not_about_this_stream(model: Any) -> None:
    ids, mask = tokens(2, 20), torch.ones(2, 21, dtype=torch.long)
    mask[0, :5] = 0
    cache = small(model)
    logits(model, [ids], cache, mask)
    one = tokens(2, 1)
    for changed, match in [
        (None, "no attention_mask"),
        (torch.ones(2, 21), "cannot be masked later"),
        (mask[:, :20], "21 columns"),
    ]:
        fresh = copy.deepcopy(cache)
        with pytest.raises(ValueError, match=match):
            model(one, **given(fresh), attention_mask=changed)
    with pytest.raises(ValueError, match="two dimensions"):
        model(one, **given(copy.deepcopy(cache)), attention_mask=torch.zeros(2, 1, 1, 21))
    with pytest.raises(ValueError, match="batch of 2 rows"):
        model(tokens(3, 1), **given(copy.deepcopy(cache)), attention_mask=torch.ones(3, 21))


def test_training_is_refused(model: Any) -> None:
    trained = copy.deepcopy(model).requires_grad_(True)
    loss = trained(tokens(1, 10), **given(roomy(trained))).logits.sum()
    with pytest.raises(RuntimeError, match="no gradient"):
        loss.backward()


def test_enable_and_disable() -> None:
    model = build("Llama", attention="sdpa")
    enable(model)
    enable(model)
    assert model.config._attn_implementation == "subgen"
    disable(model)
    disable(model)
    assert model.config._attn_implementation == "sdpa"


def parts_of_a_model() -> Any:
    """A model for images and text, whose parts have attentions of their own."""
    text = transformers.LlamaConfig(**SIZES)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=4)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
    model = transformers.LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    return model


def attentions(model: Any) -> list[str]:
    parts = (model.config, model.config.text_config, model.config.vision_config)
    return [config._attn_implementation for config in parts]


def test_every_part_of_a_model_gets_its_own_attention_back() -> None:
    model = parts_of_a_model()
    before = attentions(model)
    assert before[1:] == ["eager", "sdpa"]
    enable(model)
    enable(model)
    assert attentions(model) == ["subgen"] * 3
    again = copy.deepcopy(model)
    disable(model)
    assert attentions(model) == before
    # What was chosen for a part since then stays; enabling it again does not forget what it had at first.
    again.set_attn_implementation({"text_config": "sdpa"})
    enable(again)
    assert attentions(again) == ["subgen"] * 3
    again.set_attn_implementation({"vision_config": "eager"})
    disable(again)
    assert attentions(again) == [before[0], "sdpa", "eager"]


def test_a_model_for_images_and_text_generates_from_sketches() -> None:
    model = parts_of_a_model()
    prompt = tokens(2, 40).clamp(max=62)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(prompt, **options)
    enable(model)
    assert torch.equal(model.generate(prompt, **given(roomy(model)), **options), expected)


@pytest.mark.parametrize("call", [enable, disable])
def test_what_is_not_a_model_cannot_be_switched(call: Any, model: Any) -> None:
    with pytest.raises(TypeError, match="its configuration: pass the model itself"):
        call(model.config)
    with pytest.raises(TypeError, match="takes a model of transformers, got str"):
        call("gpt2")


@pytest.mark.parametrize(
    ("wrong", "match"), [(lambda model: model, "the model itself: pass model.config"), (lambda model: {}, "got dict")]
)
def test_a_cache_takes_the_configuration(wrong: Any, match: str, model: Any) -> None:
    with pytest.raises(TypeError, match=match):
        SubGenCache(wrong(model), max_clusters=8)


# Before it OPT makes masks of its own; GPT-J and CodeGen have attention in their own code.
SINCE = {"OPT": "5.11", "GPTJ": "5.24", "CodeGen": "5.24"}


@pytest.mark.parametrize("family", WORKING)
def test_families_that_work(family: str) -> None:
    if before(SINCE.get(family, "0")):
        pytest.skip(f"since transformers {SINCE[family]}")
    plain, model = build(family, "sdpa", **WORKING[family]), build(family, **WORKING[family])
    ids = tokens(2, 50)
    expected = plain(ids).logits
    got = logits(model, cut(ids, 40, 1, 1), roomy(model))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    generate(model, ids, small(model), max_new_tokens=3)


@pytest.mark.parametrize("family", ["Gemma3", "Qwen2"])
def test_layers_that_slide_stay_exact(family: str) -> None:
    name = "Gemma3" if family == "Gemma3" else family
    config = "Gemma3Text" if name == "Gemma3" else name
    plain, model = (build_sliding(config, name, attention, SLIDING) for attention in ("sdpa", "subgen"))
    ids = tokens(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    where = {"attention_mask": mask, "position_ids": places(mask, 50, ids)}
    expected = plain(ids, **where).logits
    cache = roomy(model)
    got = logits(model, cut(ids, 40, 1, 1), cache, mask)
    torch.testing.assert_close(
        got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )
    assert [layer.kind for layer in cache.report().layers] == ["exact", "sketch", "exact"]


@pytest.mark.parametrize(
    ("family", "more", "match"),
    [
        ("Falcon", {}, "own code"),
        ("Bloom", {}, "own code"),
        ("StableLm", {}, "own code"),
        ("Mpt", {"n_heads": 4, "d_model": 64, "n_layers": 2}, "own code"),
        *[(family, WORKING[family], "own code") for family in ("GPTJ", "CodeGen") if before(SINCE[family])],
        ("Gemma2", {"head_dim": 16}, "caps its logits"),
        ("Mistral", {"sliding_window": 16}, "nothing to compress"),
        ("DeepseekV3", {"first_k_dense_replace": 2, "q_lora_rank": None, "num_key_value_heads": 4}, "MLA"),
    ],
)
def test_families_that_are_refused(family: str, more: dict[str, Any], match: str) -> None:
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **more})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with pytest.raises(ValueError, match=match):
        enable(model)


@pytest.mark.parametrize(
    ("family", "more", "match"),
    [
        ("Doge", {}, "dynamic mask"),
        ("DiffLlama", {}, "difference of two attentions"),
        ("JetMoe", {"num_key_value_heads": 2, "kv_channels": 16, "num_local_experts": 2}, "once for each expert"),
        ("MllamaText", {"cross_attention_layers": [1]}, "cross-attention"),
    ],
)
def test_families_that_would_fail_late_are_refused_at_once(family: str, more: dict[str, Any], match: str) -> None:
    config = getattr(transformers, f"{family}Config", None)
    if config is None:
        config = importlib.import_module("transformers.models.mllama").MllamaTextConfig
    model = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config(**{**SIZES, **more}))
    with pytest.raises(ValueError, match=match):
        enable(model)
    with pytest.raises(ValueError, match="the model's own cache"):
        SubGenCache(model.config, max_clusters=8)


def test_keys_that_change_on_their_way_to_attention_are_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no configuration tells is told by the first layer, whatever the tokens before."""
    cache = small(model)
    logits(model, [tokens(2, 20)], cache)

    def changing(module: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        return subgen_attention(module, query, key.clone(), *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setitem(transformers.AttentionInterface._global_mapping, "subgen", changing)
        with pytest.raises(ValueError, match="LlamaAttention changes keys between the cache and attention"):
            model(tokens(2, 1), **given(cache))
    logits(model, [tokens(2, 1)], cache)
    assert cache.get_seq_length() == 21


def test_learned_sinks_are_refused() -> None:
    model = build(
        "GptOss", "eager", num_local_experts=2, head_dim=16, layer_types=["full_attention", "sliding_attention"]
    )
    enable(model)
    with pytest.raises(ValueError, match="learned attention sinks"):
        model(tokens(1, 10), **given(roomy(model)))


def test_models_with_an_encoder_are_refused() -> None:
    with pytest.raises(ValueError, match="encoder"):
        SubGenCache(transformers.T5Config(), max_clusters=8)
