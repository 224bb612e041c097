"""Rounding means to 16 bits so that they do not stall.

A token moves the mean of n others by about 1/n; once that is below half a unit of the last place, rounding to nearest
loses it every time, and the mean stands still. Dithered by one such unit, the rounding is right on average.
"""

from __future__ import annotations

from ._array import Array, array_namespace, positions
from .backends import Operations
from .counter import DRAW_BITS, draws, stream_key

__all__ = ["round_to"]

_PURPOSE = 3
# The golden ratio: its multiples, modulo 1, are spread evenly.
_GOLDEN = 0.6180339887498949


def round_to(x: Array, dtype: object, seed: int, number: int, ops: Operations) -> Array:
    """Round to a dtype: plainly to 32 bits and more, dithered to 16.

    Numbers that the dtype holds exactly stay as they are.

    Parameters
    ----------
    x : array, shape (streams, n, dim)
        float32 or float64.
    dtype : floating dtype
    seed, number : int
        What the dither is drawn from; streams and elements share one draw, shifted by the element.
    ops : Operations

    Returns
    -------
    array, shape (streams, n, dim)
    """
    xp = array_namespace(x)
    info = xp.finfo(dtype)
    if info.bits > 16:
        return xp.astype(x, dtype, copy=False)
    size = x.shape[1] * x.shape[2]
    zero = xp.zeros((1,), dtype=xp.int64, device=x.device)
    drawn = draws(stream_key(seed, _PURPOSE, zero, ops.threefry2x32), zero, zero + number, ops.threefry2x32)
    u = xp.astype(positions(size, x), xp.float64) * _GOLDEN + xp.astype(drawn, xp.float64) * 2.0**-DRAW_BITS
    u = xp.reshape(xp.astype(u - xp.floor(u), x.dtype), (1, *x.shape[1:]))
    # The unit of the last place: a power of two below |x|, times eps.
    magnitude = xp.abs(x)
    smallest = float(info.smallest_normal)
    exponent = xp.floor(xp.log2(xp.where(magnitude > smallest, magnitude, xp.full_like(magnitude, smallest))))
    unit = xp.pow(xp.full_like(exponent, 2.0), exponent) * float(info.eps)
    nearest = xp.astype(x, dtype)
    exact = xp.astype(nearest, x.dtype) == x
    largest = float(info.max)
    dithered = xp.astype(xp.clip(x + (u - 0.5) * unit, -largest, largest), dtype)
    return xp.where(exact, nearest, dithered)
