"""Bound the temporary memory of a call: what it takes besides its arguments, its result and the sketch.

Whatever grows with the product of two sizes (logits of queries and pairs, distances of tokens and leaders) is computed
in pieces of at most `transient_limit` numbers. An array of a piece takes 16 MiB in float32 on a CPU, and at most eight
exist at once. Costs of pairs of clusters are those of a stream, if they are more. docs/howto/numpy.md states what it
adds up to, and tests/test_memory.py holds every call to it.
"""

from __future__ import annotations

from ._array import Array, chunks

__all__ = ["pieces", "transient_limit"]

# Numbers, not bytes, of one temporary array: on a CPU, and on an accelerator, which is fast with large arrays alone and
# waits for the host between small ones.
TRANSIENT_NUMBERS = 1 << 22
TRANSIENT_NUMBERS_ON_ACCELERATORS = 1 << 26


def transient_limit(like: Array) -> int:
    """Return how many numbers a temporary array on the device of another array may have."""
    on_cpu = "cpu" in str(like.device).lower()
    return TRANSIENT_NUMBERS if on_cpu else TRANSIENT_NUMBERS_ON_ACCELERATORS


def pieces(n: int, numbers: int, like: Array) -> list[slice]:
    """Cut ``0 .. n`` into consecutive slices whose temporary arrays stay within `transient_limit`.

    Parameters
    ----------
    n : int
        Length of the axis to cut.
    numbers : int
        Numbers of a temporary array for each place of the axis. A slice has at least one place.
    like : array
        An array on the device where the temporary arrays are.

    Returns
    -------
    list of slice
        A single one where everything fits.

    Examples
    --------
    >>> import numpy as np
    >>> pieces(5, 1 << 21, np.zeros(1))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    if n * numbers <= TRANSIENT_NUMBERS:  # as a rule, and the device need not be known
        return [slice(0, n)]
    return chunks(n, max(1, transient_limit(like) // max(1, numbers)))
