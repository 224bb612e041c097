"""Tensors on a CPU as arrays of NumPy over the same memory: what the NumPy backend does faster, it does for torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from subgen_numpy import BACKEND, at_most, threads
from torch import Tensor

from subgen.backends import Operations
from subgen.merging import Means
from subgen.rounding import Codes

__all__ = ["NUMPY", "NUMPY_DTYPES", "by_numpy", "shared", "to_torch"]

#: What the NumPy backend does.
NUMPY = Operations(**BACKEND.operations)

#: The floating dtypes that both libraries have.
NUMPY_DTYPES = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}

_SHARED = (Tensor, Means, Codes)


def shared(x: Any) -> Any:
    """Return arrays over the memory of a tensor, of `Means` or of `Codes`."""
    if not isinstance(x, Tensor):
        return x.each(shared) if isinstance(x, Means) else Codes(shared(x.codes), shared(x.scales))
    if x.requires_grad:  # detaching takes as long as all else here, and what a token needs is mostly plain
        x = x.detach()
    # NumPy has no bfloat16. Where 16 bits come here, as leaders, they are only moved: words will do.
    return (x.view(torch.int16) if x.element_size() == 2 else x).numpy()


def to_torch(x: Any) -> Any:
    """Return tensors over the memory of an array, of `Means` or of `Codes`; None stays."""
    if x is None:
        return None
    if isinstance(x, Means):
        return x.each(torch.from_numpy)
    if isinstance(x, Codes):
        return Codes(torch.from_numpy(x.codes), torch.from_numpy(x.scales))
    return torch.from_numpy(x)


def by_numpy(operation: Callable[..., Any], *given: Any) -> Any:
    """Call an operation of the NumPy backend, in no more threads than torch may use."""
    arrays = [shared(x) if isinstance(x, _SHARED) else x for x in given]
    allowed = torch.get_num_threads()
    if allowed >= threads():  # as a rule: both follow the same variable
        return operation(*arrays)
    with at_most(allowed):
        return operation(*arrays)
