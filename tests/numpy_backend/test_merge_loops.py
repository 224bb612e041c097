"""Compiled loops that choose the pairs to merge, beside NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import subgen_numpy
from states import SEED, full_state
from switches import needs_loops, without_loops

from subgen._tree import leaves

merge_closest = subgen_numpy.BACKEND.operations["merge_closest"]


@needs_loops
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n_clusters", "most"), [(214, 150), (48, 37), (812, 780), (40, 1)])
@pytest.mark.parametrize("nearest", [None, 0.7])
def test_compiled_loops_merge_as_numpy_does(dtype: type, n_clusters: int, most: int, nearest: float | None) -> None:
    clusters = full_state(n_clusters, streams=3, dims=(16, 16), dtype=dtype, nearest=nearest).clusters
    if nearest is None:  # then all products are BLAS's, and ties are ties for both
        for x in (clusters.keys, clusters.values, clusters.importance):
            x[:, 5:25] = x[:, 5:6]
    queries = np.random.default_rng(SEED).normal(size=(3, 40, 16)).astype(dtype)
    metric, unit = queries.swapaxes(1, 2) @ queries / 40, np.ones(3, dtype)
    got, assignment = merge_closest(clusters, metric, unit, most, most)
    with without_loops():
        expected, expected_assignment = merge_closest(clusters, metric, unit, most, most)
    np.testing.assert_array_equal(assignment, expected_assignment)
    for (name, x), (other, y) in zip(leaves(got), leaves(expected), strict=True):
        assert name == other
        np.testing.assert_array_equal(x, y, err_msg=name)
