"""`subgen.merge`: the sketch of one stream after another, from sketches of the parts.

Chi-square tests are held to a bound that a right program exceeds with probability below 1e-6 each; seeds are fixed
besides.
"""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import NUMPY, Library, skip_compiling, to_numpy
from sketches import PAPER, VARIANTS, arrays, assert_same, below, feed, stream

import subgen
import subgen.default.shards as default_shards
import subgen.paper.shards as paper_shards
from subgen import AttentionSketch, _random, attention, merge
from subgen._random import DRAW_BITS
from subgen.default.state import Quantized
from subgen.evaluation.stream import relative_error
from subgen.io.captures import sample

KINDS = ["default", "paper", *VARIANTS]


def make(kind: str, seed: int = 0, **more: Any) -> AttentionSketch:
    if kind == "paper":
        return AttentionSketch.paper(**{**PAPER, **more}, seed=seed)
    chosen = {"max_clusters": 9} if kind == "default" else VARIANTS[kind]
    return AttentionSketch(**{"window": 8, "sink": 2, **chosen, **more}, seed=seed)


def shards(
    sizes: Sequence[int], q: Any, k: Any, v: Any, new: Callable[[int], AttentionSketch]
) -> list[AttentionSketch]:
    """Sketch consecutive parts of a stream, each by a sketch of its own."""
    made, start = [], 0
    for rank, size in enumerate(sizes):
        sketch, part = new(rank), slice(start, start + size)
        if size:
            sketch.update(k[..., part, :], v[..., part, :], queries=None if q is None else q[..., part, :])
        made.append(sketch)
        start += size
    return made


def tree(sketches: Sequence[AttentionSketch]) -> AttentionSketch:
    """Merge in pairs, and the results in pairs."""
    while len(sketches) > 1:
        pairs = [sketches[i : i + 2] for i in range(0, len(sketches), 2)]
        sketches = [merge(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return sketches[0]


def fold(sketches: Sequence[AttentionSketch]) -> AttentionSketch:
    return functools.reduce(merge, sketches)


def everything(state: Any) -> bytes:
    """All of a state to the last bit, room included."""
    return pickle.dumps(state)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**32),
    sizes=st.lists(st.integers(1, 90), min_size=2, max_size=4),
    window=st.integers(2, 12),
    sink=st.integers(0, 5),
    by_tree=st.booleans(),
)
def test_nothing_is_lost_within_the_budget(
    kind: str, seed: int, sizes: list[int], window: int, sink: int, by_tree: bool
) -> None:
    n = sum(sizes)
    q, k, v = (x.astype(np.float64) for x in stream(seed, (2,), n, group=2))
    more = {} if kind == "paper" else {"window": window, "sink": sink}
    if kind == "bytes":
        more["max_bytes"] = 16000
    parts = shards(sizes, q, k, v, lambda rank: make(kind, seed + rank, **more))
    before = [everything(part.state) for part in parts]
    merged = (tree if by_tree else fold)(parts)
    assert [everything(part.state) for part in parts] == before  # the shards are as they were
    assert everything(merged.state) == everything((tree if by_tree else fold)(parts).state)  # the same every time
    assert merged.n_seen == n
    state = merged.state
    if kind == "paper":
        np.testing.assert_array_equal(state.clusters.counts.sum(axis=-1), [n, n])
        np.testing.assert_allclose(state.reservoir.weight, (v**2).sum(axis=(1, 2)), rtol=1e-12)
        distances = np.linalg.norm(state.clusters.centres[:, :, None] - state.clusters.centres[:, None], axis=-1)
        live = state.clusters.counts > 0
        apart = live[:, :, None] & live[:, None] & ~np.eye(live.shape[1], dtype=bool)
        assert (distances[apart] > PAPER["delta"]).all()
        assert (state.clusters.due[live] > state.clusters.counts[live][:, None]).all()
        assert (state.reservoir.due > state.reservoir.weight[:, None]).all()
        return
    assert kind != "bytes" or merged.nbytes <= 16000
    budget = merged.method.budget
    if budget is not None:
        assert merged.n_clusters.max() <= budget.clusters(n, merged.method.footprint(k, v))
    clusters, n_exact = state.clusters, state.exact.n
    np.testing.assert_array_equal(clusters.counts.sum(axis=-1), np.full(2, n - n_exact))
    # The first tokens and the last are exact.
    exact = state.exact.keys[:, :n_exact]
    recent = n_exact - sink
    np.testing.assert_array_equal(exact[:, :sink], k[:, : min(sink, n_exact)])
    if recent > 0:
        np.testing.assert_array_equal(exact[:, sink:], k[:, n - recent :])
    if not isinstance(clusters.keys, Quantized):
        absorbed = slice(sink, n - recent)
        for held, given_ in ((clusters.keys, k), (clusters.values, v)):
            total = (clusters.counts[..., None] * held).sum(axis=1)
            np.testing.assert_allclose(total, given_[:, absorbed].sum(axis=1), rtol=1e-9, atol=1e-8)
        # Variance within clusters and between them is the variance of all.
        within = (clusters.counts * clusters.key_variance.mean(axis=-1) * k.shape[-1]).sum(axis=-1)
        tokens = k[:, absorbed]
        centre = tokens.mean(axis=1, keepdims=True) if tokens.size else 0.0
        between = (clusters.counts * ((clusters.keys - centre) ** 2).sum(axis=-1)).sum(axis=-1)
        np.testing.assert_allclose(within + between, ((tokens - centre) ** 2).sum(axis=(1, 2)), rtol=1e-8, atol=1e-8)
    if state.residual is not None and n > n_exact:
        # Every slot holds a token that was absorbed, and its cluster is the nearest or has it among others.
        for row in range(2):
            found = (state.residual.keys[row][:, None] == k[row, sink : n - recent][None]).all(axis=-1)
            assert found.any(axis=1).all()
            assert (clusters.counts[row][state.residual.cluster[row]] > 0).all()
        assert (state.residual.due > n - n_exact).all()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    first=st.integers(1, 100),
    second=st.integers(1, 14),
    window=st.integers(2, 10),
    sink=st.sampled_from([0, 4]),
    kind=st.sampled_from(["default", "int8", "corrected", "everything"]),
    with_queries=st.booleans(),
)
def test_a_stream_that_is_all_exact_is_appended_bit_for_bit(
    seed: int, first: int, second: int, window: int, sink: int, kind: str, with_queries: bool
) -> None:
    """Without queries, or with one query head for each key-value head."""
    second = min(second, sink + window)
    q, k, v = stream(seed, (2,), first + second + 30)
    one = make(kind, 1, window=window, sink=sink)
    parts = shards(
        (first, second),
        q if with_queries else None,
        k,
        v,
        lambda rank: make(kind, 1 + rank, **{"window": window, "sink": sink}),
    )
    merged = merge(*parts)
    for part in (slice(0, first + second), slice(first + second, None)):
        one.update(k[:, part], v[:, part], queries=q[:, part] if with_queries else None)
        if part.start:
            merged.update(k[:, part], v[:, part], queries=q[:, part] if with_queries else None)
        assert_same(merged.state, one.state)


def test_queries_of_an_exact_stream_are_kept() -> None:
    q, k, v = stream(0, (2,), 30)
    whole, merged = make("default"), merge(*shards((22, 8), q, k, v, lambda rank: make("default")))
    whole.update(k, v, queries=q)
    got, expected = merged.state.exact, whole.state.exact
    assert (expected.queries.scales[:, : expected.n] > 0).all()
    # Those of the sinks of the second too, which are tokens of the window now.
    np.testing.assert_array_equal(got.queries.scales, expected.queries.scales)
    np.testing.assert_array_equal(got.queries.codes, expected.queries.codes)
    np.testing.assert_array_equal(got.keys, expected.keys)


@pytest.mark.parametrize("kind", ["default", "threshold with a cap", "everything", "corrected", "paper"])
def test_every_library_gives_the_same(library: Library, kind: str) -> None:
    if kind not in ("default", "paper"):
        skip_compiling(library)
    sizes = (16, 8) if library.compiles and kind == "paper" else (40, 32)
    q, k, v = stream(1, (2,), sum(sizes))

    def merged(of: Library) -> AttentionSketch:
        parts = shards(sizes, *(of.array(x) for x in (q, k, v)), lambda rank: make(kind, rank))
        return merge(*parts)

    mine, reference = merged(library), merged(NUMPY)
    assert mine.nbytes == reference.nbytes
    np.testing.assert_array_equal(to_numpy(mine.n_clusters), reference.n_clusters)
    if kind == "paper":
        for name in ("counts", "samples", "due", "centres"):
            got, expected = (getattr(x.state.clusters, name) for x in (mine, reference))
            np.testing.assert_array_equal(to_numpy(got), expected, err_msg=name)
        np.testing.assert_array_equal(to_numpy(mine.state.reservoir.keys), reference.state.reservoir.keys)
        return
    got, expected = arrays(mine.state), arrays(reference.state)
    for name in expected:
        # Sums of float32 in another order; a code of int8 may then round to its neighbour.
        tolerance = 1.0 if "codes" in name else 1e-4
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(70, 50), (70, 5), (1, 70), (5, 3)])
def test_a_merged_sketch_goes_on(kind: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    n = sum(sizes)
    q, k, v = (x.astype(np.float16) for x in stream(3, (3, 2), n + 60, group=2))
    parts = shards(sizes, q, k, v, lambda rank: make(kind, rank))
    merged = merge(*parts)
    assert merged.method.seed == 0
    merged.save(tmp_path / "sketch.safetensors")
    loaded = subgen.load(tmp_path / "sketch.safetensors")
    np.testing.assert_array_equal(loaded.attend(q), merged.attend(q))
    before = everything(merged.state)
    third = make(kind, 2)
    feed(third, *(x[..., n : n + 30, :] for x in (k, v, q)))
    thrice = [merge(one, third) for one in (merged, loaded)]
    assert everything(merged.state) == before
    for one in (merged, loaded):
        feed(one, *(x[..., n : n + 30, :] for x in (k, v, q)))
    for one in (merged, loaded, *thrice):
        out = one.step(*(x[..., n + 30 :, :] for x in (q, k, v)))
        assert np.isfinite(out.astype(float)).all()
        assert one.n_seen == n + 60
    np.testing.assert_array_equal(merged.attend(q), loaded.attend(q))
    np.testing.assert_array_equal(thrice[0].attend(q), thrice[1].attend(q))
    # The shards go on as if nothing had been made of them.
    alone = shards(sizes, q, k, v, lambda rank: make(kind, rank))
    for one, other in zip(parts, alone, strict=True):
        for each in (one, other):
            feed(each, *(x[..., n:, :] for x in (k, v, q)))
        np.testing.assert_array_equal(one.attend(q), other.attend(q))
    assert merged.take([2, 0]).n_clusters.shape == (2, 2)


@pytest.mark.parametrize("kind", ["default", "paper", "everything"])
def test_empty_sketches_are_skipped(kind: str) -> None:
    q, k, v = stream(4, (2,), 50)
    full = make(kind, 5)
    full.update(k, v, queries=q)
    for sketches in ((full, make(kind, 6)), (make(kind, 7), full), (make(kind, 7), make(kind, 8), full, make(kind, 9))):
        merged = merge(*sketches)
        np.testing.assert_array_equal(merged.attend(q), full.attend(q))
        assert merged.method.seed == sketches[0].method.seed
        merged.update(k, v, queries=q)
        assert (full.n_seen, merged.n_seen) == (50, 100)
    assert merge(make(kind), make(kind)).n_seen == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_a_batch_equals_the_row_alone(kind: str) -> None:
    more = {"max_bytes": 12000} if kind == "bytes" else {}
    q, k, v = stream(5, (3, 2), 90, group=2)
    batch = merge(*shards((50, 40), q, k, v, lambda rank: make(kind, rank, **more)))
    more = {"max_bytes": 4000} if kind == "bytes" else {}
    for row in range(3):
        alone = merge(*shards((50, 40), q[row], k[row], v[row], lambda rank: make(kind, rank, **more)))
        np.testing.assert_array_equal(batch.n_clusters[row], alone.n_clusters)
        # The padding of threshold mode and of the paper's clusters is that of the batch, and sums differ by it.
        np.testing.assert_allclose(batch.attend(q)[row], alone.attend(q[row]), rtol=1e-4, atol=1e-5)


def test_clusters_join_by_their_leaders_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small integers, so that sums are exact in any order."""
    rng = np.random.default_rng(6)
    k = rng.integers(-8, 9, size=(2, 400, 4)).astype(np.float64)
    for kind in ("threshold", "paper"):
        parts = shards((200, 200), None, k, k, lambda rank, kind=kind: make(kind, rank, delta=4.0))
        whole = merge(*parts)
        monkeypatch.setattr(paper_shards, "_BLOCK", 7)
        monkeypatch.setattr(default_shards, "_AT_ONCE", 1)
        again = merge(*parts)
        monkeypatch.undo()
        if kind == "paper":
            assert everything(again.state) == everything(whole.state)
        else:
            np.testing.assert_array_equal(again.state.clusters.counts, whole.state.clusters.counts)
            np.testing.assert_allclose(again.state.clusters.keys, whole.state.clusters.keys, rtol=1e-12, atol=1e-12)
            leaders = whole.state.clusters.leaders[0, : int(whole.n_clusters[0])]
            distances = np.linalg.norm(leaders[:, None] - leaders[None], axis=-1)
            assert (distances[~np.eye(len(leaders), dtype=bool)] > 4.0).all()
        assert int(whole.n_clusters.max()) > 14


class TestSamples:
    """Slots hold what they should, whatever the seeds of the shards and the order of merging."""

    sizes = (13, 4, 9, 14)

    def held(self, how: Callable[..., AttentionSketch], seeds: Sequence[int], further: int = 0) -> tuple[Any, Any]:
        """Which token each slot holds, by head and slot: keys tell positions; squared norms of values rise by one."""
        heads, n = 1500, sum(self.sizes)
        k = np.broadcast_to(np.arange(n)[:, None] * 1e-3, (heads, n, 1))
        v = np.broadcast_to(np.sqrt(np.arange(n, dtype=np.float64))[:, None], (heads, n, 1))
        sizes = self.sizes if not further else (*self.sizes[:-1], self.sizes[-1] - further)
        parts = shards(
            sizes,
            None,
            k,
            v,
            lambda rank: AttentionSketch.paper(
                delta=1.0, samples_per_cluster=3, value_samples=3, seed=seeds[rank], check_finite=False
            ),
        )
        merged = how(parts)
        if further:
            merged.update(k[:, n - further :], v[:, n - further :])
        state = merged.state
        assert merged.n_clusters.max() == 1
        return (
            np.rint(state.clusters.samples[:, 0, :, 0] * 1e3).astype(int),
            np.rint(state.reservoir.keys[..., 0] * 1e3).astype(int),
        )

    @pytest.mark.parametrize("how", [fold, tree])
    @pytest.mark.parametrize("seeds", [(1, 2, 3, 4), (5, 5, 5, 5)])
    @pytest.mark.parametrize("further", [0, 6])
    def test_slots_are_uniform_or_by_norm_over_both_streams(self, how: Any, seeds: Any, further: int) -> None:
        n = sum(self.sizes)
        for held, weights in zip(self.held(how, seeds, further), (np.ones(n), np.arange(n)), strict=True):
            share = weights / weights.sum()
            counts = np.bincount(held.ravel(), minlength=n)
            assert counts[share == 0].sum() == 0
            some = share > 0
            expected = share[some] * held.size
            assert ((counts[some] - expected) ** 2 / expected).sum() < below(n - 1)
            # Slots are independent: two agree as often as two draws would, and so do their halves of the stream.
            agree = (share**2).sum()
            deviation = math.sqrt(agree / len(held))
            for i, j in ((0, 1), (0, 2), (1, 2)):
                assert abs(np.mean(held[:, i] == held[:, j]) - agree) < 5 * deviation
                assert abs(np.corrcoef(held[:, i], held[:, j])[0, 1]) < 5 / math.sqrt(len(held))
            # So are heads.
            assert abs(np.mean(held[::2, 0] == held[1::2, 0]) - agree) < 5 * math.sqrt(2) * deviation

    def test_merging_is_associative_in_distribution(self) -> None:
        """Both orders, and one pass, by chi-square of homogeneity."""
        orders: list[Callable[..., AttentionSketch]] = [
            lambda x: merge(merge(x[0], x[1]), merge(x[2], x[3])),
            lambda x: merge(x[0], merge(x[1], merge(x[2], x[3]))),
            lambda x: merge(merge(merge(x[0], x[1]), x[2]), x[3]),
        ]
        n = sum(self.sizes)
        # Seeds of their own for each order: equal seeds would make the three alike, not independent.
        found = [self.held(order, [10 * i + j for j in range(4)]) for i, order in enumerate(orders)]
        for kind in range(2):
            counts = np.stack([np.bincount(one[kind].ravel(), minlength=n) for one in found])
            counts = counts[:, counts.sum(axis=0) > 0]
            expected = counts.sum(axis=0) / 3
            assert ((counts - expected) ** 2 / expected).sum() < below(2 * (counts.shape[1] - 1))

    @pytest.mark.parametrize("kind", ["paper", "corrected"])
    def test_merging_is_associative_given_equal_draws(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every slot chooses one token of the whole stream; each merge is given the draw that says this token."""
        sizes, clusters, t = (30, 24, 36), 3, 3
        n = sum(sizes)
        k = np.arange(n)[:, None] % clusters * 10.0 + np.arange(n)[:, None] * 1e-3 + np.zeros((2, n, 2))
        v = np.concatenate([np.ones((2, n, 1)), np.zeros((2, n, 1))], axis=-1)
        new = {"seed": 3} if kind == "paper" else {"seed": 3, "sink": 0}
        a, b, c = shards(sizes, None, k, v, lambda rank: make(kind, **{**new, "seed": rank}))
        chosen = np.random.default_rng(0).integers(0, n - 8, size=60)
        chosen_member = np.random.default_rng(1).integers(0, n // clusters, size=clusters * t)
        start = 0

        def draws(key: Any, slots: Any, numbers: Any) -> Any:
            if numbers.ndim == 3:  # slots of clusters, whose members are a third of the tokens each
                live = slots < clusters * t
                place = np.where(live, chosen_member[np.where(live, slots, 0)], 0) - start // clusters
            else:
                place = chosen[slots] - start
            here = (place >= 0) & (place < numbers)
            drawn = ((place + 0.5) / np.where(numbers > 0, numbers, 1) * 2.0**DRAW_BITS).astype(np.int64) | 1
            return np.broadcast_to(np.where(here, drawn, 1), np.broadcast_shapes(here.shape, key[0].shape))

        monkeypatch.setattr(_random, "draws", draws)
        ab = merge(a, b)
        left = merge(ab, c)
        start = sizes[0]
        bc = merge(b, c)
        start = 0
        right = merge(a, bc)
        if kind == "paper":
            assert everything(left.state) == everything(right.state)
            token = np.rint((left.state.reservoir.keys[0, :, 0] % 10) * 1e3).astype(int)
            np.testing.assert_array_equal(token[chosen[:7] >= 30 + 24] >= 54, True)
            return
        for name in ("keys", "values", "due"):
            got, expected = (getattr(one.state.residual, name) for one in (left, right))
            np.testing.assert_array_equal(got, expected, err_msg=name)

    def test_the_estimate_is_unbiased_and_varies_as_that_of_one_pass(self) -> None:
        """As in `test_moments`: one stream over thousands of heads, means within six deviations."""
        heads, t, s = 2000, 3, 5
        rng = np.random.default_rng(0)
        k = (np.asarray([[0.0, 0, 0], [4, 0, 0]])[np.arange(80) % 2] + rng.uniform(-0.2, 0.2, (80, 3)))[None]
        v = rng.normal(size=(1, 80, 2)) * rng.gamma(2.0, size=(1, 80, 1))
        k, v = (np.repeat(x, heads, axis=0) for x in (k, v))
        query = np.asarray([1.0, -0.7, 0.4])
        parts = shards(
            (31, 20, 29),
            None,
            k,
            v,
            lambda rank: AttentionSketch.paper(delta=1.0, samples_per_cluster=t, value_samples=s, seed=rank),
        )
        state = merge(*parts).state
        mass = np.exp(k[0] @ query)
        tau = (state.clusters.counts[..., None] / t * np.exp(state.clusters.samples @ query)).sum(axis=(1, 2))
        weights = state.reservoir.weight[:, None] / (s * (state.reservoir.values**2).sum(axis=-1))
        z = ((weights * np.exp(state.reservoir.keys @ query))[..., None] * state.reservoir.values).sum(axis=1)
        variance = sum(40**2 / t * mass[c::2].var() for c in range(2))
        assert abs(tau.mean() - mass.sum()) < 6 * math.sqrt(variance / heads)
        fourth = np.mean((tau - tau.mean()) ** 4)
        assert abs(tau.var(ddof=1) - variance) < 6 * math.sqrt((fourth - variance**2) / heads)
        numerator = mass @ v[0]
        assert (np.abs(z.mean(axis=0) - numerator) < 6 * z.std(axis=0) / math.sqrt(heads)).all()

    @pytest.mark.parametrize("how", [fold, tree])
    @pytest.mark.parametrize("seeds", [(1, 2, 3, 4), (5, 5, 5, 5)])
    def test_the_residual_sample_is_uniform(self, how: Any, seeds: Any) -> None:
        sizes, slots, heads = (30, 21, 40, 35), 40, 100
        n = sum(sizes)
        k = np.broadcast_to(np.arange(n, dtype=np.float64)[:, None], (heads, n, 4))
        parts = shards(sizes, None, k, k, lambda rank: make("corrected", seeds[rank], sink=3, residual_samples=slots))
        merged = how(parts)
        for _ in range(2):
            state = merged.state
            exact = state.exact.n - 3
            held = np.rint(state.residual.keys[..., 0]).astype(int) - 3
            counts = np.bincount(held.ravel(), minlength=merged.n_seen - state.exact.n)
            assert counts.shape == (merged.n_seen - 3 - exact,)
            assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < below(len(counts) - 1)
            agree = 1 / len(counts)
            assert abs(np.mean(held[:, ::2] == held[:, 1::2]) - agree) < 5 * math.sqrt(agree / (heads * slots / 2))
            merged.update(k[:, :25] + n, k[:, :25])  # and stays so

    def test_the_corrected_answer_of_merged_shards_is_unbiased(self) -> None:
        """400 heads with the same tokens, means within five deviations; see `test_residual`."""
        q, k, v = (np.repeat(x, 400, axis=0).astype(np.float64) for x in stream(7, (1,), 180))
        parts = shards((80, 50, 50), q, k, v, lambda rank: make("corrected", rank, residual_samples=24))
        asked = q[:, :2]
        exact, mass = attention(asked, k, v), np.exp(asked @ k.swapaxes(-1, -2) / 2.0).sum(axis=-1)
        output, _, lse = merge(*parts).attend(asked, return_error=True, return_logsumexp=True)
        share = np.exp(lse) / mass
        for drawn, truth in ((share, np.ones(2)), (output * share[..., None], exact[0])):
            deviation = drawn.std(axis=0, ddof=1) / 20
            assert (np.abs(drawn.mean(axis=0) - truth) < 5 * deviation + 1e-6).all()


@pytest.mark.parametrize("storage", ["input", "int8"])
@pytest.mark.parametrize("how", [fold, tree])
def test_sixteen_shards_answer_as_well_as_one_pass(how: Any, storage: Any) -> None:
    """On the shipped sample, at 10% and 25% of the pairs, over three lengths: at most 1.1 times the error."""
    capture = sample()
    q, k, v = (x.astype(np.float32) for x in (capture.q, capture.k, capture.v))
    for share in (0.1, 0.25):
        errors = np.zeros(2)
        for n in (1125, 925, 725):
            budget = round(share * n)
            later = slice(n, n + n * 4 // 15, 20)
            exact = attention(q[:, later], k[:, :n], v[:, :n])

            def new(rank: int, clusters: int = budget - 4 - 24) -> AttentionSketch:
                return AttentionSketch(clusters, window=24, sink=4, storage=storage, seed=rank)

            sizes = [len(part) for part in np.array_split(np.arange(n), 16)]
            sketches = (*shards([n], q[:, :n], k[:, :n], v[:, :n], new), how(shards(sizes, q, k, v, new)))
            assert sketches[0].nbytes == sketches[1].nbytes
            errors += [relative_error(one.attend(q[:, later]), exact).mean() for one in sketches]
        assert errors[1] <= 1.1 * errors[0]


class TestErrors:
    """What was given, what was expected, what to do; and nothing is changed."""

    q, k, v = stream(9, (2,), 30)

    def filled(self, sketch: AttentionSketch, k: Any = None, v: Any = None) -> AttentionSketch:
        sketch.update(self.k if k is None else k, self.v if v is None else v)
        return sketch

    @pytest.mark.parametrize(
        ("other", "kind", "message"),
        [
            (None, TypeError, "merge takes sketches, got NoneType as argument 2"),
            ([AttentionSketch(9)], TypeError, r"got list as argument 2.*merge\(\*sketches\)"),
            (make("paper"), ValueError, "one kind merge: argument 1 is the default sketch, argument 2 the paper's"),
            (make("default", max_clusters=10), ValueError, "budget is .*9.* in argument 1 and .*10.* in argument 2"),
            (make("default", window=9), ValueError, "window is 8 in argument 1 and 9 in argument 2; sketch every"),
            (make("default", sink=3), ValueError, "sink is 2"),
            (make("default", scale=0.5), ValueError, "scale is None in argument 1 and 0.5"),
            (make("int8"), ValueError, "storage is input in argument 1 and int8"),
            (make("corrected"), ValueError, "residual_samples is 0 in argument 1 and 12"),
            (make("default", delta=1.0), ValueError, "delta is None in argument 1 and 1.0"),
        ],
    )
    def test_other_sketches(self, other: Any, kind: type[Exception], message: str) -> None:
        first = self.filled(make("default"))
        for sketches in ((first, other), (first, make("default"), other), (make("default"), other)):
            with pytest.raises(kind, match=message.replace("argument 2", f"argument {len(sketches)}")):
                merge(*sketches)

    def test_other_samples(self) -> None:
        with pytest.raises(ValueError, match="samples_per_cluster is 3 in argument 1 and 4"):
            merge(make("paper"), make("paper", samples_per_cluster=4))
        with pytest.raises(ValueError, match="value_samples is 7 in argument 1 and 4"):
            merge(make("paper"), make("paper", value_samples=4))

    @pytest.mark.parametrize("kind", ["default", "paper"])
    def test_other_streams(self, kind: str) -> None:
        first = self.filled(make(kind))
        before = everything(first.state)
        for k, v, error, message in (
            (self.k[:1], self.v[:1], ValueError, r"keys \(2, 'n', 4\).*argument 2 has keys \(1, 'n', 4\)"),
            (self.k[..., :2], self.v, ValueError, r"argument 2 has keys \(2, 'n', 2\) and values \(2, 'n', 3\)"),
            (self.k, self.v[..., :2], ValueError, r"and values \(2, 'n', 2\); merge shards of one context"),
            (self.k.astype(float), self.v.astype(float), TypeError, "argument 2 has dtype float64.*cast one of them"),
        ):
            with pytest.raises(error, match=message):
                merge(first, self.filled(make(kind), k, v))
            with pytest.raises(error):
                merge(make(kind), first, self.filled(make(kind), k, v))
        assert everything(first.state) == before

    def test_another_library_and_device(self) -> None:
        strict = pytest.importorskip("array_api_strict")
        first = self.filled(make("default"))
        second = self.filled(make("default"), *(strict.asarray(x) for x in (self.k, self.v)))
        with pytest.raises(TypeError, match="convert one of them"):
            merge(first, second)
        there = strict.Device("device1")
        third = self.filled(make("default"), *(strict.asarray(x, device=there) for x in (self.k, self.v)))
        with pytest.raises(TypeError, match="move one of them"):
            merge(second, third)

    def test_one_sketch_is_not_enough(self) -> None:
        with pytest.raises(TypeError):
            merge(make("default"))  # type: ignore[call-arg]
