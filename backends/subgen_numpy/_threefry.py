"""Threefry in native 32-bit words, which wrap by themselves: no masks, half the bytes, no temporaries."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["threefry2x32"]

_PARITY = np.uint32(0x1BD11BDA)
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))

Words = NDArray[np.int64]


def threefry2x32(key0: Words, key1: Words, counter0: Words, counter1: Words) -> tuple[Words, Words]:
    """Encrypt a counter under a key; see `subgen.counter.threefry2x32`."""
    words = np.broadcast_arrays(key0, key1, counter0, counter1)
    k0, k1, x0, x1 = (np.atleast_1d(word).astype(np.uint32) for word in words)
    keys: tuple[NDArray[Any], ...] = (k0, k1, k0 ^ k1 ^ _PARITY)
    high = np.empty_like(x1)
    x0 += k0
    x1 += k1
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 += x1
            np.left_shift(x1, np.uint32(rotation), out=high)
            np.right_shift(x1, np.uint32(32 - rotation), out=x1)
            x1 |= high
            x1 ^= x0
        x0 += keys[(group + 1) % 3]
        x1 += keys[(group + 2) % 3]
        x1 += np.uint32(group + 1)
    shape = words[0].shape
    return x0.astype(np.int64).reshape(shape), x1.astype(np.int64).reshape(shape)
