"""Where compiled loops are found: numba is optional."""

from __future__ import annotations

import importlib
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from subgen._loading import LOADING, apart

__all__ = ["compiled", "guard", "in_memory"]


@cache
def compiled(what: str) -> ModuleType | None:
    """Return the compiled loops of an operation, or None where there are none.

    That is where numba, or what it calls, is missing, too old or new for NumPy, or has no place to cache.
    """
    try:
        return apart(_load, what)
    except (ImportError, RuntimeError):
        return None


def _load(what: str) -> ModuleType:
    with LOADING:
        module = importlib.import_module(f"subgen_numpy._compiled_{what}")
    for name in module.__all__:
        guard(getattr(module, name))
    return module


def guard(loop: Any) -> None:
    """Let a function of numba be compiled by `subgen._loading.apart`; nothing is done where numba has no place for it.

    Its first call takes up to a minute.
    """
    compile_for = getattr(loop, "_compile_for_args", None)
    if compile_for is not None and not isinstance(compile_for, partial):
        loop._compile_for_args = partial(apart, compile_for)


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
