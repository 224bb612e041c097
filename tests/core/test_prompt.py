"""A prompt compressed at once: its merges against brute force, faster versions, and the weights of tokens."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import subgen_numpy
from libraries import LIBRARIES, Library, skip_compiling, to_numpy
from switches import without_loops

from subgen import AttentionSketch
from subgen._tree import tree_map
from subgen.backends import PORTABLE
from subgen.default.prompt import Prompt, agglomerate, prompt_weights


@pytest.fixture(params=["numba", "numpy"])
def loops(request: pytest.FixtureRequest) -> Any:
    """With compiled loops, and without."""
    if request.param == "numba" and subgen_numpy.compiled("prompt") is None:
        pytest.skip("numba is not installed")
    with without_loops() if request.param == "numpy" else nullcontext():
        yield


def prompt(n: int, streams: int = 2, dim: int = 8, dtype: Any = np.float32, seed: int = 0) -> Prompt:
    """Draw tokens about a mean far from zero, with a metric that is not isotropic."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(streams, n, dim)) + 10 * rng.normal(size=(streams, 1, dim))
    rows = rng.normal(size=(streams, 3 * dim, dim))
    metric = rows.swapaxes(1, 2) @ rows / (3 * dim)
    weights, scale = np.exp(rng.normal(size=(streams, n))), rng.uniform(1, 3, streams)
    values = rng.normal(size=(streams, n, dim // 2))
    return Prompt(*(x.astype(dtype) for x in (keys, values, weights, metric, scale)))


def by_hand(given: Prompt, max_clusters: int) -> np.ndarray:
    """Merge the cheapest pair of all, from the members of the clusters, one stream of up to 128 tokens at a time."""
    labels = []
    for s in range(given.weights.shape[0]):
        root = np.linalg.cholesky(given.metric[s].astype(np.float64))
        points = np.concatenate([given.keys[s] @ root, given.values[s] / given.value_scale[s]], axis=1)
        groups = [[i] for i in range(points.shape[0])]
        while len(groups) > max_clusters:
            means = [points[g].mean(axis=0) for g in groups]
            weights = [given.weights[s][g].sum(dtype=np.float64) for g in groups]
            cost = {
                (i, j): ((means[i] - means[j]) ** 2).sum() / (1 / weights[i] + 1 / weights[j])
                for j in range(len(groups))
                for i in range(j)
            }
            i, j = min(cost, key=lambda pair: cost[pair])
            groups[i] = sorted(groups[i] + groups.pop(j))
        row = np.empty(points.shape[0], np.int64)
        for place, group in enumerate(sorted(groups)):
            row[group] = place
        labels.append(row)
    return np.stack(labels)


@pytest.mark.usefixtures("loops")
def test_the_cheapest_pair_merges_until_so_many_are_left() -> None:
    given = prompt(60, dtype=np.float64)
    clusters, labels = agglomerate(given, 11)
    np.testing.assert_array_equal(labels, by_hand(given, 11))
    for s in range(2):
        for c in range(11):
            own = labels[s] == c
            assert clusters.counts[s, c] == own.sum()
            np.testing.assert_allclose(clusters.keys[s, c], given.keys[s, own].mean(axis=0))
            np.testing.assert_allclose(clusters.values[s, c], given.values[s, own].mean(axis=0))
            np.testing.assert_allclose(clusters.importance[s, c], given.weights[s, own].sum())
            variance = given.keys[s, own].var(axis=0).reshape(4, 2).mean(axis=1)
            np.testing.assert_allclose(clusters.key_variance[s, c], variance, atol=1e-12)


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("name", [name for name in ("numpy", "torch") if name in LIBRARIES])
@pytest.mark.parametrize(("n", "left"), [(40, 40), (128, 9), (129, 128), (500, 33)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_faster_versions_merge_as_the_portable_code(name: str, n: int, left: int, dtype: Any) -> None:
    library = LIBRARIES[name]
    given = prompt(n, dtype=dtype, seed=n)
    expected, labels = PORTABLE["agglomerate"](given, left)
    arrays = tree_map(library.array, given)
    got, got_labels = agglomerate(arrays, left)
    np.testing.assert_array_equal(to_numpy(got_labels), labels)
    np.testing.assert_array_equal(to_numpy(got.counts), expected.counts)
    for field in ("keys", "values", "key_variance", "importance"):
        mine = to_numpy(getattr(got, field))
        # Sums in another order.
        np.testing.assert_allclose(mine, getattr(expected, field), rtol=1e-4, atol=1e-5, err_msg=field)


def test_other_libraries_merge_the_same(library: Library) -> None:
    skip_compiling(library)
    given = prompt(50)
    _, labels = agglomerate(tree_map(library.array, given), 12)
    np.testing.assert_array_equal(to_numpy(labels), PORTABLE["agglomerate"](given, 12)[1])


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("run", [agglomerate, PORTABLE["agglomerate"]], ids=["numpy", "portable"])
def test_two_tight_groups_far_apart_merge_by_their_own_distances(run: Any) -> None:
    """Squares of 10^8 and nearest distances of 10^-4: float32 products do not have the digits."""
    given = prompt(200)
    apart = np.where(np.arange(200) % 2 == 0, 1e4, -1e4)[None, :, None]
    far = replace(given, keys=(0.01 * given.keys + apart).astype(np.float32))
    precise = tree_map(lambda x: x.astype(np.float64), far)
    labels, expected = run(far, 100)[1], PORTABLE["agglomerate"](precise, 100)[1]
    assert (labels == expected).mean() > 0.95
    for s in range(2):  # no cluster has members of both
        assert not set(labels[s, ::2]) & set(labels[s, 1::2])


@pytest.mark.usefixtures("loops")
@pytest.mark.parametrize("size", [1e18, 1e30])
def test_distances_beyond_the_dtype_merge_all_the_same(size: float) -> None:
    given = prompt(150)
    huge = replace(given, keys=(given.keys * size).astype(np.float32))
    with np.errstate(all="ignore"):
        clusters, labels = agglomerate(huge, 20)
    assert clusters.counts.sum(axis=1).tolist() == [150, 150]
    assert labels.min() == 0
    assert labels.max() == 19


def test_tokens_that_the_last_queries_attend_to_are_heavy() -> None:
    rng = np.random.default_rng(3)
    keys = rng.normal(size=(1, 300, 16)).astype(np.float32)
    queries = np.broadcast_to(4 * keys[:, None, 100:101, :], (1, 2, 300, 16))
    weights = prompt_weights(keys, queries, 0.5, 4, 280)
    assert weights.shape == (1, 280)
    np.testing.assert_allclose(weights.mean(axis=1), 1, rtol=1e-5)
    assert weights.argmax() == 100 - 4
    # Without queries, later tokens are heavier, other things being equal.
    alike = np.broadcast_to(keys[:, :1], keys.shape)
    assert (np.diff(prompt_weights(alike, None, 0.5, 4, 280)) > 0).all()


@pytest.mark.parametrize("with_queries", [True, False])
@pytest.mark.parametrize("what", [1e30, np.nan])
def test_numbers_beyond_the_dtype_and_unchecked_nan_neither_crash_nor_lose_tokens(
    with_queries: bool, what: float
) -> None:
    rng = np.random.default_rng(4)
    q, k, v = (rng.normal(size=(2, 300, 8)).astype(np.float32) for _ in range(3))
    k[:, 50:60] = what
    sketch = AttentionSketch(40, window=16, sink=2, check_finite=False)
    with np.errstate(all="ignore"):
        sketch.prefill(k, v, queries=q * 1e10 if with_queries else None)
    state: Any = sketch.state
    assert state.clusters.counts.sum(axis=1).tolist() == [300 - state.exact.n] * 2
