"""How much of the costs a matching reads on a GPU: ``python asv_benchmarks/matching.py [CAPTURE]``.

A model of `match_pairs` in NumPy, beside the rounds written out: how often a cluster loses its nearest other, and over
how many rows of costs it passes if only those clusters look whose blockers were taken; see kernels/match.cu. The last
few absorptions of a stream of random numbers, and of the keys of a language model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import subgen
from subgen import backends
from subgen.default import merging
from subgen.io.captures import read_capture, sample

INDEX = 0x1FFF  # the low bits of an order, which tell equal importances apart
BLOCKERS = 4
AT_ONCE = 384  # columns
LAST = 6  # absorptions counted of each stream

Floats = NDArray[np.floating[Any]]


def rounds(costs: Floats, surplus: int) -> tuple[list[NDArray[np.int64]], int]:
    """Pairs of each round, as (first, second), and how often an open cluster lost its nearest other."""
    n, lost, pairs = len(costs), 0, []
    is_open, nearest = np.ones(n, bool), np.full(n, -1)
    while surplus > 0:
        masked = np.where(is_open[:, None] & is_open[None, :], costs, np.inf)
        now, cost = masked.argmin(axis=1), masked.min(axis=1)
        alive = cost < np.inf
        lost += int((alive & (nearest >= 0) & (now != nearest)).sum())
        nearest = np.where(alive, now, -1)
        first = np.flatnonzero(alive & (np.arange(n) < now) & (now[now] == np.arange(n)))
        if not first.size:
            break
        first = first[np.argsort(cost[first], kind="stable")][:surplus]
        is_open[first] = is_open[now[first]] = False
        surplus -= first.size
        pairs.append(np.sort(np.stack([first, now[first]]), axis=1))
    return pairs, lost


def blocked(costs: Floats, importance: Floats, pairs: list[NDArray[np.int64]]) -> float:
    """Rows of costs passed over, parts of them added up, when in each round these pairs are found and taken."""
    n, passed = len(costs), 0.0
    order = importance.astype(np.float32).view(np.int32) & ~INDEX | np.arange(n)
    lane = np.arange(n) // 4 % 32
    is_open = np.ones(n, bool)
    blockers: list[list[int]] = [[] for _ in range(n)]
    proposal = [-1] * n  # the proposal of a cluster; itself if it has blockers

    def nearer(row: Floats, columns: NDArray[np.int64], bound: float, than: int) -> NDArray[np.int64]:
        return columns[(row[columns] < bound) | (row[columns] == bound) & (columns < than)]

    def dearest(row: Floats, columns: NDArray[np.int64]) -> list[int]:
        return columns[np.argsort(-row[columns], kind="stable")][:BLOCKERS].tolist()

    def of_each_lane(columns: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first of each lane."""
        return columns[np.unique(lane[columns], return_index=True)[1]]

    def blockers_of(row: Floats, bound: float, than: int) -> list[int]:
        """The dearest of each lane that is nearer, from the end of the row on, no further than there are enough."""
        nonlocal passed
        found = np.zeros(0, np.int64)
        for start in range((n - 1) // AT_ONCE * AT_ONCE, -1, -AT_ONCE):
            part = start + np.flatnonzero(is_open[start : start + AT_ONCE])
            found = np.concatenate([found, nearer(row, part, bound, than)])
            found = of_each_lane(found[np.argsort(-row[found], kind="stable")])
            passed += min(AT_ONCE, n - start) / n
            if len(found) >= BLOCKERS:
                break
        return dearest(row, found)

    for taken in [*pairs, np.zeros((2, 0), np.int64)]:
        for i in np.flatnonzero(is_open):
            if proposal[i] >= 0 and is_open[proposal[i]] and any(is_open[blocker] for blocker in blockers[i]):
                continue
            row, behind = costs[i], is_open & (order > order[i])
            cost = np.where(behind, row, np.inf)
            nearest = int(cost.argmin())
            passed += 1
            before = np.flatnonzero(is_open & (order < order[i]))
            before = of_each_lane(before[np.argsort(row[before], kind="stable")])
            blockers[i], proposal[i] = dearest(row, nearer(row, before, cost[nearest], nearest)), i
            if not blockers[i] and cost[nearest] < np.inf:
                blockers[i], proposal[i] = blockers_of(costs[nearest], cost[nearest], i), nearest
        is_open[taken.ravel()] = False
    return passed


def count(keys: Floats, values: Floats, queries: Floats, clusters: int, window: int) -> tuple[int, NDArray[np.float64]]:
    """Clusters before a merging, and of the last absorptions: pairs, rounds, nearest others lost, rows passed over."""
    seen: list[tuple[Floats, Floats, int]] = []
    costs_of, match = merging.ward_costs, merging._match
    importance: list[Floats] = []

    def costs(clusters: Any, *rest: Any) -> Any:
        importance[:] = list(clusters.importance)
        return costs_of(clusters, *rest)

    def matched(costs: Any, surplus: Any) -> Any:
        seen.extend(zip(costs, importance, surplus[:, 0].tolist(), strict=True))
        del seen[: -LAST * len(costs)]
        return match(costs, surplus)

    backends.register(backends.Backend("numpy"), replace=True)  # the portable operations
    merging.ward_costs, merging._match = costs, matched
    try:
        subgen.AttentionSketch(clusters, window=window).update(keys, values, queries=queries)
    finally:
        merging.ward_costs, merging._match = costs_of, match
    counted = []
    for of_stream, order_by, surplus in seen:
        pairs, lost = rounds(of_stream, surplus)
        counted.append((surplus, len(pairs), lost, blocked(of_stream, order_by, pairs)))
    return len(seen[0][0]), np.mean(counted, axis=0)


def main(
    capture: Annotated[Path | None, typer.Argument(help="keys, values and queries of a model; else the sample")] = None,
) -> None:
    """Count, and print a table."""
    rng = np.random.default_rng(0)
    real = sample() if capture is None else read_capture(capture)
    table = Table("keys", "clusters", "pairs", "rounds", "nearest others lost", "rows passed over")
    for name, clusters, window in [("random", 1024, 512), ("random", 1024, 2048), ("a model's", 512, 256)]:
        if name == "random":
            given = [rng.normal(size=(heads, 8 * window + 4096, 128)).astype(np.float32) for heads in (1, 1, 4)]
        else:
            given = [x.astype(np.float32) for x in (real.k, real.v, real.q)]
        n, (pairs, turns, lost, passed) = count(given[0], given[1], given[2], clusters, window)
        table.add_row(name, str(n), *(f"{x:.0f}" for x in (pairs, turns, lost, passed)))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
