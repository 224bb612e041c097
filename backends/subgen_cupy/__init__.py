"""The CuPy backend: CUDA kernels, compiled when they are first needed.

Beside the operations of the registry it offers two that keep a whole step on the device, without ever asking the host:
`attend_clusters` (a decoding step over exact pairs and clusters) and `merge_closest` (the merging of a block into
them), and `capture`, which records such a step as a CUDA graph. How the kernels are laid out and tested: docs/gpu.md.
"""

from __future__ import annotations

from subgen.backends import Backend

from ._cupy import capture
from ._operations import assign_leaders, attend_clusters, merge_closest, threefry2x32, weighted_attention

__all__ = ["BACKEND", "attend_clusters", "capture", "merge_closest"]

BACKEND = Backend(
    "cupy",
    {"threefry2x32": threefry2x32, "assign_leaders": assign_leaders, "weighted_attention": weighted_attention},
)
