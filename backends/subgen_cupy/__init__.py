"""The CuPy backend: CUDA kernels, compiled when they are first needed.

Its operations never ask the host, so steps made of them can be recorded as a CUDA graph: `capture`. How the kernels are
laid out and tested: docs/howto/gpu.md.
"""

from __future__ import annotations

from subgen.backends import Backend

from ._cupy import capture
from ._operations import (
    assign_leaders,
    collect,
    merge_closest,
    quantize,
    query_moment,
    settle,
    sketch_attention,
    threefry2x32,
    weighted_attention,
    write,
)

__all__ = ["BACKEND", "capture"]

BACKEND = Backend(
    "cupy",
    {
        "threefry2x32": threefry2x32,
        "assign_leaders": assign_leaders,
        "weighted_attention": weighted_attention,
        "sketch_attention": sketch_attention,
        "merge_closest": merge_closest,
        "write": write,
        "quantize": quantize,
        "collect": collect,
        "query_moment": query_moment,
        "settle": settle,
    },
)
