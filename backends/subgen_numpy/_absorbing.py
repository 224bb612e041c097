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

from ._compiled import compiled, packed
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
    loops = compiled("absorbing")
    wide = keys.dtype in (np.float32, np.float64) and held.keys.dtype == held.spread.dtype == keys.dtype
    usual = wide and not coded and held.leaders is None and bool(held.counts.all())
    if loops is not None and usual:
        absorbed = _absorb(loops, held, keys, values, queries, asked, scale, leave, weight, most, ops)
        if absorbed is not None:
            return absorbed
    return absorbing.absorb(held, keys, values, queries, asked, scale, leave, weight, most, dithers, coded, ops)


def _absorb(
    loops: Any,
    held: Means,
    keys: Floats,
    values: Floats,
    queries: Codes,
    asked: tuple[bool, ...],
    scale: float | None,
    leave: int,
    weight: float,
    most: int,
    ops: Any,
) -> Absorbed | None:
    """Do it by compiled loops; None if the numbers of a stream are beyond them."""
    streams, n = held.counts.shape
    room, dim = keys.shape[1], keys.shape[2]
    most = min(most, n + leave)
    if all(asked):
        metrics = np.empty((0, dim, dim), keys.dtype)
    else:
        metrics = ops.query_moment(keys[:, room - queries.codes.shape[1] :], queries, asked, scale)
    nearest = np.empty((streams, 0), np.int32) if held.nearest is None else held.nearest
    given = [held.keys, held.values, held.counts, held.spread, held.importance, nearest]
    given += [keys, values, queries.codes, queries.scales, metrics]
    new_keys, new_values = (np.empty((streams, most + room, x.shape[-1]), x.dtype) for x in (keys, values))
    counts, spread, importance = (
        np.empty((streams, most, *x.shape[2:]), x.dtype) for x in (held.counts, held.spread, held.importance)
    )
    new_nearest = None if held.nearest is None else np.empty((streams, most), np.int32)
    codes, scales = np.empty_like(queries.codes), np.empty_like(queries.scales)
    moved, odd = np.empty((streams, n + leave), np.int64), np.empty(streams, np.bool_)
    written = [new_keys, new_values, counts, spread, importance, nearest if new_nearest is None else new_nearest]
    written += [codes, scales, moved]
    integers = np.empty(0, np.int32 if keys.dtype == np.float32 else np.int64)
    packs = [packed(x) for x in given]
    helped(
        lambda turns, waits: loops.absorb(turns, waits, odd, integers, *packs, weight, leave, *written),
        streams * (n + leave) // WORTH_A_THREAD,
        blas=True,
    )
    if odd.any():
        return None
    settled = Settled(new_keys, new_values, spread, importance, None, None, Codes(codes, scales))
    return Absorbed(settled, counts, new_nearest, moved)
