"""Round to int8 and to 16 bits in one pass, compiled by numba.

To int8 equal to `subgen.default.quantization.quantize` to the last bit. To 16 bits equal to
`subgen.default.quantization.round_to` except just below a power of two, where that one's logarithm may be rounded up.

Used where numba is installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from subgen.default.quantization import GOLDEN, SNAP

from ._numba_float16 import narrow, power_below, upcast
from ._numba_streams import OPTIONS, finish, take_next, view_at, wait

__all__ = ["dithered", "rounded"]

_single = np.float32


@njit(**OPTIONS)
def dithered(tickets: Any, waits: Any, places: Any, like: Any, drawn: float, codes: Any) -> None:
    """Round the vectors of each stream, dithered; several threads may do so at once.

    Parameters
    ----------
    tickets : int64 array, shape (2,)
        Zeros; the same for all threads.
    waits : bool
        Whether to wait for what others do.
    places : int64 array, shape (3, 2)
        Where there are, see `subgen_numpy._numba_streams.view_at`: numbers, shape (streams, n, dim), and of each
        vector the largest magnitude and the scale, both in their dtype.
    like : array
        Of that dtype.
    drawn : float
        See `subgen.default.quantization.Dither`.
    codes : int8 array, shape (streams, n, dim)
        Written.
    """
    streams, n, dim = codes.shape
    one, zero, snap, most = like.dtype.type(1), like.dtype.type(0), like.dtype.type(SNAP), like.dtype.type(127)
    while True:
        s = take_next(tickets)
        if s >= streams:
            break
        numbers = view_at(places, 0, s, (n, dim), like)
        peaks, scales = view_at(places, 1, s, (n,), like), view_at(places, 2, s, (n,), like)
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
        finish(tickets)
    if waits:
        wait(tickets, streams)


@njit(**OPTIONS)
def rounded(
    tickets: Any,
    waits: Any,
    places: Any,
    like: Any,
    words: Any,
    streams: int,
    size: int,
    drawn: float,
    largest: Any,
    smallest: Any,
    eps: Any,
) -> None:
    """Round the numbers of each stream to 16 bits, dithered; several threads may do so at once.

    Parameters
    ----------
    tickets : int64 array, shape (2,)
        Zeros; the same for all threads.
    waits : bool
        Whether to wait for what others do.
    places : int64 array, shape (2, 2)
        Where there are, see `subgen_numpy._numba_streams.view_at`: numbers, float32, shape (streams, size), and
        their words, which are written.
    like : float32 array
    words : array
        Of words; see `subgen_numpy._float16`.
    streams, size : int
    drawn : float
        See `subgen.default.quantization.Dither`.
    largest, smallest, eps : float32
        Of the dtype to round to: see `subgen._array.FloatInfo`.
    """
    while True:
        s = take_next(tickets)
        if s >= streams:
            break
        numbers, written = view_at(places, 0, s, (size,), like), view_at(places, 1, s, (size,), words)
        for i in range(size):
            x = numbers[i]
            u = np.float64(i) * GOLDEN + drawn
            unit = power_below(max(abs(x), smallest)) * eps
            moved = x + (_single(u - np.floor(u)) - _single(0.5)) * unit
            # What is exact stays; NaN compares as false and is moved, to NaN.
            moved = x if upcast(narrow(_within(x, largest), words)) == x else moved
            written[i] = narrow(_within(moved, largest), words)
        finish(tickets)
    if waits:
        wait(tickets, streams)


@njit(**OPTIONS)
def _within(x: Any, largest: Any) -> Any:
    """Give a number between the largest ones; NaN stays."""
    x = largest if x > largest else x
    return -largest if x < -largest else x
