"""Rounding to 8 bits compiled by numba, in one pass: equal to `subgen.rounding.quantize` to the last bit.

Used where numba is installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from subgen.rounding import GOLDEN, SNAP

from ._compiled_streams import OPTIONS, finish, in_memory, take_next, wait

__all__ = ["dithered"]


@njit(**OPTIONS)
def dithered(turns: Any, waits: Any, places: Any, like: Any, drawn: float, codes: Any) -> None:
    """Round the vectors of each stream, dithered; several threads may do so at once.

    Parameters
    ----------
    turns : int64 array, shape (2,)
        Zeros; the same for all threads.
    waits : bool
        Whether to wait for what others do.
    places : int64 array, shape (3, 2)
        Where there are, see `subgen_numpy._compiled_streams.in_memory`: numbers, shape (streams, n, dim), and of each
        vector the largest magnitude and the scale, both in their dtype.
    like : array
        Of that dtype.
    drawn : float
        See `subgen.rounding.Dither`.
    codes : int8 array, shape (streams, n, dim)
        Written.
    """
    streams, n, dim = codes.shape
    one, zero, snap, most = like.dtype.type(1), like.dtype.type(0), like.dtype.type(SNAP), like.dtype.type(127)
    while True:
        s = take_next(turns)
        if s >= streams:
            break
        numbers = in_memory(places, 0, s, (n, dim), like)
        peaks, scales = in_memory(places, 1, s, (n,), like), in_memory(places, 2, s, (n,), like)
        for i in range(n):
            peak, scale = peaks[i], scales[i]
            step = scale if scale > zero else one
            for t in range(dim):
                x = numbers[i, t]
                code = x / step
                nearest = np.rint(code)
                u = np.float64(i * dim + t) * GOLDEN + drawn
                rounded = np.floor(code + like.dtype.type(u - np.floor(u)))
                rounded = nearest if abs(code - nearest) < snap else rounded
                # The largest keeps its code, and with it the scale of the next rounding.
                rounded = (most if x > zero else -most) if abs(x) == peak else rounded
                rounded = most if rounded > most else -most if rounded < -most else rounded
                codes[s, i, t] = np.int8(rounded) if scale > zero else np.int8(0)
        finish(turns)
    if waits:
        wait(turns, streams)
