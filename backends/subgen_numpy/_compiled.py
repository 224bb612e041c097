"""Where compiled loops are found: numba is optional."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["compiled", "in_memory"]


@cache
def compiled(what: str) -> ModuleType | None:
    """Return the compiled loops of an operation, or None where there are none.

    That is where numba, or what it calls, is missing, too old or new for NumPy, or has no place to cache.
    """
    try:
        return importlib.import_module(f"subgen_numpy._compiled_{what}")
    except (ImportError, RuntimeError):
        return None


def in_memory(*arrays: NDArray[Any]) -> tuple[NDArray[np.int64], list[NDArray[Any]]]:
    """Tell compiled loops where arrays lie in memory.

    Returns
    -------
    places : int64 array, shape (arrays, 2)
        The address of the first number, and the bytes from a stream to the next; see `subgen_numpy._compiled_streams`.
    arrays : list of array
        Those that lie there, as long as somebody holds them: copies where the numbers of a stream do not lie together.
    """
    there = [x if x[:1].flags.c_contiguous and x.flags.aligned else np.array(x, order="C") for x in arrays]
    return np.array([(x.__array_interface__["data"][0], x.strides[0]) for x in there], np.int64), there
