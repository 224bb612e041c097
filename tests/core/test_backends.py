"""The registry, the dispatch of operations, and the contracts every backend is held to."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import subgen_numpy
from libraries import LIBRARIES, NUMPY, Library, skip_compiling, to_numpy
from states import absorb_options, full_state, random_clusters, state_of
from switches import counting, empty_registry, using_backend, without_loops

import subgen
from subgen import backends
from subgen._tree import leaves, tree_map
from subgen.backends import PORTABLE, Backend, BackendError
from subgen.default import algorithm
from subgen.default.absorb import absorb, absorb_blocks, evict, store, upcast_clusters
from subgen.default.append import append, quantize_queries
from subgen.default.attend import attend, decode
from subgen.default.merging import merge_closest
from subgen.default.prompt import agglomerate
from subgen.default.quantization import draw_dithers, quantize
from subgen.default.state import BufferOwner, Clusters, Exact, Quantized, clear_free_space
from subgen.leaders import assign_leaders
from subgen.softmax import weighted_attention

OPERATIONS = (
    weighted_attention,
    attend,
    append,
    decode,
    absorb,
    absorb_blocks,
    merge_closest,
    quantize_queries,
    assign_leaders,
    agglomerate,
)


@pytest.fixture
def registry() -> Iterator[None]:
    """A registry of the test's own."""
    with empty_registry():
        yield


def pretend_installed(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    point = importlib.metadata.EntryPoint(name, value, "subgen.backends")
    monkeypatch.setattr(backends, "_entry_points", lambda: {name: point})


def installed() -> list[Backend]:
    found = []
    for name in backends.names():
        try:
            found.append(backends.get(name))
        except BackendError:  # its array library is not installed here
            continue
    return found


def replacing(operation: str) -> list[Backend]:
    """Backends of the libraries here that replace an operation; that of CuPy has tests of its own."""
    here = [backend for backend in installed() if backend.name in LIBRARIES]
    return [backend for backend in here if operation in backend.operations]


def test_the_operations_are_these_ten() -> None:
    assert len(OPERATIONS) == 10
    assert set(PORTABLE) == {operation.__name__ for operation in OPERATIONS}
    for operation in OPERATIONS:
        portable = PORTABLE[operation.__name__]
        assert operation.__wrapped__ is portable
        assert operation is not portable
        assert operation.__doc__ == portable.__doc__
        assert inspect.signature(operation) == inspect.signature(portable)
    with pytest.raises(TypeError):
        PORTABLE["attend"] = print  # type: ignore[index]


def test_numpy_enters_by_the_door_for_strangers() -> None:
    points = importlib.metadata.entry_points(group="subgen.backends")
    assert points["numpy"].value == "subgen_numpy:BACKEND"
    assert "numpy" in backends.names()
    assert backends._operations_of(np.zeros(1)) is backends.get("numpy").operations
    assert "absorb" in backends.get("numpy").operations


@pytest.mark.parametrize("backend", installed(), ids=lambda backend: backend.name)
def test_operations_have_the_portable_signature(backend: Backend) -> None:
    for name, operation in backend.operations.items():
        expected = list(inspect.signature(PORTABLE[name]).parameters)
        assert list(inspect.signature(operation).parameters) == expected, name


def test_arrays_without_a_backend_run_on_the_portable_code() -> None:
    strict = pytest.importorskip("array_api_strict")
    assert backends._operations_of(strict.zeros(1)) == {}


@pytest.mark.usefixtures("registry")
def test_a_registered_backend_is_used_at_once_and_can_be_replaced() -> None:
    calls: list[str] = []
    mine = Backend("numpy", {"weighted_attention": counting("weighted_attention", calls)})
    x = np.ones((3, 2))
    subgen.attention(x, x, x)
    with pytest.raises(BackendError, match="exists already; pass replace=True"):
        backends.register(mine)
    assert not calls
    backends.register(mine, replace=True)
    subgen.attention(x, x, x)
    assert calls


@pytest.mark.usefixtures("registry")
def test_a_new_backend_serves_its_library() -> None:
    strict = pytest.importorskip("array_api_strict")
    calls: list[str] = []
    backends.register(Backend("array_api_strict", {"assign_leaders": counting("assign_leaders", calls)}))
    assert "array_api_strict" in backends.names()
    sketch = subgen.AttentionSketch.paper(delta=1.0, samples_per_cluster=1, value_samples=1)
    sketch.update(strict.zeros((4, 2)), strict.zeros((4, 2)))
    assert calls


def test_an_operation_that_returns_not_implemented_falls_back_to_the_portable_function() -> None:
    calls: list[str] = []
    refusing = Backend("numpy", {name: counting(name, calls, NotImplemented) for name in PORTABLE})
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(heads, 60, 4)) for heads in (4, 2, 2)]

    def run() -> list[np.ndarray]:
        sketch = subgen.AttentionSketch(max_clusters=9, window=8, sink=2)
        sketch.update(*(x[:, :50] for x in arrays[1:]), queries=arrays[0][:, :50])
        outputs = [sketch.step(*(x[:, i : i + 1] for x in arrays)) for i in range(50, 60)]
        paper = subgen.AttentionSketch.paper(delta=1.0, samples_per_cluster=1, value_samples=1)
        paper.update(*arrays[1:])
        whole = subgen.AttentionSketch(max_clusters=9, window=8, sink=2)
        whole.prefill(*arrays[1:], queries=arrays[0])
        outputs += [subgen.attention(*arrays), paper.attend(arrays[0]), whole.attend(arrays[0])]
        return [*outputs, *(x for state in (sketch.state, paper.state) for _, x in leaves(state))]

    with using_backend(refusing):
        got = run()
    assert set(calls) == set(PORTABLE)
    with using_backend("portable"):
        expected = run()
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_no_other_result_falls_back() -> None:
    calls: list[str] = []
    for result in (False, 0, ()):
        with using_backend(Backend("numpy", {"weighted_attention": counting("weighted_attention", calls, result)})):
            assert weighted_attention(np.zeros((1, 1, 2)), np.zeros((1, 1, 2)), np.zeros((1, 1, 2)), 0.0) == result
    assert len(calls) == 3


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=repr)
@pytest.mark.parametrize("quantized", [False, True])
def test_a_state_is_dispatched_by_its_library(library: Library, quantized: bool) -> None:
    """Its first array decides; the backends of other libraries are not asked."""
    pytest.importorskip(library.module)
    skip_compiling(library)
    calls: dict[str, list[str]] = {other.name: [] for other in LIBRARIES.values()}
    state = tree_map(library.array, full_state(20, quantized=quantized))
    rows = library.array(np.ones((2, 3, 16), np.float32))
    names = {"strict": "array_api_strict"}
    with using_backend("portable"):
        for other, noted in calls.items():
            backend = Backend(
                names.get(other, other), {name: counting(name, noted) for name in ("attend", "absorb", "append")}
            )
            backends._resolved[backend.name] = backend.operations
        attend(state, rows)
        state = absorb(state, absorb_options(5, 20))
        append(state, *(x[:, :2, :] for x in (state.exact.keys, state.exact.values)), None)
        attend(state, rows=rows, causal=0)  # arguments by name are passed on
    assert calls.pop(library.name) == ["attend", "absorb", "append", "attend"]
    assert not any(calls.values())


def test_what_holds_no_array_is_refused() -> None:
    for given in (None, 3, "numpy", [np.zeros(1)]):
        with pytest.raises(TypeError, match=f"expected an array or a dataclass of arrays, got {type(given).__name__}"):
            attend(given, np.zeros((1, 1, 2)))  # type: ignore[arg-type]


def test_a_backend_is_used_within_a_block() -> None:
    x, calls = np.ones((3, 2)), list[str]()
    subgen.attention(x, x, x)
    before = dict(backends._resolved)
    with using_backend(Backend("numpy", {"weighted_attention": counting("weighted_attention", calls)})):
        subgen.attention(x, x, x)
        with using_backend("portable"):
            subgen.attention(x, x, x)
        with using_backend("numpy"):
            subgen.attention(x, x, x)
    assert len(calls) == 1
    assert backends._resolved == before


def test_unknown_backends_and_operations() -> None:
    with pytest.raises(BackendError, match=r"no backend named 'nympy'; installed: .*numpy"):
        backends.get("nympy")
    with pytest.raises(BackendError, match=r"unknown operations \['atend'\]; the operations are .*weighted_attention"):
        Backend("mine", {"atend": print})
    with pytest.raises(BackendError, match=r"'mine' offers unknown operations \['quantize', 'write'\]"):
        Backend("mine", {"write": print, "attend": print, "quantize": print})
    with pytest.raises(TypeError, match="got str"):
        backends.register("numpy")  # type: ignore[arg-type]


@pytest.mark.usefixtures("registry")
def test_a_backend_that_does_not_import_says_which_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, "numpy", "subgen_missing:BACKEND")
    assert backends.names() == ["numpy"]  # listed without importing
    with pytest.raises(BackendError, match=r"'numpy' \(subgen_missing:BACKEND\).*No module named 'subgen_missing'"):
        backends.get("numpy")
    x = np.ones((3, 2))
    with pytest.raises(BackendError, match="does not load"):
        subgen.attention(x, x, x)


@pytest.mark.usefixtures("registry")
def test_an_entry_point_must_give_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, "numpy", "subgen_numpy:__name__")
    with pytest.raises(BackendError, match=r"must give a subgen.backends.Backend, got str"):
        backends.get("numpy")


@pytest.fixture(params=["compiled", "numpy"])
def loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """Merging on the CPU with the loops that numba compiles, and with NumPy's."""
    if request.param == "compiled" and subgen_numpy.compiled("merge") is None:
        pytest.skip("numba is not installed")
    with without_loops() if request.param == "numpy" else nullcontext():
        yield


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("backend", replacing("merge_closest"), ids=lambda b: b.name)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("old", [None, 0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("free", "most"), [(0, 20), (5, 13), (5, 3), (0, 40)])
def test_merging_decides_as_the_portable_code_on_integers(
    backend: Backend, learned: bool, old: float | None, free: int, most: int
) -> None:
    """Ties all over, and costs that are exact in every order of summation: 32 clusters of integers.

    A share of them, ``old``, has a cached neighbour, which need not be the nearest.
    """
    library = LIBRARIES[backend.name]
    rng = np.random.default_rng(most)
    n, d = 32 + free, 8
    counts = np.ones((3, n), np.int64)
    for row in counts:
        row[rng.permutation(n)[:free]] = 0
    root = np.tril(rng.integers(-1, 2, size=(3, d, d)), -1) + np.eye(d)
    given = Clusters(
        keys=rng.integers(-2, 3, size=(3, n, d)).astype(np.float32),
        values=rng.integers(-1, 2, size=(3, n, 4)).astype(np.float32),
        counts=counts,
        key_variance=rng.integers(0, 3, size=(3, n, 4)).astype(np.float32),
        importance=rng.integers(1, 4, size=(3, n)).astype(np.float32),
        leaders=rng.normal(size=(3, n, d)).astype(np.float16),
        nearest=None if old is None else cached_neighbours(counts, old, rng),
    )
    metric = (root @ root.swapaxes(-1, -2)).astype(np.float32) if learned else None
    scale = np.asarray([1.0, 2.0, 0.5], np.float32)
    # One matching at a time: the means of a second one are no integers any more.
    for surplus in range(1, 4):
        left = max(most, 32 - 4 * surplus)
        expected, assignment = PORTABLE["merge_closest"](given, metric, scale, left, n)
        arrays = tree_map(library.array, given)
        got, got_assignment = backend.operations["merge_closest"](
            arrays, None if metric is None else library.array(metric), library.array(scale), left, n
        )
        for (_, x), (_, y) in zip(leaves(given), leaves(arrays), strict=True):
            np.testing.assert_array_equal(to_numpy(y), x)  # nothing was written into
        np.testing.assert_array_equal(to_numpy(got_assignment)[counts > 0], assignment[counts > 0])
        live = expected.counts > 0
        np.testing.assert_array_equal(to_numpy(got.counts), expected.counts)
        for name in ("keys", "values", "key_variance", "importance", "leaders"):
            mine, theirs = to_numpy(getattr(got, name)), getattr(expected, name)
            np.testing.assert_allclose(mine[live], theirs[live], rtol=1e-6, atol=1e-6, err_msg=name)
        if old is None:
            assert got.nearest is None
        else:
            np.testing.assert_array_equal(to_numpy(got.nearest), expected.nearest)


def cached_neighbours(counts: np.ndarray, old: float, rng: np.random.Generator) -> np.ndarray:
    """Give a share of the clusters a live neighbour, some of them the same one: int32."""
    nearest = np.full(counts.shape, -1, np.int32)
    for row, live in zip(nearest, counts > 0, strict=True):
        places = np.flatnonzero(live)
        for i in places[rng.random(places.size) < old]:
            others = places[places != i]
            row[i] = rng.choice(others[:5] if rng.random() < 0.5 else others)
    return nearest


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("backend", replacing("merge_closest"), ids=lambda b: b.name)
@pytest.mark.parametrize("metric", [0.0, 1.0, np.inf])
def test_merging_ends_whatever_the_numbers(backend: Backend, metric: float) -> None:
    """A metric that is not definite, costs beyond the dtype, clusters without importance: as many are left as asked."""
    library = LIBRARIES[backend.name]
    keys = np.random.default_rng(0).normal(size=(2, 40, 4)).astype(np.float32) * 10.0 ** np.arange(
        -18, 22, dtype=float
    )[:, None].astype(np.float32)
    ones = np.ones((2, 40), np.float32)
    importance = ones * np.asarray([[0.0], [1.0]], np.float32)
    given = Clusters(keys, keys, ones.astype(np.int64), np.zeros((2, 40, 4), np.float32), importance)
    with np.errstate(all="ignore"):
        shape = np.full((2, 4, 4), metric, np.float32)
        got, _ = backend.operations["merge_closest"](
            tree_map(library.array, given), library.array(shape), library.array(np.ones(2, np.float32)), 5, 5
        )
    assert to_numpy(got.counts).sum() == 80
    assert to_numpy(got.counts).shape == (2, 5)


@pytest.mark.parametrize("n_evicted", [0, 3])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("library", LIBRARIES.values(), ids=repr)
def test_what_is_evicted_and_stored_is_new_and_the_same_in_every_library(
    library: Library, quantized: bool, n_evicted: int
) -> None:
    """Free space behind the exact tokens is written in place, so no result may share memory with what was given."""
    pytest.importorskip(library.module)
    rng = np.random.default_rng(n_evicted)
    sink, window, d = 2, 7, 4
    clusters = Clusters(
        *(rng.normal(size=(2, 5, width)).astype(np.float32) for width in (d, 3)),
        rng.integers(0, 4, size=(2, 5)),
        rng.random((2, 5, 4), np.float32),
        rng.random((2, 5), np.float32),
    )
    keys, values = (rng.normal(size=(2, sink + window, width)).astype(np.float32) for width in (d, 3))
    codes = rng.integers(-127, 128, size=(2, sink + window, d)).astype(np.int8)
    scales = rng.random((2, sink + window), np.float32)
    exact = Exact(keys, values, Quantized(codes, scales), sink + window, BufferOwner(sink + window))
    given = tree_map(library.array, exact)
    got = evict(given, sink, n_evicted)
    assert got.n == sink + window - n_evicted
    assert got.owner is not given.owner
    assert not got.owner.claim(got.n + 1, got.n + 2)
    assert got.owner.claim(got.n, got.n + 1)
    for (name, mine), (_, old) in zip(leaves(got), leaves(exact), strict=True):
        kept = np.concatenate([old[:, :sink], old[:, sink + n_evicted :], np.zeros_like(old[:, :n_evicted])], axis=1)
        np.testing.assert_array_equal(to_numpy(mine), kept, err_msg=name)
    if library is NUMPY:
        assert not any(np.shares_memory(x, y) for _, x in leaves(got) for _, y in leaves(exact))
    dithers = draw_dithers(1, [9])[0]
    stored = store(tree_map(library.array, clusters), given.keys.dtype, dithers, quantized)
    expected = store(clusters, np.dtype(np.float32), dithers, quantized)
    assert isinstance(stored.keys, Quantized) == isinstance(stored.values, Quantized) == quantized
    for name in ("key_variance", "importance", "counts"):
        np.testing.assert_array_equal(to_numpy(getattr(stored, name)), getattr(expected, name), err_msg=name)
    if quantized:
        np.testing.assert_array_equal(to_numpy(stored.keys.codes), expected.keys.codes)
        np.testing.assert_array_equal(to_numpy(stored.values.codes), expected.values.codes)
    else:
        np.testing.assert_array_equal(to_numpy(stored.keys), expected.keys)
        np.testing.assert_array_equal(to_numpy(stored.values), expected.values)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("library", LIBRARIES.values(), ids=repr)
def test_absorbing_gives_exact_tokens_in_new_arrays_in_every_library(library: Library, quantized: bool) -> None:
    pytest.importorskip(library.module)
    skip_compiling(library)
    state = full_state(20, quantized=quantized)
    given = tree_map(library.array, state)
    got = absorb(given, absorb_options(5, 20)).exact
    assert got.n == state.exact.n - 5
    assert got.owner is not state.exact.owner
    assert got.owner.claim(got.n, got.n + 1)
    for (name, mine), (_, old) in zip(leaves(got), leaves(state.exact), strict=True):
        kept = np.concatenate([old[:, :3], old[:, 8:], np.zeros_like(old[:, :5])], axis=1)
        np.testing.assert_array_equal(to_numpy(mine), kept, err_msg=name)
    if library.name in ("numpy", "torch"):
        pairs = [(to_numpy(x), to_numpy(y)) for _, x in leaves(got) for _, y in leaves(given.exact)]
        assert not any(np.shares_memory(x, y) for x, y in pairs)


@pytest.mark.parametrize("n_exact", [0, 2, 3, 8])
@pytest.mark.parametrize("n_clusters", [0, 20])
@pytest.mark.parametrize("library", LIBRARIES.values(), ids=repr)
def test_a_token_is_written_and_answered_alike_in_every_library(
    library: Library, n_clusters: int, n_exact: int
) -> None:
    """Behind the exact tokens, with one of its queries; the other places are unchanged."""
    pytest.importorskip(library.module)
    rng = np.random.default_rng(n_exact)
    capacity, d, group, n_seen = 9, 8, 4, n_clusters + n_exact
    keys, values = (rng.normal(size=(2, capacity, width)).astype(np.float32) for width in (d, 5))
    codes = rng.integers(-127, 128, size=(2, capacity, d)).astype(np.int8)
    scales = rng.random((2, capacity), np.float32)
    clusters = random_clusters(rng, (2, n_clusters), (d, 5), np.float32)
    token = [rng.normal(size=(2, n, width)).astype(np.float32) for n, width in ((group, d), (1, d), (1, 5))]
    state = state_of(keys, values, clusters, queries=Quantized(codes, scales), n=n_exact, n_seen=n_seen)
    state = tree_map(lambda x: library.array(np.copy(x)), state)
    got, outputs = decode(state, *map(library.array, token), 0.3)
    assert (got.exact.n, got.n_seen) == (n_exact + 1, n_seen + 1)
    for mine, old, row in ((got.exact.keys, keys, token[1]), (got.exact.values, values, token[2])):
        expected = old.copy()
        expected[:, n_exact] = row[:, 0]
        np.testing.assert_array_equal(to_numpy(mine), expected)
    rows = token[0] * np.float32(0.3)
    kept = quantize(rows[:, n_seen % group][:, None], np.dtype("float32"))
    codes[:, n_exact], scales[:, n_exact] = kept.codes[:, 0], kept.scales[:, 0]
    np.testing.assert_array_equal(to_numpy(got.exact.queries.codes), codes)
    np.testing.assert_allclose(to_numpy(got.exact.queries.scales), scales, rtol=1e-6)
    for (name, mine), (_, old) in zip(leaves(got.clusters), leaves(clusters), strict=True):
        np.testing.assert_array_equal(to_numpy(mine), old, err_msg=name)
    keys[:, n_exact], values[:, n_exact] = token[1][:, 0], token[2][:, 0]
    expected, _ = PORTABLE["attend"](state_of(keys, values, clusters, n=n_exact + 1), rows, 1)
    np.testing.assert_allclose(to_numpy(outputs), expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("library", LIBRARIES.values(), ids=repr)
def test_the_query_that_is_kept_is_chosen_scaled_and_rounded(library: Library, group: int) -> None:
    pytest.importorskip(library.module)
    rng = np.random.default_rng(group)
    queries = rng.normal(size=(2, group, 10, 8)).astype(np.float32)
    given = library.array(queries)
    got = quantize_queries(given, 0.3, 5, given.dtype)
    for t in range(10):
        row = queries[:, (5 + t) % group, t] * np.float32(0.3)
        expected = quantize(row[:, None], np.dtype("float32"))
        np.testing.assert_array_equal(to_numpy(got.codes)[:, t], expected.codes[:, 0])
        np.testing.assert_allclose(to_numpy(got.scales)[:, t], expected.scales[:, 0], rtol=1e-6)


@pytest.mark.parametrize("few", [4, 768])
@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("library", LIBRARIES.values(), ids=repr)
def test_a_long_block_is_what_it_is_token_by_token(
    library: Library, asked: bool, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a window after the other, with one token over at the end."""
    pytest.importorskip(library.module)
    skip_compiling(library)
    monkeypatch.setattr(algorithm, "FEW_CLUSTERS", few)
    calls: list[int] = []
    name = library.module.split(".")[0]
    own = backends._operations_of(library.array(np.zeros(1, np.float32)))
    blocks: Callable[..., Any] = own.get("absorb_blocks", PORTABLE["absorb_blocks"])

    def noted(state: Any, tokens: Any, steps: Any) -> Any:
        calls.append(len(steps))
        return blocks(state, tokens, steps)

    rng = np.random.default_rng(3)
    arrays = [library.array(rng.normal(size=(1, heads, 68, 4)).astype(np.float32)) for heads in (4, 2, 2)]
    states = []
    with using_backend(Backend(name, {**own, "absorb_blocks": noted})):
        for size in (68, 1):
            sketch = subgen.AttentionSketch(max_clusters=9, window=8, sink=2)
            for i in range(0, 68, size):
                q, k, v = (x[:, :, i : i + size, :] for x in arrays)
                sketch.update(k, v, queries=q if asked else None)
            states.append(sketch.state)
    assert calls == [11]  # as soon as there are as many clusters as there will be
    whole, single = map(clear_free_space, states)
    assert (whole.exact.n, whole.n_seen) == (single.exact.n, single.n_seen)
    assert bool((to_numpy(whole.exact.queries.scales)[:, : whole.exact.n] > 0).all()) == asked
    for (name, x), (other, y) in zip(leaves(whole), leaves(single), strict=True):
        assert name == other
        np.testing.assert_array_equal(to_numpy(x), to_numpy(y), err_msg=name)
    assert (whole.clusters.nearest is None) == (few == 768)


@pytest.mark.parametrize("backend", replacing("attend"), ids=lambda b: b.name)
@pytest.mark.parametrize("causal", [0, 1, 5])
@pytest.mark.parametrize("rows", [10, 80])
@pytest.mark.parametrize(("n_clusters", "stored"), [(0, np.float32), (30, np.float32), (30, np.float16)])
@pytest.mark.parametrize("quantized", [False, True])
def test_attention_over_clusters_is_that_of_the_portable_code(
    backend: Backend, causal: int, rows: int, n_clusters: int, stored: type, quantized: bool
) -> None:
    """Over int8 clusters it is attention over what the codes say."""
    library = LIBRARIES[backend.name]
    rng = np.random.default_rng(rows)
    q = rng.normal(size=(3, rows, 8)).astype(np.float32)
    keys, values = (rng.normal(size=(3, 12, width)).astype(stored) for width in (8, 6))
    clusters = random_clusters(rng, (3, n_clusters), (8, 6), stored, quantized=quantized)
    clusters = replace(clusters, key_variance=clusters.key_variance * stored(0.3))
    state = state_of(keys, values, clusters, n=9)
    wide = tree_map(lambda x: x.astype(np.float32) if x.dtype == np.float16 else x, state)
    wide = replace(wide, clusters=upcast_clusters(state.clusters, np.float32))
    expected = PORTABLE["attend"](wide, q, causal)
    arrays = tree_map(library.array, state)
    got = backend.operations["attend"](arrays, library.array(q), causal)
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(to_numpy(mine), theirs, rtol=2e-5, atol=2e-6)
    for mine, theirs in zip(PORTABLE["attend"](state, q, causal), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)
    for (_, x), (_, y) in zip(leaves(arrays), leaves(state), strict=True):
        np.testing.assert_array_equal(to_numpy(x), y)  # nothing was written into


def test_the_portable_code_and_the_numpy_backend_agree_end_to_end() -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(-5, 6, size=(3, 100, 2)).astype(np.float32)
    values = rng.integers(-2, 3, size=(3, 100, 4)).astype(np.float32)
    queries = rng.normal(size=(3, 100, 2)).astype(np.float32) / 4
    results = []
    for backend in ("numpy", "portable"):
        with using_backend(backend):
            sketch = subgen.AttentionSketch.paper(delta=2.0, samples_per_cluster=3, value_samples=9)
            results.append((sketch.step(queries, keys, values), sketch.state))
    (out, state), (portable_out, portable_state) = results
    np.testing.assert_allclose(out, portable_out, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(to_numpy(state.clusters.samples), portable_state.clusters.samples)
    np.testing.assert_array_equal(state.reservoir.keys, portable_state.reservoir.keys)
    np.testing.assert_array_equal(state.reservoir.due, portable_state.reservoir.due)
