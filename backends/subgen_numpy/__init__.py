"""The NumPy backend: compiled loops where numba is installed, and writes into temporaries and free space.

A template for other backends; see `subgen.backends` for how they are found.
"""

from __future__ import annotations

from subgen.backends import Backend
from subgen.default.append import append_in_place

from . import absorb, attend, merging, prompt, rounding
from ._float16 import BFLOAT16
from ._numba import compiled
from ._parallel import thread_limit, threads

__all__ = ["BACKEND", "BFLOAT16", "compiled", "thread_limit", "threads"]

BACKEND = Backend(
    "numpy",
    {
        "weighted_attention": attend.weighted_attention,
        "attend": attend.attend,
        "append": append_in_place,
        "quantize_queries": rounding.quantize_queries,
        "merge_closest": merging.merge_closest,
        "absorb": absorb.absorb,
        "agglomerate": prompt.agglomerate,
    },
)
