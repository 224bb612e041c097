"""Round means to 16 bits and to int8 with dither, so that they do not stall.

A token moves the mean of n others by about 1/n. Once that is below half a unit of the last place, rounding to nearest
loses it every time, and the mean stands still. Dithered by one such unit, the rounding is right on average.

Squares of keys of 1e-4 are below the least float16, and those of 300 beyond the largest. So 16 bits store numbers that
grow as squares by their roots, and the scales of codes in another unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .._array import Array, Namespace, array_namespace, clip, finfo, positions
from .._random import DRAW_BITS, draws, stream_key
from .state import Quantized

__all__ = [
    "GOLDEN",
    "LARGEST_ROOT",
    "SCALE_UNIT",
    "SNAP",
    "Dither",
    "Dithers",
    "dequantize",
    "draw_dithers",
    "from_roots",
    "quantize",
    "round_roots",
    "round_to",
    "scale_unit",
]

# The golden ratio: its multiples, modulo 1, are spread evenly.
GOLDEN = 0.6180339887498949
# A quotient this near to an integer is that integer: what was dequantized is quantized to the same code.
SNAP = 2.0**-10
# Its square fits float32.
LARGEST_ROOT = 2.0**63
# Unit of the scales of codes in 16 bits: a 127th of a float16 may be below the least one; 64 times as much is a
# float16 still. A power of two changes no bit of the others.
SCALE_UNIT = 2.0**-6


@dataclass(frozen=True)
class Dither:
    """Numbers in [0, 1) to dither a rounding by: one random number, shifted by a multiple of the golden ratio.

    Attributes
    ----------
    drawn : float
        In (0, 1).
    """

    drawn: float

    def __call__(self, x: Array) -> Array:
        """Return them in the dtype of an array and in its shape, with a first axis of length 1: streams share them."""
        xp = array_namespace(x)
        u = xp.astype(positions(math.prod(x.shape[1:]), x), xp.float64) * GOLDEN + self.drawn
        return xp.reshape(xp.astype(u - xp.floor(u), x.dtype), (1, *x.shape[1:]))


@dataclass(frozen=True)
class Dithers:
    """The dither of each array of clusters."""

    keys: Dither
    values: Dither
    key_variance: Dither
    importance: Dither


# Purposes of the draws; 1 and 2 are the reservoirs of `subgen.paper`, 7 the residual sample.
_PURPOSES = (3, 4, 5, 6)


def draw_dithers(seed: int, times: Sequence[int]) -> list[Dithers]:
    """Draw the dithers of several roundings at once, each a function of the seed and of the time.

    Parameters
    ----------
    seed : int
    times : sequence of int
        Tokens seen when each rounding happens.

    Returns
    -------
    list of Dithers
    """
    # Python's integers and NumPy's draw them, without a transfer from any device.
    numbers = times[0] if len(times) == 1 else np.asarray(times)
    drawn = [draws(_key(seed, purpose), 0, numbers) * 2.0**-DRAW_BITS for purpose in _PURPOSES]
    rows = zip(*(np.atleast_1d(x).tolist() for x in drawn), strict=True)
    return [Dithers(*(Dither(x) for x in row)) for row in rows]


@lru_cache(maxsize=64)
def _key(seed: int, purpose: int) -> tuple[int, int]:
    return stream_key(seed, purpose, 0)


def round_to(x: Array, dtype: object, uniform: Dither) -> Array:
    """Round to a dtype: to nearest with 32 bits and more, dithered with 16.

    Numbers that the dtype holds exactly are unchanged; numbers beyond it become its largest.

    Parameters
    ----------
    x : array, shape (streams, ...)
        float32 or float64.
    dtype : floating dtype
    uniform : Dither

    Returns
    -------
    array, shape (streams, ...)
    """
    xp = array_namespace(x)
    info = finfo(dtype, xp)
    if info.bits > 16:
        return xp.astype(x, dtype, copy=False)
    u = uniform(x)
    # The unit of the last place: a power of two below |x|, times eps.
    magnitude = xp.abs(x)
    smallest = info.smallest_normal
    exponent = xp.floor(xp.log2(xp.where(magnitude > smallest, magnitude, xp.full_like(magnitude, smallest))))
    unit = xp.pow(xp.full_like(exponent, 2.0), exponent) * info.eps
    largest = info.max
    nearest = xp.astype(clip(x, -largest, largest), dtype)
    exact = xp.astype(nearest, x.dtype) == x
    dithered = xp.astype(clip(x + (u - 0.5) * unit, -largest, largest), dtype)
    return xp.where(exact, nearest, dithered)


def round_roots(x: Array, dtype: object, uniform: Dither) -> Array:
    """Round numbers that grow as squares: to 16 bits their roots, dithered; to more the numbers.

    Parameters
    ----------
    x : array, shape (streams, ...)
        float32 or float64, none below zero.
    dtype : floating dtype
    uniform : Dither

    Returns
    -------
    array, shape (streams, ...)
        `from_roots` converts it back. Unchanged numbers keep their bits: roots of 16 bits have squares in float32.
    """
    xp = array_namespace(x)
    return round_to(xp.sqrt(x) if finfo(dtype, xp).bits <= 16 else x, dtype, uniform)


def from_roots(x: Array, dtype: object) -> Array:
    """Convert what `round_roots` returned to a dtype of 32 bits or more.

    Roots of more than ``LARGEST_ROOT``, of which bfloat16 has some and float16 none, count as that.
    """
    xp = array_namespace(x)
    bits = finfo(x.dtype, xp).bits
    x = xp.astype(x, dtype, copy=False)
    if bits > 16:
        return x
    x = clip(x, None, LARGEST_ROOT)
    return x * x


def scale_unit(dtype: object, xp: Namespace) -> float:
    """Return the unit of scales of a dtype: ``SCALE_UNIT`` in 16 bits, 1 in more."""
    return SCALE_UNIT if finfo(dtype, xp).bits <= 16 else 1.0


def quantize(x: Array, dtype: object, uniform: Dither | None = None) -> Quantized:
    """Round vectors to int8, to nearest or dithered.

    What `dequantize` returned is quantized to the same codes.

    Parameters
    ----------
    x : array, shape (streams, n, dim)
        float32 or float64.
    dtype : floating dtype
        Of the scales.
    uniform : Dither, optional
        ``None`` rounds to nearest.

    Returns
    -------
    Quantized
    """
    xp = array_namespace(x)
    magnitude = xp.abs(x)
    peak = xp.max(magnitude, axis=-1, keepdims=True)
    unit = scale_unit(dtype, xp)
    scales = xp.astype(peak / (127.0 * unit), dtype)
    step = xp.astype(scales, x.dtype) * unit
    codes = x / xp.where(step > 0, step, xp.ones_like(step))
    nearest = xp.round(codes)
    rounded = nearest
    if uniform is not None:
        rounded = xp.where(xp.abs(codes - nearest) < SNAP, nearest, xp.floor(codes + uniform(codes)))
    # The largest element keeps its code, and so the scale of the next rounding.
    rounded = xp.where(magnitude == peak, xp.copysign(xp.full_like(x, 127.0), x), rounded)
    rounded = xp.where(step > 0, clip(rounded, -127.0, 127.0), xp.zeros_like(rounded))
    return Quantized(xp.astype(rounded, xp.int8), scales[:, :, 0])


def dequantize(x: Quantized, dtype: object) -> Array:
    """Convert codes back to vectors: array of the dtype, shape (streams, n, dim)."""
    xp = array_namespace(x.codes)
    unit = scale_unit(x.scales.dtype, xp)
    return xp.astype(x.codes, dtype) * (xp.astype(x.scales, dtype)[:, :, None] * unit)
