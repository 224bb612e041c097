"""The registry, and the contracts every backend is held to."""

from __future__ import annotations

import importlib.metadata
import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import subgen_numpy._merging
from libraries import LIBRARIES, Library, skip_compiling, to_numpy

import subgen
from subgen import backends
from subgen.absorbing import Dithers, Exact
from subgen.backends import PORTABLE, Backend, BackendError
from subgen.merging import Means
from subgen.rounding import Codes, dequantize, dither


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of the test's own."""
    monkeypatch.setattr(backends, "_registered", {})
    monkeypatch.setattr(backends, "_resolved", {})


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


def test_numpy_enters_by_the_door_for_strangers() -> None:
    points = importlib.metadata.entry_points(group="subgen.backends")
    assert points["numpy"].value == "subgen_numpy:BACKEND"
    assert "numpy" in backends.names()
    assert backends.operations_for(np.zeros(1)).threefry2x32 is backends.get("numpy").operations["threefry2x32"]


@pytest.mark.parametrize("backend", installed(), ids=lambda backend: backend.name)
def test_operations_have_the_portable_signature(backend: Backend) -> None:
    for name, operation in backend.operations.items():
        expected = list(inspect.signature(PORTABLE[name]).parameters)
        assert list(inspect.signature(operation).parameters) == expected, name


def test_arrays_without_a_backend_run_on_the_portable_code() -> None:
    strict = pytest.importorskip("array_api_strict")
    assert backends.operations_for(strict.zeros(1)) == backends.Operations()


@pytest.mark.usefixtures("registry")
def test_a_registered_backend_is_used_at_once_and_can_be_replaced() -> None:
    calls = []

    def counting(*args: Any) -> Any:
        calls.append(1)
        return PORTABLE["weighted_attention"](*args)

    x = np.ones((3, 2))
    subgen.attention(x, x, x)
    with pytest.raises(BackendError, match="exists already; pass replace=True"):
        backends.register(Backend("numpy", {"weighted_attention": counting}))
    assert not calls
    backends.register(Backend("numpy", {"weighted_attention": counting}), replace=True)
    subgen.attention(x, x, x)
    assert calls


@pytest.mark.usefixtures("registry")
def test_a_new_backend_serves_its_library() -> None:
    strict = pytest.importorskip("array_api_strict")
    calls = []

    def counting(*args: Any) -> Any:
        calls.append(1)
        return PORTABLE["assign_leaders"](*args)

    backends.register(Backend("array_api_strict", {"assign_leaders": counting}))
    assert "array_api_strict" in backends.names()
    sketch = subgen.AttentionSketch.paper(delta=1.0, samples_per_cluster=1, value_samples=1)
    sketch.update(strict.zeros((4, 2)), strict.zeros((4, 2)))
    assert calls


def test_unknown_backends_and_operations() -> None:
    with pytest.raises(BackendError, match=r"no backend named 'nympy'; installed: .*numpy"):
        backends.get("nympy")
    with pytest.raises(BackendError, match=r"unknown operations \['atend'\]; the operations are .*weighted_attention"):
        Backend("mine", {"atend": print})
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
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging on the CPU with the loops that numba compiles, and with NumPy's."""
    if request.param == "numpy":
        monkeypatch.setattr(subgen_numpy._merging, "compiled", lambda what: None)
    elif subgen_numpy._merging.compiled("merging") is None:
        pytest.skip("numba is not installed")


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("backend", replacing("merge_closest"), ids=lambda b: b.name)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("old", [None, 0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("free", "most"), [(0, 20), (5, 13), (5, 3), (0, 40)])
def test_merging_decides_as_the_portable_code_on_integers(
    backend: Backend, learned: bool, old: float | None, free: int, most: int
) -> None:
    """Ties all over, and costs that are exact in every order of summation: 32 clusters of integers.

    A share of them, ``old``, remembers another; they need not be the nearest.
    """
    library = LIBRARIES[backend.name]
    rng = np.random.default_rng(most)
    n, d = 32 + free, 8
    counts = np.ones((3, n), np.int64)
    for row in counts:
        row[rng.permutation(n)[:free]] = 0
    root = np.tril(rng.integers(-1, 2, size=(3, d, d)), -1) + np.eye(d)
    given = Means(
        keys=rng.integers(-2, 3, size=(3, n, d)).astype(np.float32),
        values=rng.integers(-1, 2, size=(3, n, 4)).astype(np.float32),
        counts=counts,
        spread=rng.integers(0, 3, size=(3, n, 4)).astype(np.float32),
        importance=rng.integers(1, 4, size=(3, n)).astype(np.float32),
        leaders=rng.normal(size=(3, n, d)).astype(np.float16),
        nearest=None if old is None else remembered(counts, old, rng),
    )
    metric = (root @ root.swapaxes(-1, -2)).astype(np.float32) if learned else None
    scale = np.asarray([1.0, 2.0, 0.5], np.float32)
    # One matching at a time: the means of a second one are no integers any more.
    for surplus in range(1, 4):
        left = max(most, 32 - 4 * surplus)
        expected, moved = PORTABLE["merge_closest"](given, metric, scale, left, n)
        arrays = given.each(library.array)
        got, got_moved = backend.operations["merge_closest"](
            arrays, None if metric is None else library.array(metric), library.array(scale), left, n
        )
        for x, y in zip(given.arrays(), arrays.arrays(), strict=True):
            np.testing.assert_array_equal(to_numpy(y), x)  # nothing was written into
        np.testing.assert_array_equal(to_numpy(got_moved)[counts > 0], moved[counts > 0])
        live = expected.counts > 0
        np.testing.assert_array_equal(to_numpy(got.counts), expected.counts)
        for name in ("keys", "values", "spread", "importance", "leaders"):
            mine, theirs = to_numpy(getattr(got, name)), getattr(expected, name)
            np.testing.assert_allclose(mine[live], theirs[live], rtol=1e-6, atol=1e-6, err_msg=name)
        if old is None:
            assert got.nearest is None
        else:
            np.testing.assert_array_equal(to_numpy(got.nearest), expected.nearest)


def remembered(counts: np.ndarray, old: float, rng: np.random.Generator) -> np.ndarray:
    """Let a share of the clusters remember another that lives, a few of them the same ones: int32."""
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
    given = Means(keys, keys, ones.astype(np.int64), np.zeros((2, 40, 4), np.float32), ones * [[0.0], [1.0]])
    given = Means(*(x if x is None or x.dtype.kind == "i" else x.astype(np.float32) for x in given.arrays()))
    with np.errstate(all="ignore"):
        shape = np.full((2, 4, 4), metric, np.float32)
        got, _ = backend.operations["merge_closest"](
            given.each(library.array), library.array(shape), library.array(np.ones(2, np.float32)), 5, 5
        )
    assert to_numpy(got.counts).sum() == 80
    assert to_numpy(got.counts).shape == (2, 5)


@pytest.mark.parametrize("leave", [0, 3])
@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("library", LIBRARIES.values(), ids=repr)
def test_what_is_settled_is_new_and_the_same_in_every_library(library: Library, coded: bool, leave: int) -> None:
    """Room behind the exact tokens is written in place, so no result may share memory with what was given."""
    pytest.importorskip(library.module)
    rng = np.random.default_rng(leave)
    sink, window, d = 2, 7, 4
    means = Means(
        *(rng.normal(size=(2, 5, width)).astype(np.float32) for width in (d, 3)),
        rng.integers(0, 4, size=(2, 5)).astype(np.int64),
        rng.random((2, 5, 4), np.float32),
        rng.random((2, 5), np.float32),
    )
    keys, values = (rng.normal(size=(2, sink + window, width)).astype(np.float32) for width in (d, 3))
    codes, scales = rng.integers(-127, 128, size=(2, window, d)).astype(np.int8), rng.random((2, window), np.float32)
    dithers = Dithers(*(dither(1, purpose, 9) for purpose in range(4)))
    tokens = Exact(keys, values, Codes(codes, scales), (True,) * window)
    given = tokens.each(library.array)
    settle = backends.operations_for(given.keys).settle
    got = settle(means.each(library.array), given, leave, dithers, coded)
    clusters = 0 if coded else 5
    for mine, exact in ((got.keys, keys), (got.values, values)):
        stay = np.concatenate([exact[:, :sink], exact[:, sink + leave :], np.zeros_like(exact[:, :leave])], axis=1)
        np.testing.assert_array_equal(to_numpy(mine)[:, clusters:], stay)
    for mine, old in ((got.queries.codes, codes), (got.queries.scales, scales)):
        np.testing.assert_array_equal(to_numpy(mine), np.concatenate([old[:, leave:], 0 * old[:, :leave]], axis=1))
    expected = PORTABLE["settle"](means, tokens, leave, dithers, coded)
    for name in ("keys", "spread", "importance"):
        np.testing.assert_array_equal(to_numpy(getattr(got, name)), getattr(expected, name), err_msg=name)
    if library.name == "numpy":
        pairs = [(got.keys, keys), (got.values, values), (got.queries.codes, codes), (got.queries.scales, scales)]
        assert not any(np.shares_memory(mine, old) for mine, old in pairs)
    assert (got.key_codes is None) == (got.value_codes is None) == (not coded)
    if coded:
        np.testing.assert_array_equal(to_numpy(got.key_codes.codes), expected.key_codes.codes)


@pytest.mark.parametrize("n_exact", [0, 2, 3, 8])
@pytest.mark.parametrize("clusters", [0, 20])
@pytest.mark.parametrize("library", LIBRARIES.values(), ids=repr)
def test_a_token_is_written_and_answered_alike_in_every_library(library: Library, clusters: int, n_exact: int) -> None:
    """Behind the exact tokens, with one of its queries if it is no sink; the other places are as they were."""
    pytest.importorskip(library.module)
    rng = np.random.default_rng(n_exact)
    sink, window, d, group, n_seen = 3, 6, 8, 4, clusters + n_exact
    keys, values = (rng.normal(size=(2, clusters + sink + window, width)).astype(np.float32) for width in (d, 5))
    codes, scales = rng.integers(-127, 128, size=(2, window, d)).astype(np.int8), rng.random((2, window), np.float32)
    counts, spread = rng.integers(0, 4, size=(2, clusters)).astype(np.int64), rng.random((2, clusters, 4), np.float32)
    token = [rng.normal(size=(2, n, width)).astype(np.float32) for n, width in ((group, d), (1, d), (1, 5))]
    empty = subgen.AttentionSketch(max_clusters=20, window=window, sink=sink)
    empty.update(*(library.array(np.zeros((2, 1, width), np.float32)) for width in (d, 5)))
    held = replace(
        empty.state,  # type: ignore[type-var]
        **{name: library.array(x) for name, x in (("keys", keys), ("values", values), ("counts", counts))},
        spread=library.array(spread),
        queries=Codes(codes, scales).each(library.array),
        n_exact=n_exact,
        n_seen=n_seen,
    )
    given = [library.array(x) for x in token]
    ops = backends.operations_for(given[0])
    got = ops.decode(held, *given, 0.3, ops)
    place = clusters + n_exact
    for mine, old, row in ((got.keys, keys, token[1]), (got.values, values, token[2])):
        expected = old.copy()
        expected[:, place] = row[:, 0]
        np.testing.assert_array_equal(to_numpy(mine), expected)
    rows = token[0] * np.float32(0.3)
    if n_exact >= sink:
        kept = PORTABLE["quantize"](rows[:, n_seen % group][:, None], np.dtype("float32"))
        codes[:, n_exact - sink], scales[:, n_exact - sink] = kept.codes[:, 0], kept.scales[:, 0]
    np.testing.assert_array_equal(to_numpy(got.queries.codes), codes)
    np.testing.assert_allclose(to_numpy(got.queries.scales), scales, rtol=1e-6)
    keys[:, place], values[:, place] = token[1][:, 0], token[2][:, 0]
    pairs = keys[:, : place + 1], values[:, : place + 1]
    outputs, _ = PORTABLE["sketch_attention"](rows, *pairs, counts, spread, 1)
    np.testing.assert_allclose(to_numpy(got.outputs), outputs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("library", LIBRARIES.values(), ids=repr)
def test_the_query_that_is_kept_is_chosen_scaled_and_rounded(library: Library, group: int) -> None:
    pytest.importorskip(library.module)
    rng = np.random.default_rng(group)
    queries = rng.normal(size=(2, group, 10, 8)).astype(np.float32)
    given = library.array(queries)
    ops = backends.operations_for(given)
    got = ops.query_codes(given, 0.3, 5, given.dtype, ops)
    for t in range(10):
        row = queries[:, (5 + t) % group, t] * np.float32(0.3)
        expected = PORTABLE["quantize"](row[:, None], np.dtype("float32"))
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
    monkeypatch.setattr(subgen.means, "FEW_CLUSTERS", few)
    calls = []
    ops = backends.operations_for(library.array(np.zeros(1, np.float32)))
    counted = replace(ops, absorb_blocks=lambda *given: calls.append(len(given[5])) or ops.absorb_blocks(*given))
    monkeypatch.setattr(subgen.sketch, "operations_for", lambda x: counted)
    rng = np.random.default_rng(3)
    arrays = [library.array(rng.normal(size=(1, heads, 68, 4)).astype(np.float32)) for heads in (4, 2, 2)]
    states = []
    for size in (68, 1):
        sketch = subgen.AttentionSketch(max_clusters=9, window=8, sink=2)
        for i in range(0, 68, size):
            q, k, v = (x[:, :, i : i + size, :] for x in arrays)
            sketch.update(k, v, q if asked else None)
        states.append(sketch.state)
    assert calls == [11]  # as soon as there are as many clusters as there will be
    whole, single = map(subgen.means.clear_room, states)
    for name in ("n_exact", "n_seen", "asked"):
        assert getattr(whole, name) == getattr(single, name)
    for name in ("keys", "values", "counts", "spread", "importance"):
        np.testing.assert_array_equal(to_numpy(getattr(whole, name)), to_numpy(getattr(single, name)))
    np.testing.assert_array_equal(to_numpy(whole.queries.codes), to_numpy(single.queries.codes))
    assert (whole.nearest is None) == (few == 768)


@pytest.mark.parametrize("backend", replacing("sketch_attention"), ids=lambda b: b.name)
@pytest.mark.parametrize("causal", [0, 1, 5])
@pytest.mark.parametrize("rows", [10, 80])
@pytest.mark.parametrize(("clusters", "stored"), [(0, np.float32), (30, np.float32), (30, np.float16)])
def test_attention_over_clusters_is_that_of_the_portable_code(
    backend: Backend, causal: int, rows: int, clusters: int, stored: type
) -> None:
    library = LIBRARIES[backend.name]
    rng = np.random.default_rng(rows)
    q = rng.normal(size=(3, rows, 8)).astype(np.float32)
    k = rng.normal(size=(3, clusters + 9, 8)).astype(stored)
    v = rng.normal(size=(3, clusters + 9, 6)).astype(stored)
    counts = rng.integers(0, 4, size=(3, clusters)).astype(np.int64)
    spread = rng.uniform(0, 0.3, size=(3, clusters, 4)).astype(stored)
    given = (q, k, v, counts, spread)
    expected = PORTABLE["sketch_attention"](q, k.astype(np.float32), v.astype(np.float32), counts, spread, causal)
    arrays = tuple(map(library.array, given))
    got = backend.operations["sketch_attention"](*arrays, causal)
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(to_numpy(mine), theirs, rtol=2e-5, atol=2e-6)
    for x, y in zip(arrays, given, strict=True):
        np.testing.assert_array_equal(to_numpy(x), y)  # nothing was written into


@pytest.mark.parametrize("backend", replacing("coded_attention"), ids=lambda b: b.name)
@pytest.mark.parametrize("causal", [0, 1, 5])
@pytest.mark.parametrize("rows", [10, 80])
@pytest.mark.parametrize(("clusters", "stored"), [(0, np.float32), (30, np.float32), (30, np.float16)])
def test_attention_over_clusters_in_8_bits_is_that_over_what_the_codes_say(
    backend: Backend, causal: int, rows: int, clusters: int, stored: type
) -> None:
    library = LIBRARIES[backend.name]
    rng = np.random.default_rng(rows)
    q = rng.normal(size=(3, rows, 8)).astype(np.float32)
    k, v = (rng.normal(size=(3, 9, dim)).astype(stored) for dim in (8, 6))
    codes = [
        Codes(
            rng.integers(-127, 128, size=(3, clusters, dim)).astype(np.int8), rng.random((3, clusters)).astype(stored)
        )
        for dim in (8, 6)
    ]
    codes = [replace(of, scales=of.scales / stored(64)) for of in codes]
    counts = rng.integers(0, 4, size=(3, clusters)).astype(np.int64)
    spread = rng.uniform(0, 0.3, size=(3, clusters, 4)).astype(stored)
    means = [dequantize(of, np.float32) for of in codes]
    pairs = [np.concatenate([mean, x.astype(np.float32)], axis=1) for mean, x in zip(means, (k, v), strict=True)]
    expected = PORTABLE["sketch_attention"](q, *pairs, counts, spread, causal)
    arrays = tuple(map(library.array, (q, k, v, counts, spread)))
    given = [of.each(library.array) for of in codes]
    got = backend.operations["coded_attention"](*arrays, *given, causal, backends.operations_for(arrays[0]))
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(to_numpy(mine), theirs, rtol=2e-5, atol=2e-6)


def test_the_portable_code_and_the_numpy_backend_agree_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(-5, 6, size=(3, 100, 2)).astype(np.float32)
    values = rng.integers(-2, 3, size=(3, 100, 4)).astype(np.float32)
    queries = rng.normal(size=(3, 100, 2)).astype(np.float32) / 4
    results = []
    for portable in (False, True):
        if portable:
            monkeypatch.setattr(backends, "_resolved", {"numpy": backends.Operations()})
        sketch = subgen.AttentionSketch.paper(delta=2.0, samples_per_cluster=3, value_samples=9)
        results.append((sketch.step(queries, keys, values), sketch.state))
    (out, state), (portable_out, portable_state) = results
    np.testing.assert_allclose(out, portable_out, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(to_numpy(state.clusters.samples), portable_state.clusters.samples)
    np.testing.assert_array_equal(state.reservoir.keys, portable_state.reservoir.keys)
    np.testing.assert_array_equal(state.reservoir.due, portable_state.reservoir.due)
