"""The layout of a stream: what the first update fixes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from ._array import Array, array_namespace, positions

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """Shapes, library, dtype and device of a stream.

    Attributes
    ----------
    leading : tuple of int
        Axes before the tokens.
    head_dim, value_dim : int
    example : array, shape (0, head_dim)
        Carries library, dtype and device.
    """

    leading: tuple[int, ...]
    head_dim: int
    value_dim: int
    example: Array

    @property
    def kv_heads(self) -> int:
        """Streams along the axis before the tokens."""
        return self.leading[-1] if self.leading else 1

    @property
    def streams(self) -> int:
        """Streams along all leading axes."""
        return math.prod(self.leading)

    def flat(self, x: Array) -> Array:
        """Reshape ``(..., n, dim)`` to ``(streams, n, dim)``."""
        xp = array_namespace(x)
        return xp.reshape(x, (self.streams, *x.shape[-2:]))

    @cached_property
    def heads(self) -> Array:
        """Index of each stream along the axis before the tokens, int64: rows of a batch share their draws."""
        return positions(self.streams, self.example) % self.kv_heads
