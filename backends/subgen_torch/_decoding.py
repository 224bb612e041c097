"""A token on a CPU, by the NumPy backend over the same memory; elsewhere by the portable code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subgen import decoding
from subgen._array import narrow
from subgen.decoding import Decoded, Held
from subgen.rounding import Codes

from ._shared import COMPUTED, NARROW, NUMPY, by_numpy, reads_words, shared

__all__ = ["decode"]


@dataclass(frozen=True)
class _Shared:
    """What is held, over the memory of the tensors; see `subgen.decoding.Held`."""

    keys: NDArray[Any]
    values: NDArray[Any]
    counts: NDArray[np.int64]
    spread: NDArray[Any]
    key_codes: Codes | None
    value_codes: Codes | None
    queries: Codes
    n_means: int
    n_exact: int
    n_seen: int


@torch.no_grad()
def decode(held: Held, queries: Tensor, keys: Tensor, values: Tensor, scale: float, ops: Any) -> Decoded:
    """Put a token behind the exact ones and answer it; see `subgen.decoding.decode`.

    Of dtypes that NumPy or its compiled loops compute with, and tensors that may be written to: those made in inference
    mode only in it.
    """
    narrow_ones = keys.dtype in NARROW
    by_torch = keys.device.type != "cpu" or keys.dtype not in COMPUTED or (narrow_ones and not reads_words(keys))
    if by_torch or (held.keys.is_inference() and not torch.is_inference_mode_enabled()):
        return decoding.decode(held, queries, keys, values, scale, ops)
    mine = _Shared(
        keys=shared(held.keys),
        values=shared(held.values),
        counts=shared(held.counts),
        spread=shared(held.spread),
        key_codes=None if held.key_codes is None else shared(held.key_codes),
        value_codes=None if held.value_codes is None else shared(held.value_codes),
        queries=shared(held.queries),
        n_means=held.n_means,
        n_exact=held.n_exact,
        n_seen=held.n_seen,
    )
    rows = queries.float() if narrow_ones else queries
    decoded = by_numpy(NUMPY.decode, mine, rows, keys, values, scale, NUMPY)
    # NumPy writes in place.
    return Decoded(held.keys, held.values, held.queries, narrow(torch.from_numpy(decoded.outputs), queries))
