"""Memory of a call beside its arguments, its result and the sketch: bounded, whatever the shapes."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from libraries import LIBRARIES, Library, skip_compiling
from numpy.typing import NDArray
from sketches import assert_same
from subgen_numpy import compiled, merging
from switches import using_backend, without_loops

import subgen
from subgen import _array
from subgen._tree import leaves, nbytes, tree_map
from subgen.backends import PORTABLE, Backend, get
from subgen.default.merging import bands, merge_closest
from subgen.default.state import Clusters
from subgen.evaluation.cover import k_center_radii
from subgen.leaders import assign_leaders

# Numbers of a temporary array in these tests, so that small shapes exceed it.
LIMIT = 1 << 13
# What docs/howto/numpy.md promises: so many temporary arrays at once; and what Python takes for small things.
ARRAYS, SMALL = 8, 1 << 17


@pytest.fixture
def limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_array, "TRANSIENT_NUMBERS", LIMIT)


@pytest.fixture(params=["loops", "no loops", "strict"])
def kind(request: pytest.FixtureRequest) -> Iterator[Library]:
    """The NumPy backend with and without compiled loops, and portable code over arrays that NumPy holds."""
    if request.param == "strict":
        yield LIBRARIES["strict"]
    elif request.param == "loops":
        if compiled("absorb") is None:
            pytest.skip("numba or SciPy is not installed")
        load_loops()
        yield LIBRARIES["numpy"]
    else:
        with without_loops():
            yield LIBRARIES["numpy"]


@cache
def load_loops() -> None:
    """Compile, or load, what is used here: that takes memory too."""
    keys = tokens(LIBRARIES["numpy"], 1, 60, 8)
    for storage in ("input", "int8"):
        sketch = subgen.AttentionSketch(8, window=16, storage=storage)  # type: ignore[arg-type]
        sketch.update(keys, keys, queries=keys)
        sketch.attend(keys[:, :1])
    merge_closest(clusters(1, 10, nearest=0.5), None, np.ones(1, np.float32), 6, 6)


def peak(call: Callable[[], object]) -> int:
    """Bytes that a call takes at most, beyond what there was; NumPy tells tracemalloc of its arrays."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def tokens(library: Library, *shape: int, seed: int = 0, dtype: Any = np.float32) -> Any:
    return library.array(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def allowed(copies: int, sketch: subgen.AttentionSketch, result: int = 0, itemsize: int = 4) -> int:
    """Bytes that are promised: temporary arrays, copies of the sketch, and the result twice."""
    return ARRAYS * LIMIT * itemsize + copies * sketch.nbytes + 2 * result + SMALL


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("storage", ["input", "int8"])
def test_step_of_a_long_block_holds_a_bounded_number_of_logits(kind: Library, storage: Any) -> None:
    window, n, d = 128, 140, 8
    queries, keys = tokens(kind, 8, n, d), tokens(kind, 2, n, d, seed=1)
    sketch = subgen.AttentionSketch(16, window=window, storage=storage)
    got = peak(lambda: sketch.step(queries, keys, keys))
    logits = 8 * window * window * 4
    assert got < allowed(8, sketch, 8 * n * d * 4) < 2 * logits


@pytest.mark.usefixtures("limited")
def test_step_in_pieces_answers_as_token_by_token(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_compiling(library)
    n = 90
    queries, keys = tokens(library, 4, n, 8), tokens(library, 2, n, 8, seed=1)
    make: dict[str, Any] = {"window": 32, "sink": 2}
    whole, cut = subgen.AttentionSketch(8, **make), subgen.AttentionSketch(8, **make)
    expected = np.asarray(whole.step(queries, keys, keys))
    # A few tokens of a window at a time, and codes of a part of the block.
    monkeypatch.setattr(_array, "TRANSIENT_NUMBERS", 1500)
    got = np.asarray(cut.step(queries, keys, keys))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(cut.state.clusters.counts), np.asarray(whole.state.clusters.counts))
    codes, expected = (np.asarray(sketch.state.exact.queries.codes) for sketch in (cut, whole))
    np.testing.assert_array_equal(codes, expected)


def test_a_long_block_is_cut_where_the_window_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = tokens(LIBRARIES["numpy"], 2, 700, 8), tokens(LIBRARIES["numpy"], 4, 700, 8, seed=1)
    make: dict[str, Any] = {"max_clusters": 8, "window": 32, "sink": 2}
    whole = subgen.AttentionSketch(**make)
    whole.update(keys, keys, queries=queries)
    counts: list[int] = []

    def counting(state: Any, tokens: Any, steps: Any) -> Any:
        counts.append(len(steps))
        return PORTABLE["absorb_blocks"](state, tokens, steps)

    monkeypatch.setattr(_array, "TRANSIENT_NUMBERS", 500)  # codes of 125 tokens, of which 112 are whole blocks
    cut = subgen.AttentionSketch(**make)
    with using_backend(Backend("numpy", {**get("numpy").operations, "absorb_blocks": counting})):
        cut.update(keys, keys, queries=queries)
    # After the first 34 tokens and a block that fills the clusters, blocks of half a window stay together.
    assert sum(counts) > 30
    assert max(counts) == 7
    assert_same(cut.state, whole.state)


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("kind", ["loops", "no loops"], indirect=True)
def test_update_of_a_long_block_takes_no_more_memory_than_of_a_shorter_one(kind: Library) -> None:
    taken = []
    for n in (1_000, 8_000):
        queries, keys = tokens(kind, 4, n, 8), tokens(kind, 2, n, 8, seed=1)
        sketch = subgen.AttentionSketch(16, window=256)
        taken.append(peak(lambda s=sketch, q=queries, k=keys: s.update(k, k, queries=q)))  # type: ignore[misc]
        # The costs of the pairs of a stream: half a window joins the clusters.
        assert taken[-1] < allowed(8, sketch) + (16 + 128) ** 2 * 4
    assert taken[1] < 1.2 * taken[0]


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize(("most", "m"), [(16, 300), (900, 60)], ids=["many queries", "many clusters"])
def test_attend_holds_a_bounded_number_of_logits(kind: Library, most: int, m: int) -> None:
    n = most + 40
    keys, queries = tokens(kind, 2, n, 8), tokens(kind, 8, m, 8, seed=1)
    sketch = subgen.AttentionSketch(most, window=48, sink=0)
    sketch.update(keys, keys)
    got = peak(lambda: sketch.attend(queries))
    assert got < allowed(2, sketch, 8 * m * 8 * 4) < 2 * 8 * m * n * 4


@pytest.mark.usefixtures("limited")
def test_standard_errors_are_bounded_by_the_clusters_too(kind: Library) -> None:
    n, m, d = 200, 24, 16
    keys, queries = tokens(kind, 2, n, d), tokens(kind, 4, m, d, seed=1)
    sketch = subgen.AttentionSketch(n, window=16, residual_samples=4)
    sketch.update(keys, keys)
    got = peak(lambda: sketch.attend(queries, return_error=True))
    assert got < allowed(2, sketch, 2 * 4 * m * d * 4) < 2 * 4 * m * n * d * 4


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize(("m", "n", "d"), [(150, 600, 8), (1, 200_000, 1)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_exact_attention_over_a_long_context(kind: Library, m: int, n: int, d: int, dtype: str) -> None:
    if dtype == "float16" and kind.name == "strict":
        pytest.skip("the standard has no float16")
    queries, keys = tokens(kind, 4, m, d, dtype=dtype), tokens(kind, 2, n, d, seed=1, dtype=dtype)
    got = peak(lambda: subgen.attention(queries, keys, keys, causal=m > 1))
    assert got < ARRAYS * LIMIT * 4 + 2 * 4 * m * d * 4 + SMALL < 4 * m * n * 4


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("delta", [0.01, 8.0], ids=["all open", "few open"])
def test_threshold_mode_holds_a_bounded_number_of_distances(kind: Library, delta: float) -> None:
    window, streams = 400, 4
    keys = tokens(kind, streams, window + 1, 4)
    sketch = subgen.AttentionSketch(delta=delta, window=window, sink=0)
    sketch.update(keys[:, :window, :], keys[:, :window, :])
    got = peak(lambda: sketch.update(keys[:, window:, :], keys[:, window:, :]))
    # Distances are in float64, and of each token to each.
    assert got < allowed(8, sketch, itemsize=8) < 3 * streams * (window // 2) ** 2 * 8


def test_a_block_assigned_in_parts_opens_the_same_clusters(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_compiling(library)
    rng = np.random.default_rng(2)
    keys = rng.integers(-4, 5, (3, 50, 2)).astype(np.float32)
    centres = np.concatenate([keys[:, :5], np.zeros((3, 2, 2), np.float32)], axis=1)
    given = [library.array(x) for x in (keys, centres, np.array([5, 0, 3]))]
    expected = [np.asarray(x) for x in assign_leaders(*given, 2.0)]
    for limit in (50 * 50, 200, 20):  # streams apart, a few tokens, tokens and leaders
        monkeypatch.setattr(_array, "TRANSIENT_NUMBERS", limit)
        for got, whole in zip(assign_leaders(*given, 2.0), expected, strict=True):
            np.testing.assert_array_equal(np.asarray(got), whole)


def test_sums_over_some_clusters_at_a_time_are_those_over_all(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_compiling(library)
    keys = np.random.default_rng(3).integers(-3, 4, (2, 120, 4)).astype(np.float32)
    states = []
    for limit in (1 << 22, 500):
        monkeypatch.setattr(_array, "TRANSIENT_NUMBERS", limit)
        sketch = subgen.AttentionSketch(delta=2.0, window=32)
        sketch.update(*[library.array(keys)] * 2)
        states.append(sketch.state)
    whole, cut = states
    np.testing.assert_array_equal(np.asarray(cut.clusters.counts), np.asarray(whole.clusters.counts))
    for name in ("keys", "values", "key_variance", "importance"):
        one, other = (np.asarray(getattr(state.clusters, name)) for state in (cut, whole))
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("kind", ["loops", "no loops"], indirect=True)
def test_algorithm_1_where_every_token_opens_a_cluster(kind: Library) -> None:
    t, n, d = 16, 64, 2
    queries, keys = tokens(kind, 8, n, d), tokens(kind, 2, n, d, seed=1)
    sketch = subgen.AttentionSketch.paper(delta=1e-6, samples_per_cluster=t, value_samples=8)
    got = peak(lambda: sketch.step(queries, keys, keys))
    logits = 8 * n * n * t * 4  # of every token and slot
    assert got < allowed(8, sketch, 8 * n * d * 4, itemsize=8) < logits
    assert peak(lambda: sketch.attend(queries)) < allowed(2, sketch, 8 * n * d * 4) < logits / 2


@pytest.mark.usefixtures("limited")
@pytest.mark.parametrize("kind", ["loops", "no loops"], indirect=True)
def test_sketches_that_are_merged(kind: Library) -> None:
    sketches, streams, held = [], 4, 150
    for seed in range(2):
        keys = tokens(kind, streams, held + 32, 4, seed=seed)
        sketches.append(subgen.AttentionSketch(held, window=32, sink=0))
        sketches[-1].update(keys, keys)
    got = peak(lambda: subgen.merge(*sketches))
    # Costs of the pairs of one stream, three times in portable code, and not of four.
    costs = (held + held // 8) ** 2 * 4
    assert got < allowed(8, sketches[0]) + 3 * costs < 8 * streams * costs


@pytest.mark.usefixtures("limited")
def test_the_cover_of_keys(kind: Library) -> None:
    n, d = 4_000, 64
    keys = tokens(kind, 2, n, d)
    distances = 2 * n * 8
    assert peak(lambda: k_center_radii(keys, 3)) < ARRAYS * LIMIT * 8 + 4 * distances + SMALL < 2 * n * d * 8


def clusters(streams: int, n: int, seed: int = 0, nearest: float | None = None) -> Clusters:
    rng = np.random.default_rng(seed)
    others = None
    if nearest is not None:
        others = (np.arange(n) + rng.integers(1, n, (streams, n))) % n
        others = np.where(rng.random((streams, n)) < nearest, others, -1).astype(np.int32)
    return Clusters(
        keys=rng.integers(-3, 4, (streams, n, 4)).astype(np.float32),
        values=rng.integers(-3, 4, (streams, n, 4)).astype(np.float32),
        counts=rng.integers(1, 3, (streams, n)),
        key_variance=np.zeros((streams, n, bands(4)), np.float32),
        importance=rng.integers(1, 3, (streams, n)).astype(np.float32),
        nearest=others,
    )


@pytest.mark.parametrize("nearest", [None, 0.8])
def test_streams_that_merge_one_after_the_other_merge_as_together(
    library: Library, monkeypatch: pytest.MonkeyPatch, nearest: float | None
) -> None:
    skip_compiling(library)
    given = tree_map(library.array, clusters(3, 24, nearest=nearest))
    metric = library.array(np.stack([np.eye(4, dtype=np.float32) * s for s in (1, 2, 4)]))
    unit = library.array(np.float32([1.0, 2.0, 1.0]))
    merge = PORTABLE["merge_closest"]
    expected = merge(given, metric, unit, 14, 14)
    for limit in (2 * 24 * 24, 100):  # two streams together, and a few rows of one
        monkeypatch.setattr(_array, "TRANSIENT_NUMBERS", limit)
        for (name, one), (_, other) in zip(leaves(merge(given, metric, unit, 14, 14)), leaves(expected), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other), err_msg=name)


@pytest.mark.parametrize("most", [900, 880], ids=["nothing merges", "some merge"])
@pytest.mark.parametrize("nearest", [None, 0.95], ids=["all compared", "few compared"])
def test_costs_take_memory_where_something_merges_alone(kind: Library, most: int, nearest: float | None) -> None:
    streams, n = 2, 900
    given = tree_map(kind.array, clusters(streams, n, nearest=nearest))
    unit = kind.array(np.ones(streams, np.float32))
    got, pairs = peak(lambda: merge_closest(given, None, unit, most, most)), n * n * 4
    copies = 4 * nbytes(given)
    if most == n:
        assert got < copies + SMALL < pairs / 2
    elif kind.name == "numpy":  # one stream after the other; of those that are new with all others
        looked_at = 2 * 4 * merging._LOOKED_AT  # rows that are copied at once, and those before them
        assert got < (1.2 * pairs if nearest is None else 0.3 * pairs) + looked_at + copies + SMALL
    else:  # of both streams together, as they are below the limit
        assert got < 12 * streams * pairs


@contextmanager
def address_space(more: int) -> Iterator[None]:
    """Let this process take so many bytes more: compiled loops do not tell tracemalloc of theirs."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_sketch_in_which_nothing_merges_needs_no_costs() -> None:
    """Costs of all pairs would be 20,000^2 * 4 bytes, 1.5 GiB; the sketch has 4 MB."""

    def absorbed(n: int) -> NDArray[Any]:
        keys = tokens(LIBRARIES["numpy"], 1, n, 4)
        sketch = subgen.AttentionSketch(max_clusters=n, window=2048)
        sketch.update(keys, keys)
        return np.asarray(sketch.n_clusters)

    absorbed(3_000)  # compiles, and BLAS takes what it needs
    with address_space(256 << 20):
        assert absorbed(20_000) > 17_000
