"""The NumPy backend: the hot operations with native words and writes into their own temporaries.

A template for other backends; see `subgen.backends` for how they are found.
"""

from __future__ import annotations

from subgen.backends import Backend

from ._absorbing import absorb, absorb_by_loops
from ._attention import coded_attention, sketch_attention, weighted_attention
from ._compiled import compiled
from ._merging import merge_closest
from ._rounding import quantize
from ._tail import write
from ._threads import at_most, threads
from ._threefry import threefry2x32
from ._words import BFLOAT16

__all__ = ["BACKEND", "BFLOAT16", "absorb_by_loops", "at_most", "compiled", "threads"]

BACKEND = Backend(
    "numpy",
    {
        "threefry2x32": threefry2x32,
        "weighted_attention": weighted_attention,
        "sketch_attention": sketch_attention,
        "coded_attention": coded_attention,
        "merge_closest": merge_closest,
        "write": write,
        "quantize": quantize,
        "absorb": absorb,
    },
)
