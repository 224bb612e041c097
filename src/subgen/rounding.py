"""Rounding means to 16 or 8 bits so that they do not stall.

A token moves the mean of n others by about 1/n; once that is below half a unit of the last place, rounding to nearest
loses it every time, and the mean stands still. Dithered by one such unit, the rounding is right on average.

Squares of keys of 1e-4 are below the least float16, and those of 300 beyond the largest: in 16 bits, numbers that grow
as squares are stored as their roots, and the scales of codes in another unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ._array import Array, Namespace, array_namespace, clip, finfo, positions
from .counter import DRAW_BITS, draws, stream_key

__all__ = [
    "GOLDEN",
    "LARGEST_ROOT",
    "SCALE_UNIT",
    "SNAP",
    "Codes",
    "Dither",
    "dequantize",
    "dither",
    "dithers",
    "from_roots",
    "quantize",
    "round_roots",
    "round_to",
    "scale_unit",
]

# The golden ratio: its multiples, modulo 1, are spread evenly.
GOLDEN = 0.6180339887498949
# Codes this near to an integer are that integer: what was read from codes goes back to the same.
SNAP = 2.0**-10
# The square of it fits float32.
LARGEST_ROOT = 2.0**63
# Unit of the scales of codes in 16 bits: a 127th of a float16 may be less than the least one, and 64 times as much is
# a float16 still. A power of two changes no bit of others.
SCALE_UNIT = 2.0**-6


@dataclass(frozen=True)
class Dither:
    """Numbers in [0, 1) that a rounding is dithered by: one was drawn for all, and is shifted by the element.

    Attributes
    ----------
    drawn : float
        In (0, 1).
    """

    drawn: float

    def __call__(self, x: Array) -> Array:
        """Return them in the shape and dtype of an array, but for its first axis, of length 1: streams share them."""
        xp = array_namespace(x)
        u = xp.astype(positions(math.prod(x.shape[1:]), x), xp.float64) * GOLDEN + self.drawn
        return xp.reshape(xp.astype(u - xp.floor(u), x.dtype), (1, *x.shape[1:]))


def dither(seed: int, purpose: int, number: int) -> Dither:
    """Draw the dither of one rounding: a function of its arguments."""
    # Python's integers draw it, and no device is asked for it.
    return Dither(draws(_key(seed, purpose), 0, number) * 2.0**-DRAW_BITS)


def dithers(seed: int, purpose: int, numbers: range) -> list[Dither]:
    """Draw the dither of each of many roundings at once; see `dither`."""
    drawn = draws(_key(seed, purpose), 0, np.asarray(numbers)) * 2.0**-DRAW_BITS
    return [Dither(x) for x in drawn.tolist()]


@lru_cache(maxsize=64)
def _key(seed: int, purpose: int) -> tuple[int, int]:
    return stream_key(seed, purpose, 0)


def round_to(x: Array, dtype: object, uniform: Dither) -> Array:
    """Round to a dtype: plainly to 32 bits and more, dithered to 16.

    Numbers that the dtype holds exactly stay as they are; numbers beyond it become its largest.

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
    """Round numbers that grow as squares: to 16 bits their roots, dithered, and plainly to more; see `round_to`.

    Parameters
    ----------
    x : array, shape (streams, ...)
        float32 or float64, none below zero.
    dtype : floating dtype
    uniform : Dither

    Returns
    -------
    array, shape (streams, ...)
        `from_roots` gives them back. What did not change keeps its bits: roots of 16 bits have squares in float32.
    """
    xp = array_namespace(x)
    return round_to(xp.sqrt(x) if finfo(dtype, xp).bits <= 16 else x, dtype, uniform)


def from_roots(x: Array, dtype: object) -> Array:
    """Return the numbers that `round_roots` stored, in a dtype of 32 bits or more.

    Roots of more than ``LARGEST_ROOT``, of which bfloat16 has some and float16 none, count as that.
    """
    xp = array_namespace(x)
    bits = finfo(x.dtype, xp).bits
    x = xp.astype(x, dtype, copy=False)
    if bits > 16:
        return x
    x = clip(x, None, LARGEST_ROOT)
    return x * x


@dataclass(frozen=True)
class Codes:
    """Vectors in 8 bits, each with one scale.

    Attributes
    ----------
    codes : int8 array, shape (streams, n, dim)
        -127 to 127.
    scales : array, shape (streams, n)
        What a code of 1 stands for; see `scale_unit` for its unit.
    """

    codes: Array
    scales: Array

    def each(self, function: Callable[[Any], Any]) -> Codes:
        """Apply a function to both arrays."""
        return Codes(function(self.codes), function(self.scales))

    def part(self, places: slice) -> Codes:
        """Return the vectors in some places."""
        return self.each(lambda x: x[:, places, ...])


def quantize(x: Array, dtype: object, uniform: Dither | None = None) -> Codes:
    """Round vectors to 8 bits, to nearest or dithered.

    What `subgen.rounding.dequantize` gave goes back to the same codes.

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
    Codes
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
    # The largest keeps its code, and with it the scale of the next rounding.
    rounded = xp.where(magnitude == peak, xp.copysign(xp.full_like(x, 127.0), x), rounded)
    rounded = xp.where(step > 0, clip(rounded, -127.0, 127.0), xp.zeros_like(rounded))
    return Codes(xp.astype(rounded, xp.int8), scales[:, :, 0])


def dequantize(codes: Codes, dtype: object) -> Array:
    """Return the vectors: array of the dtype, shape (streams, n, dim)."""
    xp = array_namespace(codes.codes)
    unit = scale_unit(codes.scales.dtype, xp)
    return xp.astype(codes.codes, dtype) * (xp.astype(codes.scales, dtype)[:, :, None] * unit)


def scale_unit(dtype: object, xp: Namespace) -> float:
    """Return the unit of scales of a dtype: ``SCALE_UNIT`` in 16 bits, 1 in more."""
    return SCALE_UNIT if finfo(dtype, xp).bits <= 16 else 1.0
