"""Numbers in 16 bits: float16, and bfloat16, which NumPy lacks and of which it sees the words."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from subgen._array import FloatInfo
from subgen.default.quantization import LARGEST_ROOT, SCALE_UNIT

__all__ = [
    "BFLOAT16",
    "LIMITS",
    "from_roots",
    "like",
    "saturating_cast",
    "saturating_cast_scales",
    "upcast",
    "upcast_scales",
]

#: In arrays of this dtype each number is a bfloat16: the upper half of a float32.
BFLOAT16 = np.dtype(np.uint16)
#: What is computed with in float32.
LIMITS = {
    np.dtype(np.float16): FloatInfo(16, 2.0**-10, 65504.0, 2.0**-14),
    BFLOAT16: FloatInfo(16, 2.0**-7, (2.0 - 2.0**-7) * 2.0**127, 2.0**-126),
}

_HALF = np.uint32(16)


@cache
def like(dtype: DTypeLike) -> NDArray[Any]:
    """Return an empty array of the dtype that compiled loops use for another: int16 for words of float16."""
    return np.empty(0, np.int16 if np.dtype(dtype) == np.float16 else dtype)


def upcast(x: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Cast to a dtype to compute in."""
    if x.dtype == BFLOAT16:
        bits = x.astype(np.uint32)
        bits <<= _HALF
        x = bits.view(np.float32)
    return x.astype(dtype, copy=False)


def from_roots(x: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Cast numbers that grow as squares to a dtype to compute in; see `subgen.default.quantization.from_roots`."""
    if x.dtype not in LIMITS:
        return x.astype(dtype, copy=False)
    squares: NDArray[Any] = np.square(np.minimum(upcast(x, dtype), LARGEST_ROOT))
    return squares


def upcast_scales(x: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Cast the scales of codes to a dtype to compute in, whose unit is 1."""
    scales = upcast(x, dtype)
    return scales * SCALE_UNIT if x.dtype in LIMITS else scales  # a Python float keeps the dtype


def saturating_cast_scales(x: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Round scales of codes to a dtype, in its unit."""
    return saturating_cast(x / SCALE_UNIT if np.dtype(dtype) in LIMITS else x, dtype)


def saturating_cast(x: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Round numbers other than NaN to nearest, ties to even."""
    if np.dtype(dtype) != BFLOAT16:
        return x.astype(dtype, copy=False)
    bits = x.astype(np.float32, order="C").view(np.uint32)
    bits += np.uint32(0x7FFF) + ((bits >> _HALF) & np.uint32(1))
    return (bits >> _HALF).astype(BFLOAT16)
