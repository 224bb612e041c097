"""Tensors on a CPU as arrays of NumPy over the same memory: what the NumPy backend does faster, it does for torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from subgen_numpy import BACKEND, BFLOAT16, at_most, compiled, threads
from torch import Tensor

from subgen.absorbing import Exact
from subgen.backends import Operations
from subgen.merging import Means
from subgen.rounding import Codes

__all__ = ["COMPUTED", "NARROW", "NUMPY", "NUMPY_DTYPES", "by_numpy", "reads_words", "shared", "to_torch"]

#: What the NumPy backend does.
NUMPY = Operations(**BACKEND.operations)

#: The floating dtypes that both libraries have.
NUMPY_DTYPES = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}

#: Those of 16 bits, and all that are computed with or widened on a CPU.
NARROW = {torch.float16, torch.bfloat16}
COMPUTED = {*NUMPY_DTYPES, *NARROW}

_SHARED = (Tensor, Means, Exact, Codes)


def shared(x: Any) -> Any:
    """Return arrays over the memory of a tensor, of `Means`, of `Exact` tokens or of `Codes`."""
    if not isinstance(x, Tensor):
        return x.each(shared)
    if x.requires_grad:  # detaching takes as long as all else here, and what a token needs is mostly plain
        x = x.detach()
    # NumPy has no bfloat16: its backend knows the words.
    return x.view(torch.int16).numpy().view(BFLOAT16) if x.dtype == torch.bfloat16 else x.numpy()


def to_torch(x: Any) -> Any:
    """Return tensors over the memory of an array, of `Means` or of `Codes`; None stays."""
    if x is None:
        return None
    if isinstance(x, (Means, Codes)):
        return x.each(to_torch)
    return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == BFLOAT16 else torch.from_numpy(x)


def by_numpy(operation: Callable[..., Any], *given: Any) -> Any:
    """Call an operation of the NumPy backend, in no more threads than torch may use."""
    arrays = [shared(x) if isinstance(x, _SHARED) else x for x in given]
    allowed = torch.get_num_threads()
    if allowed >= threads():  # as a rule: both follow the same variable
        return operation(*arrays)
    with at_most(allowed):
        return operation(*arrays)


def reads_words(x: Tensor) -> bool:
    """Whether the NumPy backend best gets a tensor of another dtype than it computes in as it is.

    What compiled loops read; without them torch widens several times as fast.
    """
    return x.dtype in NARROW and compiled("attention") is not None
