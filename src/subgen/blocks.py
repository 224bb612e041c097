"""A long block of tokens, half a window after the other: the turns in which nothing changes but numbers.

With as many clusters as there will be and a full window, each turn lets the oldest half of the window join the clusters
and writes as many tokens behind the rest. What is computed has the same shapes every time, so a backend can record it
once and replay it, and ask the host for nothing in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ._array import Array
from .absorbing import Absorption, Dithers, Exact, Settled, means_and_exact
from .merging import Means, nobody
from .rounding import Codes

__all__ = ["Tokens", "Turn", "Turned", "absorb_blocks"]


@dataclass(frozen=True)
class Tokens:
    """What comes in: keys and values, ``(streams, n, dim)``, and a query of each token or None."""

    keys: Array
    values: Array
    queries: Codes | None


@dataclass(frozen=True)
class Turn:
    """What differs from turn to turn.

    Attributes
    ----------
    weight : float
        Factor of the importance of the tokens that leave; see `subgen.absorbing.collect`.
    dithers : Dithers
    anew : bool
        Whether clusters forget their nearest others first, so that all are compared.
    """

    weight: float
    dithers: Dithers
    anew: bool


@dataclass(frozen=True)
class Turned:
    """What `absorb_blocks` gives.

    Attributes
    ----------
    settled : Settled
        Of the last turn, with its tokens written.
    counts : int64 array, shape (streams, clusters)
    nearest : int32 array, shape (streams, clusters), or None
    """

    settled: Settled
    counts: Array
    nearest: Array | None


def absorb_blocks(
    held: Means,
    exact: Exact,
    tokens: Tokens,
    scale: float | None,
    leave: int,
    turns: Sequence[Turn],
    ops: Any,
) -> Turned:
    """Let half a window join the clusters and write as many tokens into the room, turn after turn.

    Parameters
    ----------
    held : Means
        The clusters, as they are stored; without leaders. As many are left after each turn.
    exact : Exact
        The window is full. All of its tokens came with queries if those that come do, and none if they do not.
    tokens : Tokens
        ``len(turns) * leave`` of them.
    scale : float or None
        Factor of the logits; see `subgen.metric.query_moment`.
    leave : int
        Tokens of a turn.
    turns : sequence of Turn
        At least one.
    ops : Operations
        `subgen.absorbing.absorb` and `subgen.tail.write`, in turns, are what this is.

    Returns
    -------
    Turned
    """
    clusters, window = held.counts.shape[1], exact.queries.scales.shape[1]
    coded = isinstance(held.keys, Codes)
    place, at = (0 if coded else clusters) + exact.keys.shape[1] - leave, window - leave
    for i, turn in enumerate(turns):
        if turn.anew:
            held = replace(held, nearest=nobody(held.counts))
        told = Absorption(leave, turn.weight, clusters, scale, turn.dithers, coded)
        absorbed = ops.absorb(held, exact, told, ops)
        part = slice(i * leave, (i + 1) * leave)
        settled: Settled = absorbed.settled
        queries = settled.queries
        if tokens.queries is not None:
            codes, scales = tokens.queries.codes[:, part, :], tokens.queries.scales[:, part]
            queries = Codes(ops.write(queries.codes, at, codes), ops.write(queries.scales, at, scales))
        settled = replace(
            settled,
            keys=ops.write(settled.keys, place, tokens.keys[:, part, :]),
            values=ops.write(settled.values, place, tokens.values[:, part, :]),
            queries=queries,
        )
        mean_keys, mean_values, exact = means_and_exact(settled, clusters, exact.asked)
        held = Means(
            mean_keys,
            mean_values,
            absorbed.counts,
            settled.spread,
            settled.importance,
            nearest=absorbed.nearest,
        )
    return Turned(settled, absorbed.counts, absorbed.nearest)
