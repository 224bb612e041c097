"""Round to int8 in few passes and, dithered, to int8 and 16 bits in a compiled one where numba is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from subgen.default.append import quantize_by_parts
from subgen.default.quantization import Dither, quantize
from subgen.default.state import Quantized

from ._float16 import LIMITS, like, saturating_cast_scales, upcast_scales
from ._numba import addresses, compiled
from ._parallel import parallel_for

__all__ = ["quantize_by_loops", "quantize_queries", "quantize_to_nearest", "round_by_loops"]

# Numbers that are worth a thread.
_WORTH_A_THREAD = 2**19


def quantize_to_nearest(x: NDArray[np.floating[Any]], dtype: DTypeLike) -> Quantized:
    """Round vectors to int8, to nearest; see `subgen.default.quantization.quantize`.

    The largest number gets its code by itself, except in vectors whose scale is near the end of the dtype: these go
    through `quantize`.
    """
    scales = saturating_cast_scales(_peaks(x) / x.dtype.type(127), dtype)
    limits = np.finfo(scales.dtype)
    plain = (scales >= limits.smallest_normal) & (scales <= limits.max)
    if plain.all():
        codes = x / upcast_scales(scales, x.dtype)[:, :, None]
        return Quantized(np.rint(codes, out=codes).astype(np.int8), scales)
    rounded = np.empty(x.shape, np.int8)
    rounded[plain] = np.rint(x[plain] / upcast_scales(scales[plain], x.dtype)[:, None])
    rounded[~plain] = quantize(x[~plain][None], dtype).codes[0]
    return Quantized(rounded, scales)


def quantize_queries(queries: NDArray[Any], scale: float, n_seen: int, dtype: DTypeLike) -> Quantized:
    """Select, scale and round a query of each token; see `subgen.default.append.quantize_queries`."""
    return quantize_by_parts(queries, scale, n_seen, lambda rows: quantize_to_nearest(rows, dtype))


def quantize_by_loops(x: NDArray[np.floating[Any]], dtype: DTypeLike, uniform: Dither) -> Quantized:
    """Round vectors to int8, dithered, by compiled loops that must be there; scales may be words of `_float16`."""
    peak = _peaks(x)
    scales = saturating_cast_scales(peak / x.dtype.type(127), dtype)
    codes = np.empty(x.shape, np.int8)
    places, kept = addresses(x, peak, upcast_scales(scales, x.dtype))
    loops: Any = compiled("round")
    kind = like(x.dtype)

    # The arrays must live as long as a thread may come.
    def work(tickets: NDArray[np.int64], waits: bool, _: object = kept) -> None:
        loops.dithered(tickets, waits, places, kind, uniform.drawn, codes)

    parallel_for(work, min(x.shape[0], x.size // _WORTH_A_THREAD))
    return Quantized(codes, scales)


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
    places, kept = addresses(x, to)
    loops: Any = compiled("round")
    kinds, sizes = (like(np.float32), like(to.dtype)), (x.shape[0], x[0].size)

    # The arrays must live as long as a thread may come.
    def work(tickets: NDArray[np.int64], waits: bool, _: object = kept) -> None:
        loops.rounded(tickets, waits, places, *kinds, *sizes, uniform.drawn, *limited)

    parallel_for(work, min(x.shape[0], x.size // _WORTH_A_THREAD))


def _peaks(x: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Return the largest magnitude of each vector."""
    peaks: NDArray[np.floating[Any]] = np.maximum(x.max(axis=-1), -x.min(axis=-1))
    return peaks
