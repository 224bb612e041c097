"""Compiled loops that absorb half a window, beside the portable code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import subgen_numpy
from numpy.typing import NDArray
from states import absorb_options, arrays_of, full_state, tracked
from switches import needs_loops, using_backend, without_loops

from subgen._tree import leaves, tree_map
from subgen.backends import PORTABLE
from subgen.default.absorb import absorb
from subgen.default.state import State

NUMPY = subgen_numpy.BACKEND.operations


def absorbed_by_loops(state: State, n_evicted: int, max_clusters: int, *, sink: int = 3) -> dict[str, Any]:
    """Absorb by compiled loops, and by nothing else; the sample shows where each cluster and token went."""
    got = NUMPY["absorb"](*tracked(state, absorb_options(n_evicted, max_clusters, sink=sink)))
    assert got is not NotImplemented
    return arrays_of(got)


def absorbed_by_portable_code(state: State, n_evicted: int, max_clusters: int, *, sink: int = 3) -> dict[str, Any]:
    with using_backend("portable"):
        return arrays_of(absorb(*tracked(state, absorb_options(n_evicted, max_clusters, sink=sink))))


CASES: dict[str, dict[str, Any]] = {
    "all compared": {},
    "one stream": {"streams": 1, "nearest": 0.9},
    "some cached": {"streams": 3, "nearest": 0.8},
    "few cached": {"nearest": 0.2},
    "float64": {"dtype": np.float64, "nearest": 0.8},
    "one band": {"dims": (6, 5), "nearest": 0.8},
    "no sinks": {"capacity": (0, 7), "nearest": 0.8},
    "some without a query": {"asked": 0.5, "nearest": 0.8},
    "none with a query": {"asked": 0.0, "nearest": 0.8},
    "more than a block": {"n_clusters": 330},
}


@needs_loops
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("most", [1, 30, 43])
def test_compiled_loops_absorb_as_the_portable_code(case: dict[str, Any], most: int) -> None:
    state = full_state(**{"n_clusters": 40, **case})
    n, n_evicted = state.clusters.counts.shape[1], 5
    sink = case.get("capacity", (3, 12))[0]
    most += n - 40
    before = [x.copy() for _, x in leaves(state)]
    got = absorbed_by_loops(state, n_evicted, most, sink=sink)
    for (name, x), y in zip(leaves(state), before, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=f"{name} was written to")
    expected = absorbed_by_portable_code(state, n_evicted, most, sink=sink)
    # Sums in another order: 2^-24 of float32 a few dozen times, on numbers of order 1.
    tolerance = 1e-5 if state.exact.keys.dtype == np.float32 else 1e-12
    assert set(got) == set(expected)
    for name, x in expected.items():
        if not np.issubdtype(x.dtype, np.floating):
            np.testing.assert_array_equal(got[name], x, err_msg=name)
        else:
            np.testing.assert_allclose(got[name], x, rtol=tolerance, atol=tolerance, err_msg=name)
        assert got[name].dtype == x.dtype, name


@needs_loops
@pytest.mark.parametrize("asked", [0.0, 0.5, 1.0])
def test_compiled_loops_absorb_float16_as_the_portable_code(asked: float) -> None:
    state = full_state(40, nearest=0.8, dtype=np.float16, asked=asked)
    got = absorbed_by_loops(state, 5, 30)
    expected = absorbed_by_portable_code(state, 5, 30)
    assert set(got) == set(expected)
    for name, x in expected.items():
        assert got[name].dtype == x.dtype, name
        if x.dtype == np.float16:
            # A number that lies on the edge of another, to the rounding of its sums, and those just below a power of 2.
            assert (got[name] != x).mean() < 0.002, name
            np.testing.assert_allclose(got[name], x, rtol=2.0**-9, err_msg=name)
        else:
            np.testing.assert_array_equal(got[name], x, err_msg=name)


@needs_loops
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_compiled_loops_absorb_into_int8_means(dtype: type) -> None:
    state = full_state(40, nearest=0.8, dtype=dtype, quantized=True)
    got = absorbed_by_loops(state, 5, 30)
    expected = absorbed_by_portable_code(state, 5, 30)
    assert set(got) == set(expected) > {"clusters.keys.codes", "clusters.values.scales"}
    for name, x in expected.items():
        assert got[name].dtype == x.dtype, name
        assert got[name].shape == x.shape, name
        if name in ("clusters.keys.codes", "clusters.values.codes"):
            # A number that lies on the edge of a code, to the rounding of its sums.
            assert (got[name] != x).mean() < 0.002, name
            np.testing.assert_allclose(got[name], x, atol=1, err_msg=name)
        else:
            tolerance = 2.0**-9 if x.dtype == np.float16 else 1e-5
            np.testing.assert_allclose(got[name], x, rtol=tolerance, atol=1e-5, err_msg=name)


@needs_loops
def test_a_refresh_compares_all_whatever_is_cached() -> None:
    state = full_state(40, nearest=0.8)
    options = absorb_options(5, 43)  # with a larger surplus all would be compared without it
    nothing_cached = replace(state.clusters, nearest=np.full_like(state.clusters.nearest, -1))
    got = NUMPY["absorb"](state, replace(options, refresh=True))
    expected = NUMPY["absorb"](replace(state, clusters=nothing_cached), options)
    for (name, x), (_, y) in zip(leaves(got), leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)
    kept = NUMPY["absorb"](state, options)
    assert (kept.clusters.nearest != got.clusters.nearest).any()


@needs_loops
def test_compiled_loops_take_streams_that_lie_apart() -> None:
    state = full_state(40, nearest=0.8)
    expected = absorbed_by_loops(state, 5, 30)
    loops: Any = subgen_numpy.compiled("absorb")
    kinds = len(loops.absorb.signatures)

    def apart(x: NDArray[Any]) -> NDArray[Any]:  # other numbers behind each stream
        return np.concatenate([x, x], axis=1)[:, : x.shape[1]]

    clusters, exact = state.clusters, state.exact
    unaligned = np.frombuffer(b"x" + clusters.values.tobytes(), np.float32, offset=1).reshape(clusters.values.shape)
    counts = clusters.counts.copy()
    counts.flags.writeable = False
    clusters = replace(clusters, keys=apart(clusters.keys), values=unaligned, counts=counts)
    exact = replace(exact, keys=apart(exact.keys), values=np.asfortranarray(exact.values))
    got = absorbed_by_loops(replace(state, clusters=clusters, exact=exact), 5, 30)
    for name, x in expected.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)
    assert len(loops.absorb.signatures) == kinds, "compiled again for another kind of array"


def spoil(state: State, how: str) -> None:
    clusters, exact = state.clusters, state.exact
    if how == "free places":
        clusters.counts[1, 3] = 0
        for x in (clusters.keys, clusters.values, clusters.key_variance, clusters.importance):
            x[1, 3] = 0
    elif how == "no importance":
        clusters.importance[1, 7] = 0
    elif how == "large keys":
        clusters.keys[1] *= 1e17
        exact.keys[1] *= 1e17
    elif how == "large queries":
        exact.queries.scales[1] = 1e30
    elif how == "no query counts":
        exact.queries.codes[:] = 0


@needs_loops
@pytest.mark.parametrize("how", ["free places", "no importance", "large keys", "large queries", "no query counts"])
def test_streams_beyond_the_loops_are_absorbed_by_the_portable_steps(how: str) -> None:
    """The second stream equals the portable result; the first equals the one without such a neighbour."""
    state = full_state(40)
    options = absorb_options(5, 30)
    plain = arrays_of(NUMPY["absorb"](*tracked(state, options)))
    spoil(state, how)
    with np.errstate(all="ignore"):
        got = arrays_of(NUMPY["absorb"](*tracked(state, options)))
        expected = arrays_of(PORTABLE["absorb"](*tracked(state, options)))
    assert set(got) == set(expected)
    assert "clusters.nearest" not in got
    for name, x in expected.items():
        assert np.isfinite(got[name]).all(), name
        if (
            how != "no query counts" and x.ndim
        ):  # which is true of both streams, and loops take it: the metric has no direction
            np.testing.assert_array_equal(got[name][1], x[1], err_msg=name)
            np.testing.assert_array_equal(got[name][0], plain[name][0], err_msg=name)


def test_nothing_is_absorbed_by_loops_that_are_missing() -> None:
    state = full_state(40)
    options = absorb_options(5, 30)
    with without_loops():
        assert NUMPY["absorb"](state, options) is NotImplemented
        got = absorb(state, options)
    expected = PORTABLE["absorb"](state, options)
    assert got.clusters.counts.shape == (2, 30)
    tree_map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5) or x, got, expected)
