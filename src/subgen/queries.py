"""The query of each token that the window keeps, in 8 bits: what decides which differences of keys matter."""

from __future__ import annotations

from typing import Any

from ._array import Array, array_namespace, concat, positions
from ._memory import pieces
from .rounding import Codes
from .weighted import scaled

__all__ = ["query_codes"]


def query_codes(queries: Array, scale: float, first: int, dtype: object, ops: Any) -> Codes:
    """Choose a query of each token, scale it and round it to 8 bits; the query heads of a group take turns.

    Parameters
    ----------
    queries : array, shape (streams, group, n, head_dim)
        As they came.
    scale : float
        Factor of the logits.
    first : int
        Position of the first token in the stream: token ``t`` keeps the query of head ``(first + t) % group``.
    dtype : floating dtype
        Of the scales of the codes.
    ops : Operations
        `subgen.rounding.quantize` is what rounds.

    Returns
    -------
    Codes, of shape (streams, n, head_dim)
    """
    streams, _, n, head_dim = queries.shape
    rounded: list[Codes] = [
        ops.quantize(scaled(_turns(queries[:, :, part, :], first + part.start), scale), dtype)
        for part in pieces(n, streams * head_dim, queries)
    ]
    return Codes(concat([x.codes for x in rounded], axis=1), concat([x.scales for x in rounded], axis=1))


def _turns(queries: Array, first: int) -> Array:
    """Take one head of the group for each token: ``(streams, group, n, head_dim)`` to ``(streams, n, head_dim)``."""
    xp = array_namespace(queries)
    _, group, n, _ = queries.shape
    if group == 1 or n == 1:  # a single token takes a slice, without a gather
        return queries[:, first % group, :, :]
    turn = (positions(n, queries) + first) % group
    return xp.take_along_axis(queries, turn[None, None, :, None], axis=1)[:, 0, :, :]
