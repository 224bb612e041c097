"""Merging closest pairs: on a CPU by the NumPy backend, over the same memory; elsewhere by the portable code."""

from __future__ import annotations

import torch
from subgen_numpy import BACKEND
from torch import Tensor

from subgen import merging
from subgen.merging import Means

from ._shared import by_numpy, to_torch

__all__ = ["merge_closest"]


@torch.no_grad()
def merge_closest(
    means: Means, metric: Tensor | None, value_scale: Tensor, most: int, places: int
) -> tuple[Means, Tensor]:
    """Merge closest pairs until at most a number of clusters is left; see `subgen.merging.merge_closest`."""
    if means.keys.device.type != "cpu":
        return merging.merge_closest(means, metric, value_scale, most, places)
    merged, moved = by_numpy(BACKEND.operations["merge_closest"], means, metric, value_scale, most, places)
    return to_torch(merged), to_torch(moved)
