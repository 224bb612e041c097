"""The CuPy backend: CUDA kernels, compiled when they are first needed.

Its operations need no host synchronisation, so a step made of them can be recorded as a CUDA graph with `capture`. See
docs/howto/gpu.md for the kernels and their tests.
"""

from __future__ import annotations

from subgen.backends import Backend
from subgen.default.append import append_in_place

from . import absorb, append, attend, device_torch, leaders, merging
from .decoder import Decoder
from .graph import capture

__all__ = ["BACKEND", "Decoder", "capture", "torch_backend"]

BACKEND = Backend(
    "cupy",
    {
        "weighted_attention": attend.weighted_attention,
        "attend": attend.attend,
        "append": append_in_place,
        "decode": append.decode,
        "absorb": absorb.absorb,
        "absorb_blocks": absorb.absorb_blocks,
        "merge_closest": merging.merge_closest,
        "quantize_queries": append.quantize_queries,
        "assign_leaders": leaders.assign_leaders,
    },
)


def torch_backend() -> Backend:
    """Return the torch backend with these kernels for CUDA tensors, which are not copied.

    CuPy compiles the kernels and launches them on torch's current stream. ``subgen_torch.BACKEND`` is this backend
    where CuPy is installed and torch has a CUDA device. ``subgen_torch.WITHOUT_CUPY`` does not use the kernels.

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

    return device_torch.backend_for(subgen_torch.WITHOUT_CUPY)
