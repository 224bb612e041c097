"""Merging closest pairs: on a CPU by the NumPy backend, over the same memory; elsewhere by the portable code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from subgen_numpy import BACKEND
from torch import Tensor

from subgen import merging
from subgen.merging import Means

__all__ = ["merge_closest"]


@torch.no_grad()
def merge_closest(
    means: Means, metric: Tensor | None, value_scale: Tensor, most: int, places: int
) -> tuple[Means, Tensor]:
    """Merge closest pairs until at most a number of clusters is left; see `subgen.merging.merge_closest`."""
    if means.keys.device.type != "cpu":
        return merging.merge_closest(means, metric, value_scale, most, places)
    merged, moved = BACKEND.operations["merge_closest"](
        means.each(_to_numpy),
        None if metric is None else _to_numpy(metric),
        _to_numpy(value_scale),
        most,
        places,
    )
    merged = merged.each(torch.from_numpy)
    if means.leaders is not None:
        merged = replace(merged, leaders=merged.leaders.view(means.leaders.dtype))
    return merged, torch.from_numpy(moved)


def _to_numpy(x: Tensor) -> Any:
    x = x.detach()
    # NumPy has no bfloat16. Only leaders come in 16 bits, and they are only moved: words will do.
    return (x.view(torch.int16) if x.element_size() == 2 else x).numpy()
