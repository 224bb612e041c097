"""Half a window joins the clusters in compiled loops, streams in threads: what a stream holds stays in the cache.

Streams whose numbers are beyond the loops go through the portable steps one by one; the others are unaffected.
Where numba and SciPy are not installed, `subgen.absorbing` runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from subgen import absorbing
from subgen.absorbing import Absorbed, Absorption, Dithers, Exact, Settled
from subgen.merging import Means
from subgen.rounding import Codes, Dither, dequantize

from ._compiled import compiled, in_memory
from ._merging import WORTH_A_THREAD
from ._rounding import quantize_by_loops, round_by_loops
from ._threads import helped
from ._words import LIMITS, from_roots, narrowed, widened, widened_scales

__all__ = ["absorb", "absorb_by_loops"]

Floats = NDArray[np.floating[Any]]


def absorb(held: Means, exact: Exact, told: Absorption, ops: Any) -> Absorbed:
    """Let the oldest tokens of the window join the clusters, and merge; see `subgen.absorbing.absorb`."""
    absorbed = absorb_by_loops(held, exact, told, ops)
    return absorbing.absorb(held, exact, told, ops) if absorbed is None else absorbed


def absorb_by_loops(held: Means, exact: Exact, told: Absorption, ops: Any) -> Absorbed | None:
    """Do what `absorb` does, or nothing: numbers may be words of bfloat16, see `subgen_numpy._words`.

    Returns
    -------
    Absorbed or None
        The latter where there are no loops, or they are not for what is given.
    """
    loops = compiled("absorbing")
    stored, queries = exact.keys.dtype, exact.queries
    wide = np.dtype(np.float32) if stored in LIMITS else stored
    known = wide in (np.float32, np.float64) and held.spread.dtype == stored
    if loops is None or not known or held.leaders is not None:
        return None
    held = _in_wide(held, wide)
    exact = Exact(widened(exact.keys, wide), widened(exact.values, wide), queries, exact.asked)
    (streams, n), room, leave = held.counts.shape, exact.keys.shape[1], told.leave
    most = min(told.most, n + leave)
    every = all(exact.asked)
    metrics = exact.keys if every else ops.query_moment(exact.window[0], queries, exact.asked, told.scale)
    held_counts = held.counts.astype(np.int64, copy=False)
    places, arrays = in_memory(
        *(held.keys, held.values, held_counts, held.spread, held.importance),
        held_counts if held.nearest is None else held.nearest,
        *(exact.keys, exact.values, queries.codes, queries.scales, metrics),
    )
    new_keys, new_values = (np.empty((streams, most + room, x.shape[-1]), wide) for x in (exact.keys, exact.values))
    counts, spread, importance = (
        np.empty((streams, most, *x.shape[2:]), x.dtype) for x in (held_counts, held.spread, held.importance)
    )
    nearest = np.empty((streams, 0 if held.nearest is None else most), np.int32)
    codes, scales = np.empty_like(queries.codes), np.empty_like(queries.scales)
    moved, odd = np.empty((streams, n + leave), np.int64), ~held.counts.all(axis=1)
    written = new_keys, new_values, counts, spread, importance, nearest, codes, scales, moved
    integers = np.empty(0, np.int32 if wide == np.float32 else np.int64)

    # The arrays are there as long as a thread may come.
    def work(turns: NDArray[np.int64], waits: bool, _: object = arrays) -> None:
        loops.absorb(turns, waits, odd, integers, places, every, told.weight, leave, *written)

    helped(work, streams * (n + leave) // WORTH_A_THREAD, blas=True)
    for s in np.flatnonzero(odd):
        _absorb_one(slice(s, s + 1), held, exact, told, ops, written)
    settled = _settled(
        new_keys, new_values, spread, importance, Codes(codes, scales), most, stored, told.dithers, told.coded
    )
    return Absorbed(settled, counts, None if held.nearest is None else nearest, moved)


def _absorb_one(
    own: slice, held: Means, exact: Exact, told: Absorption, ops: Any, written: tuple[NDArray[Any], ...]
) -> None:
    """Absorb in one stream by the portable steps, in the dtype to compute in, and write what loops would."""
    plain = replace(told, coded=False)  # all streams are rounded together, later
    done = absorbing.absorb(held.each(lambda x: x[own]), exact.each(lambda x: x[own]), plain, ops)
    new = done.settled
    results = (new.keys, new.values, done.counts, new.spread, new.importance, done.nearest)
    for to, x in zip(written, (*results, new.queries.codes, new.queries.scales, done.moved), strict=True):
        if x is not None:
            to[own] = x


def _in_wide(means: Means, wide: Any) -> Means:
    """Cast what is stored to the dtype to compute in; see `subgen.absorbing.widened`."""

    def cast(x: Any) -> Any:
        if isinstance(x, Codes):
            return dequantize(Codes(x.codes, widened_scales(x.scales, wide)), wide)
        return widened(x, wide)

    keys, values = map(cast, (means.keys, means.values))
    spread, importance = (from_roots(x, wide) for x in (means.spread, means.importance))
    return replace(means, keys=keys, values=values, spread=spread, importance=importance)


def _settled(
    keys: Floats,
    values: Floats,
    spread: Floats,
    importance: Floats,
    queries: Codes,
    clusters: int,
    stored: np.dtype[Any],
    dithers: Dithers,
    coded: bool,
) -> Settled:
    """Round clusters, and the exact tokens behind them, to what they are stored in; see `subgen.absorbing.settle`."""

    def rounded(x: Floats, uniform: Dither, n: int) -> NDArray[Any]:
        """Round the first, dithered; the others are exact as they are."""
        if x.dtype == stored:
            return x
        written = np.empty(x.shape, stored)
        round_by_loops(x[:, :n], uniform, written[:, :n])
        written[:, n:] = narrowed(x[:, n:], stored)
        return written

    key_codes = value_codes = None
    if coded:
        # Rounded where they are, and the exact tokens by themselves.
        key_codes = quantize_by_loops(keys[:, :clusters], stored, dithers.keys)
        value_codes = quantize_by_loops(values[:, :clusters], stored, dithers.values)
        keys, values = (narrowed(np.ascontiguousarray(x[:, clusters:]), stored) for x in (keys, values))
    else:
        keys, values = rounded(keys, dithers.keys, clusters), rounded(values, dithers.values, clusters)
    if stored in LIMITS:
        spread, importance = np.sqrt(spread), np.sqrt(importance)
    return Settled(
        keys,
        values,
        rounded(spread, dithers.spread, clusters),
        rounded(importance, dithers.importance, clusters),
        key_codes,
        value_codes,
        queries,
    )
