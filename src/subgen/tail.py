"""Appending to arrays with room at the end, in place where nobody can tell.

A state is never changed: whoever holds one may go on using it. Still, a token that is appended need not copy the
window. The arrays of a state end in room; a state knows how much of them is its own, and the states that share
arrays share a `Tail`, which knows how far anyone has written. The state that reaches that far may write behind it
in place; any other copies first.
"""

from __future__ import annotations

from ._array import Array, array_namespace

__all__ = ["Tail", "write"]


class Tail:
    """How far arrays that states share are written; the one thing here that changes.

    Parameters
    ----------
    filled : int, optional
        Tokens written by any of the states; ``None`` lets nobody write.
    """

    __slots__ = ("_free",)

    def __init__(self, filled: int | None) -> None:
        # The number, for who takes it out: `pop` gives it to one thread, whoever else comes finds nothing, and copies.
        # A lock would do the same, but is neither copied nor pickled, and stays locked in a process that forks.
        self._free = [] if filled is None else [filled]

    def claim(self, start: int, stop: int) -> bool:
        """Take the room from ``start`` to ``stop``: whether it was free, and is the caller's to write from now on.

        Of states that share arrays and append at the same moment, in threads, one at most is told so.
        """
        try:
            filled = self._free.pop()
        except IndexError:
            return False
        self._free.append(stop if filled == start else filled)
        return filled == start

    def __reduce__(self) -> tuple[type[Tail], tuple[None]]:
        # What a pickle or a deep copy gives back may lie in memory that is shared (out-of-band buffers, tensors between
        # processes) or that nobody may write to: its states copy first.
        return Tail, (None,)


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
