"""Counter-based random numbers: Threefry-2x32-20.

A draw is a pure function of ``(seed, purpose, head, slot, number)``, so a sketch does not depend on how the
stream was cut into calls, on what else is in the batch, on the array library, or on the machine that ran it.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

from collections.abc import Callable

from ._array import Array, array_namespace

__all__ = ["DRAW_BITS", "draws", "slot_draws", "stream_key", "threefry2x32"]

_MASK = 0xFFFFFFFF
_PARITY = 0x1BD11BDA
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))

# A draw r in 1, 3, 5, ... < 2**25 stands for u = r / 2**25: 24 random bits, never 0 and never 1.
DRAW_BITS = 25

Threefry = Callable[[Array, Array, Array, Array], tuple[Array, Array]]


def threefry2x32(key0: Array, key1: Array, counter0: Array, counter1: Array) -> tuple[Array, Array]:
    """Encrypt a two-word counter under a two-word key, 20 rounds.

    The standard promises no uint32 arithmetic that every library has, so the 32-bit words travel in int64.

    Parameters
    ----------
    key0, key1, counter0, counter1 : int64 arrays, broadcastable, or ints
        Words in ``[0, 2**32)``.

    Returns
    -------
    (int64 array, int64 array)
        Two words in ``[0, 2**32)``.
    """
    keys = (key0, key1, key0 ^ key1 ^ _PARITY)
    x0 = (counter0 + key0) & _MASK
    x1 = (counter1 + key1) & _MASK
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = (x0 + x1) & _MASK
            x1 = (((x1 << rotation) & _MASK) | (x1 >> (32 - rotation))) ^ x0
        x0 = (x0 + keys[(group + 1) % 3]) & _MASK
        x1 = (x1 + keys[(group + 2) % 3] + (group + 1)) & _MASK
    return x0, x1


def stream_key(seed: int, purpose: int, heads: Array, threefry: Threefry = threefry2x32) -> tuple[Array, Array]:
    """Derive the key of each stream from the seed, the purpose of the draws and the head it belongs to.

    Parameters
    ----------
    seed : int
        In ``[0, 2**64)``.
    purpose : int
        Tells apart the reservoirs of one sketch.
    heads : int64 array, shape (streams,), or int
        Index of each stream along the axis before the tokens.
    threefry : callable
        The operation that encrypts; see `threefry2x32`.

    Returns
    -------
    (int64 array, int64 array)
        The key words, each of shape (streams,).
    """
    zero = heads * 0
    return threefry(zero + (seed & _MASK), zero + (seed >> 32), heads, zero + purpose)


def draws(key: tuple[Array, Array], slots: Array, numbers: Array, threefry: Threefry = threefry2x32) -> Array:
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
    A number is two words: the lower one is the counter, the upper one goes into the key. Were it left out, draws would
    repeat after ``2**32`` tokens, and merged streams whose lengths differ by a multiple of that would all choose alike.
    """
    key1 = key[1] ^ (numbers >> 32 & _MASK)
    bits, _ = threefry(key[0], key1, slots & _MASK, numbers & _MASK)
    return ((bits >> 8) << 1) + 1


def slot_draws(
    seed: int, purpose: int, heads: Array, slots: Array, numbers: Array, threefry: Threefry = threefry2x32
) -> Array:
    """Draw once for every slot of every stream.

    Parameters
    ----------
    seed, purpose, heads, threefry
        As in `subgen.counter.stream_key`.
    slots, numbers : int64 arrays, shape (1 or streams, ...), of as many axes
        As in `subgen.counter.draws`.

    Returns
    -------
    int64 array, shape (streams, ...)
    """
    later = (1,) * (slots.ndim - 1)
    key0, key1 = (array_namespace(key).reshape(key, (-1, *later)) for key in stream_key(seed, purpose, heads, threefry))
    return draws((key0, key1), slots, numbers, threefry)
