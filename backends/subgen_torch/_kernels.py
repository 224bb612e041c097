"""Who serves CUDA tensors: the kernels of `subgen_cupy` where CuPy is installed, else torch's operations."""

from __future__ import annotations

import importlib.util
import warnings

import torch

from subgen.backends import Backend

__all__ = ["with_kernels"]


def with_kernels(own: Backend) -> Backend:
    """Return the backend with kernels for its CUDA tensors, if there can be any and CuPy is there to launch them.

    Parameters
    ----------
    own : Backend
        Of torch's own operations.

    Returns
    -------
    Backend

    Warns
    -----
    RuntimeWarning
        If CuPy is installed but does not import.
    """
    possible = torch.version.cuda is not None and torch.cuda.is_available()
    if not possible or importlib.util.find_spec("cupy") is None:
        return own
    try:
        import cupy  # noqa: F401
    except Exception as error:  # whatever an installation for another CUDA raises
        warnings.warn(
            f"CuPy is installed but does not import ({type(error).__name__}: {error}): CUDA tensors are served by "
            f"torch's own operations, which are slower; install the CuPy of this CUDA, or none",
            RuntimeWarning,
            stacklevel=2,
        )
        return own
    from subgen_cupy._torch import backend_for

    return backend_for(own)
