"""Rounding vectors to 8 bits in few passes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from subgen import rounding
from subgen.rounding import Codes, Dither

__all__ = ["quantize"]


def quantize(x: NDArray[np.floating[Any]], dtype: DTypeLike, uniform: Dither | None = None) -> Codes:
    """Round vectors to 8 bits; see `subgen.rounding.quantize`.

    Rounded to nearest, the largest number gets its code without being told, but for scales near the end of the dtype.
    """
    if uniform is None:
        peak = np.maximum(x.max(axis=-1), -x.min(axis=-1))
        scales = (peak / x.dtype.type(127)).astype(dtype)
        limits = np.finfo(scales.dtype)
        if scales.min() >= limits.smallest_normal and scales.max() <= limits.max:
            codes = x / scales.astype(x.dtype)[:, :, None]
            return Codes(np.rint(codes, out=codes).astype(np.int8), scales)
    return rounding.quantize(x, dtype, uniform)
