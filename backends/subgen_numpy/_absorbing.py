"""Half a window joins the clusters in compiled loops, streams in threads: what a stream holds stays in the cache.

Where numba and SciPy are not installed, or numbers are stored in fewer bits than they are computed with, it is
`subgen.absorbing` that does it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from subgen import absorbing
from subgen.absorbing import Absorbed, Dithers, Settled
from subgen.merging import Means
from subgen.rounding import Codes

from ._compiled import compiled, in_memory
from ._merging import WORTH_A_THREAD
from ._threads import helped

__all__ = ["absorb"]

Floats = NDArray[np.floating[Any]]


def absorb(
    held: Means,
    keys: Floats,
    values: Floats,
    queries: Codes,
    asked: tuple[bool, ...],
    scale: float | None,
    leave: int,
    weight: float,
    most: int,
    dithers: Dithers,
    coded: bool,
    ops: Any,
) -> Absorbed:
    """Let the oldest tokens of the window join the clusters, and merge; see `subgen.absorbing.absorb`."""
    given = (held, keys, values, queries, asked, scale, leave, weight, most, dithers, coded, ops)
    loops = compiled("absorbing")
    wide = keys.dtype in (np.float32, np.float64) and held.spread.dtype == keys.dtype
    if loops is None or not wide or held.leaders is not None or not held.counts.all():
        return absorbing.absorb(*given)
    if coded:
        held = absorbing.widened(held, keys.dtype)
    streams, n = held.counts.shape
    room = keys.shape[1]
    most = min(most, n + leave)
    told = all(asked)
    metrics = keys if told else ops.query_moment(keys[:, room - queries.codes.shape[1] :], queries, asked, scale)
    places, arrays = in_memory(
        *(held.keys, held.values, held.counts, held.spread, held.importance),
        held.counts if held.nearest is None else held.nearest,
        *(keys, values, queries.codes, queries.scales, metrics),
    )
    new_keys, new_values = (np.empty((streams, most + room, x.shape[-1]), x.dtype) for x in (keys, values))
    counts, spread, importance = (
        np.empty((streams, most, *x.shape[2:]), x.dtype) for x in (held.counts, held.spread, held.importance)
    )
    nearest = np.empty((streams, 0 if held.nearest is None else most), np.int32)
    codes, scales = np.empty_like(queries.codes), np.empty_like(queries.scales)
    moved, odd = np.empty((streams, n + leave), np.int64), np.empty(streams, np.bool_)
    written = new_keys, new_values, counts, spread, importance, nearest, codes, scales, moved
    integers = np.empty(0, np.int32 if keys.dtype == np.float32 else np.int64)

    # The arrays are there as long as a thread may come.
    def work(turns: NDArray[np.int64], waits: bool, _: object = arrays) -> None:
        loops.absorb(turns, waits, odd, integers, places, told, weight, leave, *written)

    helped(work, streams * (n + leave) // WORTH_A_THREAD, blas=True)
    if odd.any():  # numbers beyond what is done there
        return absorbing.absorb(*given)
    moved_up = Codes(codes, scales)
    if coded:
        # Rounded where they are, and the exact tokens by themselves.
        key_codes = ops.quantize(new_keys[:, :most], keys.dtype, dithers.keys)
        value_codes = ops.quantize(new_values[:, :most], keys.dtype, dithers.values)
        exact_keys, exact_values = (np.ascontiguousarray(x[:, most:]) for x in (new_keys, new_values))
        settled = Settled(exact_keys, exact_values, spread, importance, key_codes, value_codes, moved_up)
    else:
        settled = Settled(new_keys, new_values, spread, importance, None, None, moved_up)
    return Absorbed(settled, counts, None if held.nearest is None else nearest, moved)
