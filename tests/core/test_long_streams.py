"""Streams of more tokens than 32 bits count: they are remembered, saved and merged, up to what 64 bits count.

Sketches merged with themselves get there in a second. Their tokens are four distinct ones, each as often: clusters of
equal tokens are exact, and so attention over the stream is what it is over the first few of its tokens.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from libraries import LIBRARIES, Library, to_numpy
from sketches import arrays, assert_same, below

import subgen
from subgen import AttentionSketch, attention, merge
from subgen._checks import MOST_TOKENS
from subgen._random import DRAW_BITS, draws, stream_key
from subgen.default.quantization import draw_dithers
from subgen.reservoirs import drawn_places, last_count, next_count

SEED = 0
TOKENS = 16
KINDS: dict[str, dict[str, Any]] = {
    "default": {"max_clusters": 1},
    "int8": {"max_clusters": subgen.Power(1.0, 0.0), "storage": "int8"},
    "threshold": {"delta": 0.0, "residual_samples": 5},
    "everything": {"delta": 0.0, "max_clusters": 4, "storage": "int8", "residual_samples": 5},
}


def four_tokens(dtype: str = "float64") -> list[np.ndarray]:
    """Queries, keys and values of 16 tokens of two streams, each of four distinct ones four times."""
    rng = np.random.default_rng(SEED)
    turn = np.arange(TOKENS) % 4
    queries = rng.normal(size=(2, TOKENS, 4))
    keys, values = rng.normal(size=(2, 2, 4, 4))[:, :, turn]
    return [x.astype(dtype) for x in (queries, keys, values)]


def make(kind: str, seed: int = 0) -> AttentionSketch:
    if kind == "paper":
        return AttentionSketch.paper(delta=0.0, samples_per_cluster=3, value_samples=20, scale=None, seed=seed)
    return AttentionSketch(window=4, sink=1, seed=seed, **KINDS[kind])


def sketched(kind: str, x: list[Any]) -> AttentionSketch:
    sketch = make(kind)
    sketch.update(x[1], x[2], queries=x[0])
    return sketch


def expected(kind: str, x: list[np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Answers and logsumexps over n tokens, written out: of four clusters of equal tokens, or one of all."""
    q, k, v = x
    if kind not in ("default", "int8"):
        logits = q @ k.swapaxes(1, 2) / 2.0
        return attention(q, k, v), np.log(np.exp(logits).sum(axis=-1)) + np.log(n / TOKENS)
    # One cluster: a band for each coordinate of the keys, and half the variance of a query's logits.
    half = 0.5 * ((q / 2.0) ** 2 @ k.var(axis=1)[:, :, None])[..., 0]
    logits = (q / 2.0 @ k.mean(axis=1)[:, :, None])[..., 0]
    return np.broadcast_to(v.mean(axis=1, keepdims=True), v.shape), logits + np.log(n) + np.minimum(half, np.log(n))


def doubled(sketch: AttentionSketch, times: int) -> AttentionSketch:
    """Merge a sketch with itself, and the result with itself."""
    for _ in range(times):
        sketch = merge(sketch, sketch)
    return sketch


def check_counts(sketch: AttentionSketch) -> None:
    """Members of clusters and exact tokens are all tokens, in whole numbers."""
    state: Any = sketch.state
    paper = hasattr(state, "reservoir")
    counts = to_numpy(state.clusters.counts)
    assert counts.dtype == np.int64
    absorbed = sketch.n_seen - (0 if paper else state.exact.n)
    assert [sum(row) for row in counts.tolist()] == [absorbed] * 2


@pytest.mark.parametrize("kind", [*KINDS, "paper"])
def test_a_stream_doubled_to_the_end_is_remembered(kind: str, tmp_path: Path) -> None:
    x = four_tokens()
    q, k, v = x
    # Codes of 8 bits: a unit of 1/127 of keys, values and logits of order 1. Else the five exact tokens of 2^31.
    tolerance = 0.03 if KINDS.get(kind, {}).get("storage") else 1e-8
    sketch, path = sketched(kind, x), tmp_path / "sketch.safetensors"
    for times in range(1, 58):
        sketch = merge(sketch, sketch)
        if times not in (27, 28, 36, 57):
            continue
        assert sketch.n_seen == TOKENS << times
        check_counts(sketch)
        outputs, logsumexp = sketch.attend(q, return_logsumexp=True)
        answers, masses = expected(kind, x, sketch.n_seen)
        np.testing.assert_allclose(logsumexp, masses, atol=tolerance)
        if kind == "paper":  # the numerator of which is estimated from a sample
            assert np.isfinite(outputs).all()
        else:
            np.testing.assert_allclose(outputs, answers, atol=tolerance)
        if kind == "threshold":
            corrected, error = sketch.attend(q, return_error=True)
            np.testing.assert_allclose(corrected, answers, atol=tolerance)
            np.testing.assert_allclose(error, 0.0, atol=1e-6)
        # What is saved is loaded, and both go on alike.
        sketch.save(path)
        loaded, other = subgen.load(path), merge(sketch, make(kind))
        for one in (loaded, other):
            one.update(k[:, :6], v[:, :6], queries=q[:, :6])
            assert np.isfinite(one.step(q, k, v)).all()
            check_counts(one)
            assert one.n_seen == (TOKENS << times) + 6 + TOKENS
        np.testing.assert_array_equal(loaded.attend(q), other.attend(q))
        if kind != "paper":
            assert_same(loaded.state, other.state)


@pytest.mark.parametrize("kind", ["default", "threshold", "paper"])
def test_more_tokens_than_are_counted_are_refused_in_words(kind: str) -> None:
    x = [part[:, :1] for part in four_tokens()]
    sketch = doubled(sketched(kind, x), 8)
    long = lengthened(sketch, MOST_TOKENS - 3)
    check_counts(long)
    before = long.state
    for first, second in ((long, sketch), (sketch, long), (long, long)):
        with pytest.raises(OverflowError, match=r"2\*\*62 - 1 tokens, got [\d,]+ and [\d,]+ more.*logsumexp"):
            merge(first, second)
    four = [np.repeat(part, 4, axis=1) for part in x]
    with pytest.raises(OverflowError, match="got 4,611,686,018,427,387,900 and 4 more; nothing was changed"):
        long.update(four[1], four[2], queries=four[0])
    with pytest.raises(OverflowError, match="nothing was changed"):
        long.step(*four)
    assert long.state is before
    long.update(four[1][:, :3], four[2][:, :3], queries=four[0][:, :3])
    assert long.n_seen == MOST_TOKENS
    check_counts(long)
    np.testing.assert_allclose(long.attend(x[0], return_logsumexp=True)[1], (x[0] * x[1]).sum(-1) / 2 + np.log(2.0**62))


def lengthened(sketch: AttentionSketch, n: int) -> AttentionSketch:
    """Return a sketch of so many tokens, all in the one cluster, but for those that are exact."""
    state: Any = sketch.state
    if hasattr(state, "reservoir"):
        counts = np.where(state.clusters.counts > 0, n, 0)
        reservoir = replace(state.reservoir, weight=state.reservoir.weight / sketch.n_seen * n)
        reservoir = replace(reservoir, due=2.0 * reservoir.weight[:, None] + 0.0 * reservoir.due)
        clusters = replace(
            state.clusters, counts=counts, due=np.where(counts[..., None] > 0, 2**62, 1 + 0 * state.clusters.due)
        )
        return sketch.continued(sketch.layout, replace(state, clusters=clusters, reservoir=reservoir, n_seen=n))
    counts = np.where(state.clusters.counts > 0, n - state.exact.n, 0)
    residual = state.residual
    if residual is not None:
        residual = replace(residual, due=np.full_like(residual.due, 2**62))
    return sketch.continued(
        sketch.layout, replace(state, clusters=replace(state.clusters, counts=counts), n_seen=n, residual=residual)
    )


@pytest.mark.parametrize("times", [24, 31, 32, 33, 53, 59])
def test_counts_are_exact_where_floats_are_not(times: int) -> None:
    """One key with 2^times tokens and one with three: told apart to the token. The last two are in the window."""
    key = np.asarray([[[1.0, 0.0, 0.0, 0.0]]])
    many, few = (AttentionSketch(delta=0.0, window=2, sink=0) for _ in range(2))
    many.update(key, key)
    few.update(np.repeat(-key, 3, axis=1), np.repeat(-key, 3, axis=1))
    both = merge(doubled(many, times), few)
    for sketch, expected in ((both, [1, 2**times]), (merge(both, both), [4, 2 * 2**times])):
        counts = sketch.state.clusters.counts[0]
        assert sorted(counts[counts > 0].tolist()) == expected


@functools.cache
def long_sketch(kind: str) -> AttentionSketch:
    """Of NumPy, in float32, and of 2^44 tokens."""
    return doubled(sketched(kind, four_tokens("float32")), 40)


@pytest.mark.parametrize("kind", KINDS)
def test_every_library_goes_on_with_a_long_stream(library: Library, kind: str, tmp_path: Path) -> None:
    """Sketches of NumPy, loaded by another library: it answers, absorbs half a window and merges as NumPy does."""
    if library.compiles and kind != "default":
        pytest.skip(f"{library.name} compiles for every shape")
    x, path = four_tokens("float32"), tmp_path / "sketch.safetensors"
    long_sketch(kind).save(path)
    found = []
    for one in (LIBRARIES["numpy"], library):
        q, k, v = (one.array(part) for part in x)
        sketch = subgen.load(path, like=q)
        if not library.compiles:
            sketch.update(k[:, :4, :], v[:, :4, :], queries=q[:, :4, :])
            sketch = merge(sketch, sketch)
        check_counts(sketch)
        found.append((sketch, to_numpy(sketch.attend(q))))
        sketch.save(path.with_name("again.safetensors"))
        again = subgen.load(path.with_name("again.safetensors"), like=q)
        np.testing.assert_array_equal(to_numpy(again.attend(q)), found[-1][1])
    # Float32 in another order; a code of 8 bits may round to its neighbour.
    np.testing.assert_allclose(found[1][1], found[0][1], atol=0.03 if "storage" in KINDS[kind] else 2e-5)
    mine, theirs = (arrays(sketch.state)["clusters.counts"] for sketch, _ in found)
    np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_importance_stays_finite(dtype: str, tmp_path: Path) -> None:
    """It adds up in every merge; float16 ends at 65504, and a file with an infinite one is refused."""
    rng = np.random.default_rng(SEED)
    q, k, v = rng.normal(size=(3, 1, 30, 4)).astype(dtype)
    sketch = AttentionSketch(3, window=4, sink=0)
    sketch.update(k, v, queries=q)
    sketch = doubled(sketch, 45)
    importance = sketch.state.clusters.importance
    assert np.isfinite(importance).all()
    assert (importance.max() == 65504.0) == (dtype == "float16")
    sketch.update(k, v, queries=q)
    assert np.isfinite(sketch.attend(q)).all()
    sketch.save(tmp_path / "sketch.safetensors")
    np.testing.assert_array_equal(subgen.load(tmp_path / "sketch.safetensors").attend(q), sketch.attend(q))


# Counts and moments of reservoirs.

LONG = (0, 1, 2, 3, 2**20, 2**31, 2**32 + 1, 2**37 - 1, 2**37, 2**38, 2**45 + 7, 2**61 + 1, MOST_TOKENS)


def some_draws() -> np.ndarray:
    rng = np.random.default_rng(SEED)
    return np.concatenate([[1, 3, 2**25 - 1], 2 * rng.integers(0, 2**24, 200) + 1])


def test_the_next_moment_is_exact_in_every_library(library: Library) -> None:
    drawn = some_draws()
    for n in LONG:
        got = to_numpy(next_count(library.array(np.full(drawn.shape, n)), library.array(drawn))).tolist()
        exact = [(n << DRAW_BITS) // r + 1 for r in drawn.tolist()]
        # Beyond the longest stream one number is as good as another.
        assert [min(x, MOST_TOKENS + 1) for x in got] == [min(x, MOST_TOKENS + 1) for x in exact]
        assert n < min(got)
        assert max(got) <= last_count(n) < 2**63


def test_the_place_that_is_drawn_is_exact_in_every_library(library: Library) -> None:
    drawn = some_draws()
    for n in LONG:
        got = to_numpy(drawn_places(library.array(np.full(drawn.shape, n)), library.array(drawn))).tolist()
        assert got == [(n * r) >> DRAW_BITS for r in drawn.tolist()]
        assert max(got) < max(n, 1)


def test_draws_of_numbers_beyond_32_bits_are_new(library: Library) -> None:
    """The upper word of a number goes into the key; without it, draws would repeat after 2^32 tokens."""
    key = [library.array(x[:, None]) for x in stream_key(3, 7, np.arange(3))]
    slots = np.arange(4)[None, :]
    for number in (99, 2**40 + 99):
        got = draws((key[0], key[1]), library.array(slots), library.array(np.full((1, 1), number)))
        expected = [[reference.draw(3, 7, head, slot, number) for slot in range(4)] for head in range(3)]
        np.testing.assert_array_equal(to_numpy(got), expected)
    assert reference.draw(3, 7, 0, 0, 99) != reference.draw(3, 7, 0, 0, 2**40 + 99)


def test_dithers_of_numbers_beyond_32_bits_are_new() -> None:
    numbers = range(99, MOST_TOKENS, 2**58)
    drawn = [draw_dithers(1, [number])[0] for number in numbers]
    assert draw_dithers(1, numbers) == drawn
    assert len({one.keys.drawn for one in drawn}) == len(drawn) == 16


@pytest.mark.parametrize("length", [8, 2**32, 3 * 2**40])
def test_slots_choose_among_shards_of_any_length(length: int) -> None:
    """Of four shards alike in length, a slot holds a token of each with probability 1/4.

    From 2^32 on, lengths of merged streams differ by multiples of that. Chi-square with 3 degrees of freedom, beyond
    the bound with probability below 1e-6; seeds are fixed besides.
    """
    slots = 2000
    shards = []
    for rank in range(4):
        token = np.asarray([[[0.01 * rank, 1.0]]])
        sketch = AttentionSketch.paper(delta=1.0, samples_per_cluster=slots, value_samples=slots, seed=rank)
        sketch.update(token, np.asarray([[[1.0]]]))
        shards.append(lengthened(sketch, length))
    whole = merge(merge(*shards[:2]), merge(*shards[2:]))
    assert whole.n_seen == 4 * length
    state: Any = whole.state
    for held in (state.clusters.samples[0, 0, :, 0], state.reservoir.keys[0, :, 0]):
        found = np.bincount(np.rint(held * 100).astype(int), minlength=4)
        assert found.sum() == slots
        assert ((found - slots / 4) ** 2 / (slots / 4)).sum() < below(3)
