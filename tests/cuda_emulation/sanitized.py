"""Runs kernels at awkward sizes under the address sanitizer; to be started with its library loaded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from subgen_cupy import _absorbing, _attention, _decoding, _leaders, _merging, _rounding, _threefry

from subgen.absorbing import Dithers, Exact
from subgen.merging import Means
from subgen.rounding import Codes, dither

from . import EmulatedDevice
from .mutants import Sketch

__all__ = ["main"]


def main() -> None:
    """Run every kernel; an access out of bounds ends the process with a report."""
    device = EmulatedDevice(sanitize=True)
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.integers(-4, 5, size=shape).astype(np.float32)

    def coded(n: int, dim: int, dtype: type = np.float32) -> Codes:
        return Codes(draw(2, n, dim).astype(np.int8), abs(draw(2, n)).astype(dtype))

    # Odd lengths, rows that do not fill a tile, and dimensions that do not fill the lanes.
    for n, c, rows in [(1, 1, 3), (37, 45, 7)]:
        q, k, v = draw(2, rows, 24), draw(2, c + n, 24), draw(2, c + n, 40)
        weights, counts, spread = draw(2, rows, n), abs(draw(2, c)), abs(draw(2, c, 4))
        _attention.attend(device, q, k, v, (counts.astype(np.int64), spread), weights)
    for clusters, n_exact, dims, group in [(0, 0, (3, 5), 1), (37, 11, (40, 3), 5)]:
        spread, codes = abs(draw(2, clusters, 4 if dims[0] % 4 == 0 else 1)), draw(2, 9, dims[0]).astype(np.int8)
        counts = abs(draw(2, clusters)).astype(np.int64)
        buffers, queries = [draw(2, clusters + 12, dim) for dim in dims], Codes(codes, abs(draw(2, 9)))
        held = Sketch(*buffers, counts, spread, None, None, queries, clusters, n_exact, n_exact)
        counters = np.zeros(2, np.int64)
        _decoding.count_tokens(device, counters, n_exact, n_exact)
        means = [coded(clusters, dim) for dim in dims]
        exact = [x[:, clusters:].copy() for x in buffers]
        in_8_bits = replace(held, keys=exact[0], values=exact[1], key_codes=means[0], value_codes=means[1], n_means=0)
        for given in (None, counters):
            for each in (held, in_8_bits):
                token = draw(2, group, dims[0]), *(draw(2, 1, dim) for dim in dims)
                _decoding.decode(device, each, *token, 0.5, given)
    for n, capacity, head_dim in [(1, 1, 3), (45, 37, 40)]:
        clusters = np.array([0, capacity])
        _leaders.leaders(device, draw(2, n, head_dim), draw(2, capacity, head_dim), clusters, 9.0)
    for n, most, dims in [(1, 1, (8, 3)), (45, 20, (40, 3)), (133, 120, (5, 7))]:
        counts, spread, importance = abs(draw(2, n)).astype(np.int64), abs(draw(2, n, 1)), abs(draw(2, n))
        leaders = draw(2, n, dims[0]).astype(np.float16)
        means = Means(draw(2, n, dims[0]), draw(2, n, dims[1]), counts, spread, importance, leaders)
        metric = np.tile(np.eye(dims[0], dtype=np.float32), (2, 1, 1))
        _merging.shrink(device, means, metric, np.ones(2, np.float32), most, most)
        known = np.where(counts > 0, rng.integers(-1, n, size=(2, n)), -1).astype(np.int32)
        _merging.shrink(device, replace(means, nearest=known), metric, np.ones(2, np.float32), most, most)
    for c, window, leave, dims in [(0, 1, 1, (3, 5)), (37, 45, 20, (40, 3))]:
        counts, bands = abs(draw(2, c)).astype(np.int64), 4 if dims[0] % 4 == 0 else 1
        held = Means(draw(2, c, dims[0]), draw(2, c, dims[1]), counts, abs(draw(2, c, bands)), abs(draw(2, c)))
        held = replace(held, nearest=rng.integers(-1, max(c, 1), size=(2, c)).astype(np.int32))
        held = held.each(lambda x: x if x.dtype.kind == "i" else x.astype(np.float16))
        keys, values = (draw(2, window + 2, dim).astype(np.float16) for dim in dims)
        queries = Codes(draw(2, window, dims[0]).astype(np.int8), abs(draw(2, window)))
        pool, _ = _absorbing.collect(device, held, keys[:, 2:], values[:, 2:], leave, 1.0)
        in_codes = replace(held, keys=coded(c, dims[0], np.float16), values=coded(c, dims[1], np.float16))
        _absorbing.collect(device, in_codes, keys[:, 2:], values[:, 2:], leave, 1.0)
        _absorbing.query_moment(device, queries, window)
        _absorbing.key_moment(device, keys, None)
        exact = Exact(keys, values, queries, (True,) * window)
        for wanted in (False, True):
            _absorbing.settle(device, pool, exact, leave, Dithers(*[dither(0, 1, 2)] * 4), wanted)
    _rounding.query_codes(device, draw(4, 9, 37)[:, 2:5], 2, 0.3, 5)
    words = tuple(rng.integers(0, 1 << 32, size=(4, 300)))
    _threefry.threefry(device, words)
    print("done")


if __name__ == "__main__":
    main()
