"""Counter-based random numbers: Threefry-2x32-20.

A draw is a pure function of ``(seed, purpose, head, slot, number)``, so a sketch does not depend on how the
stream was cut into calls, on what else is in the batch, on the array library, or on the machine that ran it.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from typing import Any

from ._array import Array, array_namespace, library_name

__all__ = ["DRAW_BITS", "draws", "slot_draws", "stream_key", "threefry2x32"]

_MASK = 0xFFFFFFFF
_PARITY = 0x1BD11BDA
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))

# A draw r in 1, 3, 5, ... < 2**25 stands for u = r / 2**25: 24 random bits, never 0 and never 1.
DRAW_BITS = 25

# Libraries whose uint32 wraps in every operation.
_NATIVE_WORDS = ("numpy", "cupy")


def threefry2x32(key0: Array, key1: Array, counter0: Array, counter1: Array) -> tuple[Array, Array]:
    """Encrypt a two-word counter under a two-word key, 20 rounds.

    Parameters
    ----------
    key0, key1, counter0, counter1 : int64 arrays, broadcastable, or ints
        Words in ``[0, 2**32)``.

    Returns
    -------
    (int64 array, int64 array)
        Two words in ``[0, 2**32)``.

    Notes
    -----
    The standard promises no uint32 arithmetic that every library has, so the 32-bit words are masked int64. NumPy and
    CuPy have native words, which take half the bytes and no masks.
    """
    x0, x1, keys, mask = counter0, counter1, [key0, key1, key0 ^ key1 ^ _PARITY], _MASK
    arrays = [x for x in (x0, x1, *keys) if hasattr(x, "shape")]
    xp: Any = array_namespace(arrays[0]) if arrays else None
    native = bool(arrays) and library_name(xp) in _NATIVE_WORDS
    if native:
        words = xp.broadcast_arrays(*(xp.asarray(x, device=arrays[0].device) for x in (x0, x1, *keys)))
        x0, x1, *keys = (xp.astype(x, xp.uint32) for x in words)
    x0, x1 = x0 + keys[0] & mask, x1 + keys[1] & mask
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1 & mask
            x1 = (x1 << rotation & mask | x1 >> (32 - rotation)) ^ x0
        x0 = x0 + keys[(group + 1) % 3] & mask
        x1 = x1 + keys[(group + 2) % 3] + (group + 1) & mask
    return (xp.astype(x0, xp.int64), xp.astype(x1, xp.int64)) if native else (x0, x1)


def stream_key(seed: int, purpose: int, heads: Array) -> tuple[Array, Array]:
    """Derive the key of each stream from the seed, the purpose of the draws and the head it belongs to.

    Parameters
    ----------
    seed : int
        In ``[0, 2**64)``.
    purpose : int
        Separates the reservoirs of one sketch.
    heads : int64 array, shape (streams,), or int
        Index of each stream along the axis before the tokens.

    Returns
    -------
    (int64 array, int64 array)
        The key words, each of shape (streams,).
    """
    zero = heads * 0
    return threefry2x32(zero + (seed & _MASK), zero + (seed >> 32), heads, zero + purpose)


def draws(key: tuple[Array, Array], slots: Array, numbers: Array) -> Array:
    """Draw odd integers ``r`` below ``2**25``; ``r / 2**25`` is uniform on (0, 1).

    Integers, because ``n / u`` is then an exact integer division on every library.

    Parameters
    ----------
    key : (int64 array, int64 array)
        From `stream_key`, shaped to broadcast with ``slots``.
    slots, numbers : int64 arrays, or ints
        The slot that draws, below ``2**32``, and the number of its draw, at least 0.

    Returns
    -------
    int64 array
        Of the broadcast shape.

    Notes
    -----
    A number is two words: the lower one is the counter, the upper one goes into the key. Without it, draws would repeat
    after ``2**32`` tokens, and merged streams whose lengths differ by a multiple of that would all choose alike.
    """
    bits, _ = threefry2x32(key[0], key[1] ^ (numbers >> 32 & _MASK), slots & _MASK, numbers & _MASK)
    return ((bits >> 8) << 1) + 1


def slot_draws(seed: int, purpose: int, heads: Array, slots: Array, numbers: Array) -> Array:
    """Draw once for every slot of every stream.

    Parameters
    ----------
    seed, purpose, heads
        As in ``subgen._random.stream_key``.
    slots, numbers : int64 arrays, shape (1 or streams, ...), of as many axes
        As in ``subgen._random.draws``.

    Returns
    -------
    int64 array, shape (streams, ...)
    """
    later = (1,) * (slots.ndim - 1)
    key0, key1 = (array_namespace(key).reshape(key, (-1, *later)) for key in stream_key(seed, purpose, heads))
    return draws((key0, key1), slots, numbers)
