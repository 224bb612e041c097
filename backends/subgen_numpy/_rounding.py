"""Rounding vectors to 8 bits in few passes, dithered in a compiled one where numba is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from subgen import rounding
from subgen.rounding import Codes, Dither

from ._compiled import compiled, in_memory
from ._threads import helped

__all__ = ["quantize"]

# Numbers that are worth a thread.
_WORTH_A_THREAD = 2**19


def quantize(x: NDArray[np.floating[Any]], dtype: DTypeLike, uniform: Dither | None = None) -> Codes:
    """Round vectors to 8 bits; see `subgen.rounding.quantize`.

    Rounded to nearest, the largest number gets its code without being told, but for scales near the end of the dtype.
    """
    loops = None if uniform is None else compiled("rounding")
    if uniform is not None and (loops is None or x.dtype.itemsize < 4 or x.size == 0):
        return rounding.quantize(x, dtype, uniform)
    peak = np.maximum(x.max(axis=-1), -x.min(axis=-1))
    scales = (peak / x.dtype.type(127)).astype(dtype)
    step = scales.astype(x.dtype, copy=False)
    if uniform is None or loops is None:
        limits = np.finfo(scales.dtype)
        if scales.min() < limits.smallest_normal or scales.max() > limits.max:
            return rounding.quantize(x, dtype)
        codes = x / step[:, :, None]
        return Codes(np.rint(codes, out=codes).astype(np.int8), scales)
    written = np.empty(x.shape, np.int8)
    places, arrays = in_memory(x, peak, step)
    like = np.empty(0, x.dtype)

    # The arrays are there as long as a thread may come.
    def work(turns: NDArray[np.int64], waits: bool, _: object = arrays) -> None:
        loops.dithered(turns, waits, places, like, uniform.drawn, written)

    helped(work, min(x.shape[0], x.size // _WORTH_A_THREAD))
    return Codes(written, scales)
