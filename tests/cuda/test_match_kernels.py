"""The kernel of match.cu: which pairs of clusters merge, and where every cluster goes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import cuda_targets
import numpy as np
import pytest
from cuda_cases import cached_neighbours, make_clusters
from cuda_targets import Target
from subgen_cupy import merging

from subgen._tree import leaves
from subgen.default.merging import _compared


def rounds_of_mutual_neighbours(
    costs: np.ndarray, surplus: int, compared: np.ndarray | None = None
) -> tuple[dict[int, int], list[int]]:
    """Return the second of each pair by its first, and the nearest of unpaired clusters: a stream, written out."""
    pairs: dict[int, int] = {}
    free = [True] * len(costs)
    while True:
        masked = np.where(np.array(free)[None, :] & (True if compared is None else compared), costs, np.inf)
        nearest = [int(np.argmin(row)) for row in masked]
        if surplus <= 0:
            break
        round_ = [
            (masked[i, j], i, j)
            for i, j in enumerate(nearest)
            if free[i] and i < j and nearest[j] == i and masked[i, j] < np.inf
        ]
        if not round_:
            break
        for _, i, j in sorted(round_)[:surplus]:
            pairs[i] = j
            free[i] = free[j] = False
        surplus -= min(surplus, len(round_))
    return pairs, [j if free[i] and masked[i, j] < np.inf else -1 for i, j in enumerate(nearest)]


def in_tiles(costs: np.ndarray) -> np.ndarray:
    """Pad costs to whole tiles."""
    padding = (0, -costs.shape[2] % 128)
    return np.pad(costs, ((0, 0), padding, padding), constant_values=np.nan)


# The share of clusters that are new, if neighbours are cached. With few, all are compared.
@pytest.mark.parametrize("new", [None, 0.3, 0.0])
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("n", "max_clusters"), [(1, 1), (2, 1), (37, 30), (64, 20), (100, 60), (150, 149), (33, 40), (40, 1)]
)
def test_pairs_are_matched_as_written_out_with_many_ties(
    target: Target, n: int, max_clusters: int, seed: int, new: float | None
) -> None:
    target = target.seeded(seed)
    rng = np.random.default_rng(seed)
    streams = 2
    costs = rng.integers(0, 4 if seed % 2 else 1000, size=(streams, n, n)).astype(np.float32)
    costs = np.minimum(costs, costs.swapaxes(1, 2))
    counts = (rng.random((streams, n)) < 0.9).astype(np.int64)
    possible = (counts[:, :, None] > 0) & (counts[:, None, :] > 0) & ~np.eye(n, dtype=bool)
    costs[~possible] = np.inf
    cached = compared = None
    given = costs
    if new is not None:
        cached = cached_neighbours(rng, counts, new)
        live = counts > 0
        given = np.where(_compared(cached, live, np.zeros((streams, 1))) | ~possible, costs, -costs)
        compared = _compared(cached, live, live.sum(axis=1, keepdims=True) - max_clusters)
    capacity = min(n, max_clusters + 3)
    assignment = target.put(np.full((streams, n), -1))
    # The order in which rows of costs are read; the result does not depend on it.
    importance = rng.integers(0, 5, size=(streams, n)).astype(np.float32)
    arrays = map(target.put, (in_tiles(given), counts, importance, cached))
    source, other, nearest = merging.match(target.device, *arrays, max_clusters, capacity, assignment, True)
    assert (nearest is None) == (new is None)
    source, other, assignment = map(target.get, (source, other, assignment))
    for s in range(streams):
        live = [i for i in range(n) if counts[s, i] > 0]
        surplus = len(live) - max_clusters
        pairs, left = rounds_of_mutual_neighbours(costs[s], surplus, None if compared is None else compared[s])
        gone = set(pairs.values())
        kept = [i for i in live if i not in gone]
        expected = [(i, pairs.get(i, -1)) for i in kept] + [(i, -2) for i in range(n) if i not in kept]
        assert list(zip(source[s].tolist(), other[s].tolist(), strict=True)) == expected[:capacity]
        place = {i: p for p, (i, _) in enumerate(expected)}
        place |= {j: place[i] for i, j in pairs.items()}
        assert assignment[s].tolist() == [place[i] for i in range(n)]
        if cached is not None:
            if surplus <= 0:
                left = cached[s].tolist()
            neighbours = [-1 if left[i] < 0 else place[left[i]] for i, _ in expected]
            assert target.get(nearest)[s].tolist() == neighbours[:capacity]


@pytest.mark.parametrize("seed", [1, 2])
def test_one_block_and_many_match_a_stream_alike(seed: int) -> None:
    target = cuda_targets.emulation()
    rng = np.random.default_rng(seed)
    keys, counts = rng.normal(size=(2, 530, 8)).astype(np.float32), np.ones((2, 530), np.int64)
    keys[0] = rng.integers(-2, 3, size=(530, 8))  # many costs are equal
    importance = rng.random((2, 530)).astype(np.float32)
    variance, nearest = np.zeros((2, 530, 4), np.float32), np.full((2, 530), -1, np.int32)
    clusters = make_clusters(keys, keys, counts, variance, importance=importance, nearest=nearest)
    results = []
    for together in (False, True):
        device: Any = replace(target.seeded(seed).device, clusters=together)  # type: ignore[type-var]
        merged, assignment = merging.shrink(device, clusters, None, np.ones(2, np.float32), 300, 300)
        results.append({**dict(leaves(merged)), "assignment": assignment})
        blocks = [launch.blocks for launch in device.launches if launch.kernel == "match_pairs"]
        assert blocks == ([16] if together else [2])
    one, many = results
    assert one.keys() == many.keys() >= {"keys", "nearest", "assignment"}
    for name in one:
        np.testing.assert_array_equal(one[name], many[name], err_msg=name)


def test_shared_memory_has_space_for_many_clusters() -> None:
    assert merging.MAX_CLUSTERS >= 1024 + 512
    assert math.isclose(merging._match_shared(merging.MAX_CLUSTERS, 1), 48 << 10, rel_tol=0.02)
