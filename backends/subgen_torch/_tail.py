"""Appending in place, where torch lets nobody tell."""

from __future__ import annotations

import torch
from subgen_numpy import BACKEND
from torch import Tensor

from subgen import tail

from ._shared import shared

__all__ = ["write"]


@torch.no_grad()
def write(x: Tensor, start: int, block: Tensor) -> Tensor:
    """Put a block into an array along its second axis; see `subgen.tail.write`.

    A tensor made in inference mode may only be written to in that mode; elsewhere it is copied.
    """
    if x.is_inference() and not torch.is_inference_mode_enabled():
        written: Tensor = tail.write(x, start, block)
        return written
    if x.device.type == "cpu":
        # As NumPy does it: torch wakes its threads for a few tokens, and they go on spinning beside those that absorb.
        BACKEND.operations["write"](shared(x), start, shared(block))
    else:
        x.narrow(1, start, block.shape[1]).copy_(block)
    return x
