"""Appending to arrays with room at the end, in place where nobody can tell.

A state is never changed: whoever holds one may go on using it. Still, a token that is appended need not copy the
window. The arrays of a state end in room; a state knows how much of them is its own, and the states that share
arrays share a `Tail`, which knows how far anyone has written. The state that reaches that far may write behind it
in place; any other copies first.
"""

from __future__ import annotations

from dataclasses import dataclass

from ._array import Array, array_namespace

__all__ = ["Tail", "write"]


@dataclass
class Tail:
    """How far arrays that states share are written; the one thing here that changes.

    Attributes
    ----------
    filled : int
        Tokens written by any of the states.
    """

    filled: int


def write(x: Array, start: int, block: Array) -> Array:
    """Put a block into an array along its second axis, and return the array.

    A backend may write in place: what is behind ``start`` is nobody's.

    Parameters
    ----------
    x : array, shape (streams, places, ...)
    start : int
    block : array, shape (streams, n, ...)
        Of the same dtype; ``start + n`` is at most ``places``.

    Returns
    -------
    array, shape (streams, places, ...)
    """
    xp = array_namespace(x)
    return xp.concat([x[:, :start, ...], block, x[:, start + block.shape[1] :, ...]], axis=1)
