"""Appending in place."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

__all__ = ["write"]


def write(x: NDArray[Any], start: int, block: NDArray[Any]) -> NDArray[Any]:
    """Put a block into an array along its second axis; see `subgen.tail.write`."""
    x[:, start : start + block.shape[1]] = block
    return x
