"""Compiled loops that answer a few rows, beside NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import subgen_numpy
from states import SEED, random_clusters, state_of
from switches import needs_loops, without_loops

from subgen._checks import MOST_TOKENS
from subgen.default.state import Clusters

attend = subgen_numpy.BACKEND.operations["attend"]


@needs_loops
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 32])
@pytest.mark.parametrize(
    ("clusters", "n", "dims"), [(0, 1, (8, 8)), (3, 3, (4, 8)), (30, 13, (12, 7)), (64, 64, (64, 32)), (5, 0, (8, 8))]
)
@pytest.mark.parametrize("stored", [np.float32, np.float16])
@pytest.mark.parametrize("quantized", [False, True])
def test_compiled_loops_attend_as_numpy_does(
    rows: int, clusters: int, n: int, dims: tuple[int, int], stored: Any, quantized: bool
) -> None:
    rng = np.random.default_rng(SEED)
    keys, values = (rng.normal(size=(3, n + 5, dim)).astype(stored) for dim in dims)
    held = random_clusters(rng, (3, clusters), dims, stored, quantized=quantized)
    state = state_of(keys, values, held, n=n)
    queries = rng.normal(size=(3, rows, dims[0])).astype(np.float32)
    got = attend(state, queries)
    with without_loops():
        expected = attend(state, queries)
    # Logits of up to 40 here: units of 2^-18 of theirs, a few of them, are errors of weights.
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5, atol=4e-5)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-5, atol=2e-6)


@needs_loops
def test_compiled_loops_attend_to_nothing_and_to_what_is_no_number() -> None:
    rng = np.random.default_rng(SEED)
    keys, values, queries = (rng.normal(size=(4, 9, 8)).astype(np.float32) for _ in range(3))
    counts = np.ones((4, 9), np.int64)
    counts[0] = 0  # every place is free
    keys[1, 8] = np.nan
    queries[2, 1] = np.nan
    keys[3, 4] *= 1e19
    held = Clusters(keys, values, counts, np.zeros((4, 9, 4), np.float32), np.ones((4, 9), np.float32))
    state = state_of(np.zeros((4, 2, 8), np.float32), np.zeros((4, 2, 8), np.float32), held, n=0)
    outputs, logsumexp = attend(state, queries[:, :4])
    assert (outputs[0] == 0).all()
    assert (logsumexp[0] == -np.inf).all()
    assert np.isnan(outputs[1]).all()
    assert np.isnan(logsumexp[1]).all()
    assert np.isnan(outputs[2]).all(axis=-1).tolist() == [False, True, False, False]
    sees = queries[3, :4] @ keys[3, 4] > 0
    np.testing.assert_array_equal(outputs[3][sees], np.broadcast_to(values[3, 4], (4, 8))[sees])
    assert np.isfinite(outputs[3]).all()


@needs_loops
def test_logarithms_of_counts() -> None:
    loops: Any = subgen_numpy.compiled("attend")
    powers = 2 ** np.arange(62)
    counts = np.unique(np.concatenate([np.arange(5000), powers - 1, powers, [MOST_TOKENS]]))
    logs = np.empty(counts.size, np.float32)
    loops._logarithms(counts, logs)
    assert logs[0] == -np.inf
    assert logs[1] == 0
    np.testing.assert_allclose(logs[2:], np.log(counts[2:].astype(np.float64)), rtol=2e-7)
