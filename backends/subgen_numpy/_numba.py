"""Where compiled loops are found: numba is optional."""

from __future__ import annotations

import importlib
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from subgen._loading import LOADING, call_uninterrupted

__all__ = ["addresses", "compiled", "protect"]


@cache
def compiled(what: str) -> ModuleType | None:
    """Return the compiled loops of an operation, or None where there are none.

    That is where numba, or what it calls, is missing, too old or new for NumPy, or has no place to cache.
    """
    try:
        return call_uninterrupted(_load, what)
    except (ImportError, RuntimeError):
        return None


def _load(what: str) -> ModuleType:
    with LOADING:
        module = importlib.import_module(f"subgen_numpy._numba_{what}")
    for name in module.__all__:
        protect(getattr(module, name))
    return module


def protect(loop: Any) -> None:
    """Let a function of numba be compiled, which takes up to a minute, by `subgen._loading.call_uninterrupted`.

    Other objects, and versions of numba that compile elsewhere, are unchanged.
    """
    compile_for = getattr(loop, "_compile_for_args", None)
    if compile_for is not None and not isinstance(compile_for, partial):
        loop._compile_for_args = partial(call_uninterrupted, compile_for)


def addresses(*arrays: NDArray[Any]) -> tuple[NDArray[np.int64], list[NDArray[Any]]]:
    """Return where arrays lie in memory, for compiled loops.

    Returns
    -------
    places : int64 array, shape (arrays, 2)
        The address of the first number, and the bytes from a stream to the next; see
        `subgen_numpy._numba_streams.view_at`.
    kept : list of array
        The arrays at these addresses: the caller must keep them. Copies where the numbers of a stream are not
        contiguous.
    """
    kept = [x if x[:1].flags.c_contiguous and x.flags.aligned else np.array(x, order="C") for x in arrays]
    return np.array([(x.__array_interface__["data"][0], x.strides[0]) for x in kept], np.int64), kept
