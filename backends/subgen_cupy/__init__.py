"""The CuPy backend: CUDA kernels, compiled when they are first needed.

Its operations never ask the host, so steps made of them can be recorded as a CUDA graph: `capture`. How the kernels are
laid out and tested: docs/howto/gpu.md.
"""

from __future__ import annotations

from subgen.backends import Backend

from . import _torch
from ._cupy import capture
from ._decoder import Decoder
from ._operations import (
    absorb_blocks,
    assign_leaders,
    coded_attention,
    collect,
    decode,
    merge_closest,
    quantize,
    query_codes,
    query_moment,
    settle,
    sketch_attention,
    threefry2x32,
    weighted_attention,
    write,
)

__all__ = ["BACKEND", "Decoder", "capture", "torch_backend"]

BACKEND = Backend(
    "cupy",
    {
        "threefry2x32": threefry2x32,
        "assign_leaders": assign_leaders,
        "weighted_attention": weighted_attention,
        "sketch_attention": sketch_attention,
        "coded_attention": coded_attention,
        "merge_closest": merge_closest,
        "write": write,
        "quantize": quantize,
        "query_codes": query_codes,
        "collect": collect,
        "query_moment": query_moment,
        "settle": settle,
        "absorb_blocks": absorb_blocks,
        "decode": decode,
    },
)


def torch_backend() -> Backend:
    """Return the backend of torch with these kernels for its CUDA tensors, without copies; elsewhere it is the same.

    Kernels are compiled and launched by CuPy, on torch's current stream. ``subgen_torch.BACKEND`` is this where CuPy is
    installed and torch has a CUDA device, and ``subgen_torch.OWN`` what does without.

    Returns
    -------
    Backend

    Raises
    ------
    ModuleNotFoundError
        If torch is not installed.

    Examples
    --------
    >>> import subgen, subgen_cupy
    >>> subgen.backends.register(subgen_cupy.torch_backend(), replace=True)  # doctest: +SKIP
    """
    import subgen_torch

    return _torch.backend_for(subgen_torch.OWN)
