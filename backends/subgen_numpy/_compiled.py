"""Where compiled loops are found: numba is optional."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["compiled", "packed"]


@cache
def compiled(what: str) -> ModuleType | None:
    """Return the compiled loops of an operation, or None where there are none.

    That is where numba, or what it calls, is missing, too old or new for NumPy, or has no place to cache.
    """
    try:
        return importlib.import_module(f"subgen_numpy._compiled_{what}")
    except (ImportError, RuntimeError):
        return None


def packed(x: NDArray[Any]) -> NDArray[Any]:
    """Return an array each of whose streams lies together, as compiled loops take it."""
    return x if x[:1].flags.c_contiguous else np.ascontiguousarray(x)
