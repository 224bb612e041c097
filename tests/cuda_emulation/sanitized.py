"""Runs kernels at awkward sizes under the address sanitizer; to be started with its library loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from subgen_cupy import absorb, append, attend, leaders, merging

from subgen._tree import tree_map
from subgen.default.absorb import AbsorbOptions
from subgen.default.quantization import draw_dithers
from subgen.default.state import BufferOwner, Clusters, Exact, Quantized, State

from . import EmulatedDevice

__all__ = ["main"]


def main() -> None:
    """Run every kernel; an access out of bounds ends the process with a report."""
    device = EmulatedDevice(sanitize=True)
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.integers(-4, 5, size=shape).astype(np.float32)

    def draw_codes(n: int, dim: int, dtype: type = np.float32) -> Quantized:
        return Quantized(draw(2, n, dim).astype(np.int8), abs(draw(2, n)).astype(dtype))

    def draw_clusters(n: int, dims: tuple[int, int], means: Any = None, **more: Any) -> Clusters:
        bands = 4 if dims[0] % 4 == 0 else 1
        counts, variance = abs(draw(2, n)).astype(np.int64), abs(draw(2, n, bands))
        return Clusters(*(means or [draw(2, n, dim) for dim in dims]), counts, variance, abs(draw(2, n)), **more)

    # Odd lengths, rows that do not fill a tile, and dimensions that do not fill the lanes.
    for n, c, rows in [(1, 1, 3), (37, 45, 7)]:
        exact, weights = [draw(2, n, 24), draw(2, n, 40)], draw(2, rows, n)
        attend.attention(device, draw(2, rows, 24), *exact, draw_clusters(c, (24, 40)), weights)
    for n, n_exact, dims, group in [(0, 0, (3, 5), 1), (37, 11, (40, 3), 5)]:
        counters = np.zeros(2, np.int64)
        append.count_tokens(device, counters, n_exact, n_exact)
        for means in (None, [draw_codes(n, dim) for dim in dims]):
            buffers, owner = [draw(2, 12, dim) for dim in dims], BufferOwner(n_exact)
            tokens = Exact(*buffers, draw_codes(12, dims[0]), n_exact, owner)
            state = State(draw_clusters(n, dims, means), tokens, None, n_exact)
            for given in (None, counters):
                token = draw(2, group, dims[0]), *(draw(2, 1, dim) for dim in dims)
                append.decode_token(device, state, *token, 0.5, given)
    for n, capacity, head_dim in [(1, 1, 3), (45, 37, 40)]:
        n_clusters = np.array([0, capacity])
        leaders.leaders(device, draw(2, n, head_dim), draw(2, capacity, head_dim), n_clusters, 9.0)
    for n, left, dims in [(1, 1, (8, 3)), (45, 20, (40, 3)), (133, 120, (5, 7))]:
        clusters = draw_clusters(n, dims, leaders=draw(2, n, dims[0]).astype(np.float16))
        metric = np.tile(np.eye(dims[0], dtype=np.float32), (2, 1, 1))
        merging.shrink(device, clusters, metric, np.ones(2, np.float32), left, left)
        nearest = np.where(clusters.counts > 0, rng.integers(-1, n, size=(2, n)), -1).astype(np.int32)
        merging.shrink(device, replace(clusters, nearest=nearest), metric, np.ones(2, np.float32), left, left)
    for n, window, n_evicted, dims in [(0, 1, 1, (3, 5)), (37, 45, 20, (40, 3))]:
        nearest = rng.integers(-1, max(n, 1), size=(2, n)).astype(np.int32)
        clusters = tree_map(
            lambda x: x if x.dtype.kind == "i" else x.astype(np.float16), draw_clusters(n, dims, nearest=nearest)
        )
        keys, values = (draw(2, window + 2, dim).astype(np.float16) for dim in dims)
        options = AbsorbOptions(2, n_evicted, 1.0, None, None, draw_dithers(0, [2])[0])
        pool, _ = absorb.gather(device, clusters, keys[:, 2:], values[:, 2:], options)
        quantized = replace(clusters, **{
            name: draw_codes(n, dim, np.float16) for name, dim in zip(("keys", "values"), dims, strict=True)
        })  # fmt: skip
        absorb.gather(device, quantized, keys[:, 2:], values[:, 2:], options)
        exact = Exact(keys, values, draw_codes(window + 2, dims[0]), window + 2, BufferOwner(None))
        for scales in (exact.queries.scales, exact.queries.scales * 0):  # with queries, and without
            queries = replace(exact.queries, scales=scales)
            absorb.query_moment(device, replace(exact, queries=queries), 2, None)
        for wanted in (False, True):
            new = absorb.new_arrays(device, pool, exact, wanted)
            absorb.store(device, new, pool, exact, options)
    append.quantize(device, draw(4, 9, 37)[:, 2:5], 2, 0.3, 5)
    print("done")


if __name__ == "__main__":
    main()
