"""A call of a `SubGenCache` that raises leaves every layer as it was: whatever raises, in whatever layer.

Beside each cache goes its twin, which gets the calls that succeed and never one that is refused. The two are the same
to the last bit.
"""

from __future__ import annotations

import copy
import functools
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hypothesis import settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule  # noqa: E402
from subgen_torch.transformers import enable  # noqa: E402
from tiny_models import OLD, WORKING, build, build_sliding, cut, given, logits, small, tokens  # noqa: E402

HYBRID = {
    "num_hidden_layers": 3,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "head_dim": 16,
}


@functools.cache
def model_of(kind: str) -> Any:
    """A model whose layers are all sketches, or one of which layers that slide are the first and the last."""
    return build("Llama") if kind == "Llama" else build_sliding("Gemma3Text", "Gemma3", "subgen", HYBRID)


@functools.cache
def double_of(kind: str) -> Any:
    return copy.deepcopy(model_of(kind)).double()


class InjectedError(Exception):
    """An error of a part of the model."""


@contextmanager
def failing(module: Any, error: type[BaseException]) -> Iterator[None]:
    """While it lasts, a part of the model raises when it is called."""

    def fail(*_: Any) -> None:
        raise error

    handle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def changed(holder: Any, name: str, value: Any) -> Iterator[None]:
    """While it lasts, an attribute has another value."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


def interrupted(call: Callable[[], Any], at: int) -> None:
    """Make a call that is interrupted, as by Ctrl-C, before a line of this project: that of this number."""
    lines = 0

    def entered(frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        return at_line if "subgen" in name and "site-packages" not in name and "tests" not in name else None

    def at_line(frame: Any, event: str, argument: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == at:
                raise KeyboardInterrupt
        return at_line

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        call()
    finally:
        sys.settrace(before)


def parts(model: Any) -> list[Any]:
    """Modules in which a forward pass can fail: before, in, between and behind the layers."""
    found = [model.model.embed_tokens, model.model.norm, model.lm_head]
    for layer in model.model.layers:
        found += [layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp]
    return found


def lengths(cache: Any) -> list[int]:
    return [layer.get_seq_length() for layer in cache.layers]


def same(model: Any, cache: Any, twin: Any) -> bool:
    """Whether two caches hold the same and answer the same."""
    if cache.report() != twin.report() or lengths(cache) != lengths(twin):
        return False
    probe = tokens(cache.layers[0].rows or 2, 3, seed=9)
    got, expected = (logits(model, [probe], copy.deepcopy(x)) for x in (cache, twin))
    return bool(torch.equal(got, expected))


def one_that_raises(model: Any, cache: Any, how: str) -> Callable[[], Any]:
    """A call that a cache refuses."""
    rows, seen = max(cache.layers[0].rows, 1), cache.get_seq_length()
    ids = tokens(rows, 5, seed=3)
    ones = torch.ones(rows, seen + 5, dtype=torch.long)
    if how == "a mask that is too short":
        return lambda: model(ids, attention_mask=ones[:, :-2], **given(cache))
    if how == "a mask that hides earlier tokens":
        hidden = ones.clone()
        hidden[:, 0] = 0
        return lambda: model(ids, attention_mask=hidden, **given(cache))
    if how == "a mask of four dimensions":
        return lambda: model(ids, attention_mask=torch.zeros(rows, 1, 5, seen + 5), **given(cache))
    if how == "other rows":
        return lambda: model(tokens(rows + 1, 5), **given(cache))
    if how == "weights":
        return lambda: model(ids, output_attentions=True, **given(cache))
    if how == "crop":
        return lambda: cache.crop(-seen - 1)
    return lambda: cache.batch_select_indices(torch.tensor([0, rows]))


REFUSED = [
    "a mask that is too short",
    "a mask that hides earlier tokens",
    "a mask of four dimensions",
    "other rows",
    "weights",
    "crop",
    "rows that there are not",
]


def absorbed(model: Any, cache: Any) -> Any:
    """The 40 tokens before those that the tests below are about; nothing of 50 is merged."""
    ids = tokens(2, 50)
    model(ids[:, :40], **given(cache))
    return ids


def answers_as_before(model: Any, cache: Any, ids: Any) -> None:
    """The cache holds 40 tokens in every layer, and the call that is right is answered as without a cache."""
    assert lengths(cache) == [40] * len(cache.layers)
    exact = model(ids, use_cache=False).logits[:, 40:]
    # Float32 sums in another order, through a few layers.
    torch.testing.assert_close(model(ids[:, 40:], **given(cache)).logits, exact, rtol=1e-4, atol=1e-4)
    assert lengths(cache) == [50] * len(cache.layers)


@pytest.mark.parametrize("kind", ["Llama", "hybrid"])
@pytest.mark.parametrize("how", REFUSED)
def test_a_refused_call_changes_nothing(kind: str, how: str) -> None:
    model = model_of(kind)
    cache = small(model, max_clusters=64, window=64)
    ids = absorbed(model, cache)
    # Where a layer slides, torch refuses the mask of four dimensions.
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        one_that_raises(model, cache, how)()
    answers_as_before(model, cache, ids)


@pytest.mark.parametrize("error", [InjectedError, KeyboardInterrupt])
@pytest.mark.parametrize("part", range(12))
def test_an_error_in_any_part_of_the_model_changes_nothing(part: int, error: type[BaseException]) -> None:
    """In the last layer and behind it too, where all layers of the cache are done."""
    model = model_of("hybrid")
    cache = small(model, max_clusters=64, window=64)
    ids = absorbed(model, cache)
    assert len(parts(model)) == 12
    with failing(parts(model)[part], error), pytest.raises(error):
        model(ids[:, 40:], **given(cache))
    answers_as_before(model, cache, ids)


def test_a_refused_first_call_leaves_an_empty_cache() -> None:
    model = build("GPT2", **WORKING["GPT2"])
    ids = tokens(1, 60)
    cache = small(model, max_clusters=64, window=64)
    with pytest.raises(ValueError, match="50 columns"):
        model(ids, attention_mask=torch.ones(1, 50, dtype=torch.long), **given(cache))
    assert cache.report().total.nbytes == cache.get_seq_length() == cache.report().total.exact_nbytes == 0
    exact = model(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids, **given(cache)).logits, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", [5, 8, 1])  # in layers 0 and 1, and behind them
def test_without_hooks_a_call_counts_when_the_last_layer_has_answered(part: int) -> None:
    """The inner model has none: nothing says whether what follows the last layer has succeeded."""
    model = model_of("Llama")
    cache = small(model, max_clusters=64, window=64)
    ids = absorbed(model, cache)
    with failing(parts(model)[part], InjectedError), pytest.raises(InjectedError):
        model.model(ids[:, 40:], **given(cache))
    if part != 5:
        assert lengths(cache) == [50, 50]
        return
    # Nothing says either whether the call that stopped after layer 0 failed: one call is refused, and all is as before.
    with pytest.raises(RuntimeError, match=r"did not end.*repeat the call"):
        model.model(ids[:, 40:], **given(cache))
    assert lengths(cache) == [40, 40]
    model.model(ids[:, 40:45], **given(cache))
    assert lengths(cache) == [45, 45]


def test_the_model_may_be_called_again_where_the_inner_model_failed() -> None:
    model = model_of("Llama")
    cache = small(model, max_clusters=64, window=64)
    ids = absorbed(model, cache)
    with failing(parts(model)[5], KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        model.model(ids[:, 40:], **given(cache))
    answers_as_before(model, cache, ids)


def test_two_threads_in_one_cache_are_refused() -> None:
    model = model_of("Llama")
    cache = small(model, max_clusters=64, window=64)
    ids = absorbed(model, cache)
    other = tokens(2, 10, seed=5)

    def meanwhile(*_: Any) -> None:
        handle.remove()
        thread = threading.Thread(target=lambda: model(other, **given(cache)))
        thread.start()
        thread.join()

    for part in (parts(model)[5], model.lm_head):  # between the layers, and behind them
        handle = part.register_forward_pre_hook(meanwhile)
        before = cache.get_seq_length()
        with pytest.raises(RuntimeError, match="at once"):
            model(ids[:, 40:], **given(cache))
        assert lengths(cache) == [before + 10] * 2  # what the other thread read


def test_a_model_that_is_not_enabled_is_refused_until_it_is() -> None:
    model = build("Llama", attention="sdpa")
    cache = small(model, max_clusters=64, window=64)
    with pytest.raises(RuntimeError, match=r"layer 0 received keys that no attention call used.*enable"):
        model(tokens(2, 10), **given(cache))
    enable(model)
    answers_as_before(model, cache, absorbed(model, cache))


def test_a_single_layer_that_nobody_took_is_refused_until_reset() -> None:
    model = build("Llama", attention="sdpa", num_hidden_layers=1)
    cache = small(model)
    model(tokens(2, 10), **given(cache))  # nothing tells before the next call
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"no attention call used.*reset\(\)"):
            model(tokens(2, 1), **given(cache))
    cache.reset()
    enable(model)
    model(tokens(2, 10), **given(cache))
    assert lengths(cache) == [10]


def test_a_model_that_skips_layers_is_refused() -> None:
    model = copy.deepcopy(model_of("hybrid"))
    cache = small(model)
    ids = absorbed(model, cache)
    before = copy.deepcopy(cache)
    for config in (model.config, model.model.config):
        config.num_hidden_layers = 2
    layers, model.model.layers = model.model.layers, model.model.layers[:2]
    with pytest.raises(RuntimeError, match="ended after layer 1 of 3"):
        model(ids[:, 40:], **given(cache))
    model.model.layers = torch.nn.ModuleList([layers[0], layers[2]])
    with pytest.raises(RuntimeError, match="layer 2, where those of layer 1 come next, of 3"):
        model(ids[:, 40:], **given(cache))
    model.model.layers, model.config.num_hidden_layers = layers, 3
    assert same(model, cache, before)


# Taking tokens back.


def test_layers_that_slide_take_tokens_back_while_they_hold_them() -> None:
    model = model_of("hybrid")
    ids, other = tokens(2, 60), tokens(2, 8, seed=1)
    cache, expected = (small(model, max_clusters=64, window=64, rollback=64) for _ in range(2))
    logits(model, [ids[:, :10]], cache)
    cache.crop(-4)  # before the window of 12 is full, all tokens are held
    logits(model, [ids[:, 6:40]], cache)
    with pytest.raises(ValueError, match=r"window of 12 can take back 0.*activate_past_recording"):
        cache.crop(-3)
    for layer in cache.layers:
        layer.activate_past_recording()
    logits(model, cut(ids[:, 40:], 5, *[1] * 3), cache)
    assert lengths(cache) == [60] * 3
    cache.crop(-9)
    logits(model, cut(ids[:, :51], 30, 7, 7), expected)
    torch.testing.assert_close(logits(model, [other], cache), logits(model, [other], expected), rtol=1e-4, atol=1e-4)
    cache.crop(0)  # forgets what was kept to be taken back
    with pytest.raises(ValueError, match=r"can take back 0|the last 0"):
        cache.crop(-1)
    assert lengths(cache) == [59] * 3


def test_recording_keeps_a_bounded_number_of_tokens_in_layers_that_slide() -> None:
    model = model_of("hybrid")
    cache = small(model, rollback=8)
    for layer in cache.layers:
        layer.activate_past_recording()
    logits(model, cut(tokens(1, 100), *[1] * 99), cache)
    assert cache.layers[0].keys.shape[2] == 12 - 1 + 2 * 8


def test_a_layer_that_slides_does_not_keep_a_long_prompt_alive() -> None:
    model = model_of("hybrid")
    cache = small(model)
    logits(model, [tokens(2, 300)], cache)
    keys = cache.layers[0].keys
    assert keys.shape[2] == 11
    assert keys.untyped_storage().nbytes() == keys.numel() * 4


@pytest.mark.skipif(OLD, reason="no cache records its past before transformers 5.11")
def test_a_row_whose_first_tokens_are_partly_taken_back_keeps_the_others() -> None:
    model = model_of("Llama")
    ids = tokens(2, 30)
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[0, :13] = 0
    cache = small(model, max_clusters=64, window=64, rollback=64)
    cache.activate_past_recording()
    logits(model, cut(ids[:, :20], 10, 5), cache, mask)  # row 0 begins in the second block
    cache.crop(-3)
    got = logits(model, [ids[:, 20:]], cache, torch.cat([mask[:, :17], mask[:, 20:30]], dim=1))
    own = torch.cat([ids[:, :17], ids[:, 20:]], dim=1)
    alone = logits(model, [own[:1, 13:]], small(model, max_clusters=64, window=64))
    torch.testing.assert_close(got[0], alone[0, -10:], rtol=1e-4, atol=1e-4)


# Rows of the batch.


def test_rows_are_picked_by_number_from_the_end_or_by_yes_and_no() -> None:
    model = model_of("Llama")
    cache = small(model)
    logits(model, [tokens(3, 30)], cache)
    picks = {
        "numbers": torch.tensor([0, 2]),
        "from the end": torch.tensor([-3, -1]),
        "yes and no": torch.tensor([True, False, True]),
    }
    found = []
    for indices in picks.values():
        picked = copy.deepcopy(cache)
        picked.batch_select_indices(indices)
        found.append(logits(model, [tokens(2, 4, seed=1)], picked))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    with pytest.raises(IndexError, match="batch of 3 rows"):
        cache.batch_select_indices(torch.tensor([0, 3]))


# All of it in any order.


class Caches(RuleBasedStateMachine):
    """A cache and its twin."""

    @initialize(
        kind=st.sampled_from(["Llama", "hybrid"]),
        prefill=st.sampled_from(["exact", "streaming"]),
        storage=st.sampled_from(["input", "int8"]),
        rollback=st.sampled_from([0, 6]),
    )
    def begin(self, kind: str, prefill: str, storage: str, rollback: int) -> None:
        self.kind, self.model = kind, model_of(kind)
        self.cache = small(self.model, prefill=prefill, storage=storage, rollback=rollback)
        self.twin = copy.deepcopy(self.cache)
        self.seed = 0

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            assert same(self.model, self.cache, self.twin)

    def both(self, call: Callable[[Any], Any]) -> None:
        for cache in (self.cache, self.twin):
            call(cache)

    def block(self, size: int) -> Any:
        self.seed += 1
        return tokens(self.cache.layers[0].rows or 2, size, self.seed)

    @rule(size=st.sampled_from([1, 1, 2, 5, 12, 30]))
    def read(self, size: int) -> None:
        ids = self.block(size)
        self.both(lambda cache: self.model(ids, **given(cache)))

    @rule(count=st.integers(1, 6))
    def take_back(self, count: int) -> None:
        before = self.cache.get_seq_length()
        try:
            self.cache.crop(-count)
        except ValueError:
            assert same(self.model, self.cache, self.twin)
            return
        self.twin.crop(-count)
        assert lengths(self.cache) == [before - count] * len(self.cache.layers)

    @precondition(lambda self: self.cache.get_seq_length())
    @rule(rows=st.lists(st.integers(0, 1), min_size=2, max_size=2))
    def reorder(self, rows: list[int]) -> None:
        self.both(lambda cache: cache.reorder_cache(torch.tensor(rows)))

    @rule()
    def record(self) -> None:
        if not OLD:
            self.both(lambda cache: cache.activate_past_recording())

    @rule()
    def reset(self) -> None:
        self.both(lambda cache: cache.reset())

    @rule(way=st.sampled_from([copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]))
    def copied(self, way: Callable[[Any], Any]) -> None:
        self.cache = way(self.cache)

    @precondition(lambda self: self.cache.get_seq_length() > 1)
    @rule(how=st.sampled_from(REFUSED))
    def refused(self, how: str) -> None:
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            one_that_raises(self.model, self.cache, how)()
        assert lengths(self.cache) == lengths(self.twin)

    @precondition(lambda self: self.cache.get_seq_length())
    @rule()
    def another_dtype(self) -> None:
        with pytest.raises(TypeError, match=r"torch.float32.*torch.float64"):
            double_of(self.kind)(self.block(3), **given(self.cache))
        assert lengths(self.cache) == lengths(self.twin)

    @precondition(lambda self: self.cache.get_seq_length())
    @rule()
    def another_scale(self) -> None:
        with (
            changed(self.model.model.layers[1].self_attn, "scaling", 0.1),
            pytest.raises(ValueError, match="scale was"),
        ):
            self.model(self.block(3), **given(self.cache))
        assert lengths(self.cache) == lengths(self.twin)

    @rule(data=st.data(), size=st.sampled_from([1, 9]), error=st.sampled_from([InjectedError, KeyboardInterrupt]))
    def error_in_a_part(self, data: st.DataObject, size: int, error: type[BaseException]) -> None:
        part = data.draw(st.sampled_from(range(len(parts(self.model)))))
        with failing(parts(self.model)[part], error), pytest.raises(error):
            self.model(self.block(size), **given(self.cache))
        assert lengths(self.cache) == lengths(self.twin)

    # A token takes some 1,000 lines, a block up to 7,000.
    @rule(at=st.one_of(st.integers(1, 1200), st.integers(1, 7000)), size=st.sampled_from([1, 9]))
    def interrupt_at_a_line(self, at: int, size: int) -> None:
        ids = self.block(size)
        with suppress(KeyboardInterrupt):
            interrupted(lambda: self.model(ids, **given(self.cache)), at)
        # The whole pass counts, or none of it.
        if lengths(self.cache) != lengths(self.twin):
            self.model(ids, **given(self.twin))
        assert same(self.model, self.cache, self.twin)

    @rule(share=st.floats(0, 1), what=st.sampled_from(["crop", "reorder", "reset"]))
    def interrupt_what_changes_all_layers(self, share: float, what: str) -> None:
        calls: dict[str, Callable[[Any], Any]] = {
            "crop": lambda cache: cache.crop(-1),
            "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
            "reset": lambda cache: cache.reset(),
        }
        after = copy.deepcopy(self.twin)
        try:
            calls[what](after)
        except ValueError:
            return
        at = 1 + int(share * {"crop": 4000, "reorder": 900, "reset": 50}[what])
        with suppress(KeyboardInterrupt):
            interrupted(lambda: calls[what](self.cache), at)
        if not same(self.model, self.cache, self.twin):
            self.twin = after
            assert same(self.model, self.cache, self.twin)


TestCaches = Caches.TestCase
TestCaches.settings = settings(settings.default, stateful_step_count=12)
