"""`AttentionSketch.take`: rows of a batch picked, repeated and reordered are streams of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from libraries import NUMPY, Library, skip_compiling, to_numpy
from sketches import feed

from subgen import AttentionSketch


def default() -> AttentionSketch:
    return AttentionSketch(max_clusters=6, window=4, sink=2)


def paper() -> AttentionSketch:
    return AttentionSketch.paper(delta=1.0, samples_per_cluster=2, value_samples=8)


def blocks(seed: int, rows: int = 3, n: int = 30) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(rows, 4, n, 4))
    k, v = rng.normal(size=(2, rows, 2, n, 4))
    return tuple(x.astype(np.float32) for x in (q, k, v))


@pytest.mark.parametrize("make", [default, paper])
def test_rows_that_were_taken_continue_as_if_they_had_been_fed_so_from_the_start(library: Library, make: Any) -> None:
    if make is paper:
        skip_compiling(library)
    rows, n = ([2, 0, 2], 12) if library.compiles else ([2, 0, 2, 1], 30)
    first, second = blocks(0, n=n), blocks(1, len(rows), n)
    sketch, expected = make(), make()
    feed(sketch, *(library.array(x) for x in (first[1], first[2], first[0])))
    before = to_numpy(sketch.attend(library.array(first[0])))
    feed(expected, *(library.array(x[rows]) for x in (first[1], first[2], first[0])))

    taken = sketch.take(library.array(np.asarray(rows)))
    more = [library.array(x) for x in second]
    np.testing.assert_allclose(to_numpy(taken.step(*more)), to_numpy(expected.step(*more)), rtol=1e-5, atol=1e-5)
    assert (taken.n_seen, taken.nbytes) == (2 * n, expected.nbytes)
    np.testing.assert_array_equal(to_numpy(taken.n_clusters), to_numpy(expected.n_clusters))
    # The sketch itself is as it was.
    np.testing.assert_array_equal(to_numpy(sketch.attend(library.array(first[0]))), before)
    assert sketch.n_seen == n


def test_a_list_of_rows_will_do() -> None:
    q, k, v = blocks(0)
    sketch = default()
    sketch.update(k, v, queries=q)
    np.testing.assert_array_equal(sketch.take([1]).attend(q[1:2]), sketch.take(np.array([1])).attend(q[1:2]))


@pytest.mark.parametrize(
    ("indices", "error", "match"),
    [
        ([], ValueError, "at least one entry"),
        ([3], ValueError, "at most 2"),
        ([-1], ValueError, "at least 0"),
        ([0.5], TypeError, "integer"),
        (np.zeros((2, 2), dtype=np.int64), ValueError, r"shape \(2, 2\)"),
        (np.zeros(2), TypeError, "float64"),
    ],
)
def test_bad_indices(indices: Any, error: type[Exception], match: str) -> None:
    q, k, v = blocks(0)
    sketch = default()
    sketch.update(k, v, queries=q)
    with pytest.raises(error, match=match):
        sketch.take(indices)


def test_nothing_to_take_from() -> None:
    with pytest.raises(RuntimeError, match="empty"):
        default().take([0])
    sketch = default()
    q, k, v = (NUMPY.array(x[0]) for x in blocks(0))
    sketch.update(k, v, queries=q)
    with pytest.raises(ValueError, match="rows of a batch"):
        sketch.take([0])
