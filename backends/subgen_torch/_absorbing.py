"""Absorbing, and rounding to 8 bits: on a CPU by the NumPy backend, over the same memory, elsewhere portable."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from subgen_numpy import absorb_by_loops
from torch import Tensor

from subgen import absorbing, rounding
from subgen.absorbing import Absorbed, Absorption, Exact
from subgen.merging import Means
from subgen.rounding import Codes, Dither

from ._shared import COMPUTED, NARROW, NUMPY, NUMPY_DTYPES, by_numpy, to_torch

__all__ = ["absorb", "quantize"]


@torch.no_grad()
def absorb(held: Means, exact: Exact, told: Absorption, ops: Any) -> Absorbed:
    """Let the oldest tokens of the window join the clusters, and merge; see `subgen.absorbing.absorb`."""
    absorbed: Absorbed | None = None
    dtype = exact.keys.dtype
    if exact.keys.device.type == "cpu" and dtype in COMPUTED:
        # Of 16 bits NumPy knows words alone, and its compiled loops do.
        absorbed = by_numpy(absorb_by_loops if dtype in NARROW else NUMPY.absorb, held, exact, told, NUMPY)
    if absorbed is None:
        return absorbing.absorb(held, exact, told, ops)
    settled = absorbed.settled
    arrays = ("keys", "values", "spread", "importance", "key_codes", "value_codes", "queries")
    return Absorbed(
        settled=replace(settled, **{name: to_torch(getattr(settled, name)) for name in arrays}),
        counts=to_torch(absorbed.counts),
        nearest=to_torch(absorbed.nearest),
        moved=to_torch(absorbed.moved),
    )


@torch.no_grad()
def quantize(x: Tensor, dtype: torch.dtype, uniform: Dither | None = None) -> Codes:
    """Round vectors to 8 bits; see `subgen.rounding.quantize`."""
    if x.device.type != "cpu" or x.element_size() == 2 or dtype not in NUMPY_DTYPES:
        return rounding.quantize(x, dtype, uniform)
    codes: Codes = to_torch(by_numpy(NUMPY.quantize, x, NUMPY_DTYPES[dtype], uniform))
    return codes
