"""Convert what 16 bits store as roots, or in another unit, between dtypes; see `subgen.default.quantization`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..default.quantization import SCALE_UNIT
from .captures import from_bfloat16

__all__ = ["convert_units"]

Arrays = dict[str, NDArray[Any]]

_ROOTS = ("clusters.key_variance", "clusters.importance")
_SCALES = ("clusters.keys.scales", "clusters.values.scales")


def convert_units(tensors: Arrays, saved: str, dtype: str, *, plain: bool) -> Arrays:
    """Return the arrays of a file as a sketch of a dtype stores them.

    Parameters
    ----------
    tensors : dict of str to NumPy array
    saved, dtype : str
        Dtype of the stream that was saved, and of the stream that goes on.
    plain : bool
        Whether 16 bits hold no roots, and scales in the unit of 32 bits: files of version 1.
    """
    halves = {"float16", "bfloat16"}
    before, after = saved in halves and not plain, dtype in halves
    if before == after:
        return tensors

    def converted(name: str, x: NDArray[Any]) -> NDArray[Any]:
        wide = (from_bfloat16(x) if x.dtype == np.uint16 else x).astype(np.float64)
        if name in _ROOTS:
            # What is below zero stays so, to be refused.
            wide = np.copysign(np.sqrt(np.abs(wide)) if after else wide * wide, wide)
        else:
            wide = wide / SCALE_UNIT if after else wide * SCALE_UNIT
        if saved == dtype == "bfloat16":
            # To nearest, of two as near to the even one.
            bits = wide.astype(np.float32).view(np.uint32)
            return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        # In the saved dtype if the stream goes on in it; else wide, to be cast once.
        return wide.astype(x.dtype) if saved == dtype else wide

    return tensors | {name: converted(name, tensors[name]) for name in (*_ROOTS, *_SCALES) if name in tensors}
