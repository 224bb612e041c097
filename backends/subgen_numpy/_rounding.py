"""Rounding to 8 bits in few passes, and, dithered, to 8 and 16 in a compiled one where numba is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from subgen import rounding
from subgen.rounding import Codes, Dither

from ._compiled import compiled, in_memory
from ._threads import helped
from ._words import LIMITS, like, narrowed_scales, widened_scales

__all__ = ["quantize", "quantize_by_loops", "round_by_loops"]

# Numbers that are worth a thread.
_WORTH_A_THREAD = 2**19


def quantize(x: NDArray[np.floating[Any]], dtype: DTypeLike, uniform: Dither | None = None) -> Codes:
    """Round vectors to 8 bits; see `subgen.rounding.quantize`.

    Rounded to nearest, the largest number gets its code by itself, except for scales near the end of the dtype: vectors
    with such scales are rounded separately.
    """
    if uniform is not None:
        if x.size and x.dtype.itemsize >= 4 and compiled("rounding"):
            return quantize_by_loops(x, dtype, uniform)
        return rounding.quantize(x, dtype, uniform)
    scales = narrowed_scales(_peaks(x) / x.dtype.type(127), dtype)
    limits = np.finfo(scales.dtype)
    if scales.min() >= limits.smallest_normal and scales.max() <= limits.max:
        codes = x / widened_scales(scales, x.dtype)[:, :, None]
        return Codes(np.rint(codes, out=codes).astype(np.int8), scales)
    plain = (scales >= limits.smallest_normal) & (scales <= limits.max)
    rounded = np.empty(x.shape, np.int8)
    rounded[plain] = np.rint(x[plain] / widened_scales(scales[plain], x.dtype)[:, None])
    rounded[~plain] = rounding.quantize(x[~plain][None], dtype).codes[0]
    return Codes(rounded, scales)


def quantize_by_loops(x: NDArray[np.floating[Any]], dtype: DTypeLike, uniform: Dither) -> Codes:
    """Round vectors to 8 bits, dithered, by compiled loops that must be there; scales may be words of `_words`."""
    peak = _peaks(x)
    scales = narrowed_scales(peak / x.dtype.type(127), dtype)
    codes = np.empty(x.shape, np.int8)
    places, arrays = in_memory(x, peak, widened_scales(scales, x.dtype))
    loops: Any = compiled("rounding")
    kind = like(x.dtype)

    # The arrays are there as long as a thread may come.
    def work(turns: NDArray[np.int64], waits: bool, _: object = arrays) -> None:
        loops.dithered(turns, waits, places, kind, uniform.drawn, codes)

    helped(work, min(x.shape[0], x.size // _WORTH_A_THREAD))
    return Codes(codes, scales)


def round_by_loops(x: NDArray[np.float32], uniform: Dither, to: NDArray[Any]) -> None:
    """Round to float16 or to words of bfloat16, dithered, by compiled loops that must be there.

    Parameters
    ----------
    x : array, shape (streams, ...)
    uniform : Dither
    to : array, shape (streams, ...)
        Written. The numbers of a stream lie together.
    """
    limits = LIMITS[to.dtype]
    limited = [np.float32(number) for number in (limits.max, limits.smallest_normal, limits.eps)]
    places, arrays = in_memory(x, to)
    loops: Any = compiled("rounding")
    kinds, sizes = (like(np.float32), like(to.dtype)), (x.shape[0], x[0].size)

    # The arrays are there as long as a thread may come.
    def work(turns: NDArray[np.int64], waits: bool, _: object = arrays) -> None:
        loops.rounded(turns, waits, places, *kinds, *sizes, uniform.drawn, *limited)

    helped(work, min(x.shape[0], x.size // _WORTH_A_THREAD))


def _peaks(x: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Return the largest magnitude of each vector."""
    peaks: NDArray[np.floating[Any]] = np.maximum(x.max(axis=-1), -x.min(axis=-1))
    return peaks
