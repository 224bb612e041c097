"""What is done for each token in decoding: `decode`, an operation of the registry of backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from ._array import Array, narrow
from .rounding import Codes
from .weighted import scaled

__all__ = ["Decoded", "Held", "answer", "decode", "n_sinks", "written"]


class Held(Protocol):
    """What of a sketch a token needs; `subgen.means.MeansState` has it."""

    @property
    def keys(self) -> Array:
        """Means of the clusters, the exact tokens, then room; shape (streams, places, head_dim)."""

    @property
    def values(self) -> Array:
        """As many; shape (streams, places, value_dim)."""

    @property
    def counts(self) -> Array:
        """Tokens of each cluster: int64, shape (streams, clusters)."""

    @property
    def spread(self) -> Array:
        """See `subgen.merging.Means`; shape (streams, clusters, bands)."""

    @property
    def key_codes(self) -> Codes | None:
        """Means of the keys of clusters, if they are in 8 bits; shape (streams, clusters, head_dim)."""

    @property
    def value_codes(self) -> Codes | None:
        """Means of their values, then."""

    @property
    def queries(self) -> Codes:
        """One query of each token behind the sinks, then room; shape (streams, window, head_dim)."""

    @property
    def n_means(self) -> int:
        """Clusters in front of the exact tokens."""

    @property
    def n_exact(self) -> int:
        """Exact tokens, sinks first."""

    @property
    def n_seen(self) -> int:
        """Tokens so far."""


@dataclass(frozen=True)
class Decoded:
    """What `decode` gives.

    Attributes
    ----------
    keys, values : array, shape (streams, places, dim)
        Those that were held, and the token behind the exact ones.
    queries : Codes
        Those that were held, and one of the token's.
    outputs : array, shape (streams, group, value_dim)
        In the dtype of the input. Where the estimate exceeds that dtype it is the largest number of it.
    """

    keys: Array
    values: Array
    queries: Codes
    outputs: Array


def decode(held: Held, queries: Array, keys: Array, values: Array, scale: float, ops: Any) -> Decoded:
    """Put a token behind the exact ones, with one of its queries, and answer all of them.

    Parameters
    ----------
    held : Held
        There is room for the token.
    queries : array, shape (streams, group, head_dim)
        As they came, of the query heads that share a stream; they take turns in being kept.
    keys, values : array, shape (streams, 1, dim)
    scale : float
        Factor of the logits.
    ops : Operations
        `subgen.rounding.quantize`, `subgen.tail.write`, and `subgen.mass.sketch_attention` or
        `subgen.mass.coded_attention`, one after the other, are what this is. As with ``write``, what is behind the
        exact tokens is nobody's, and may be written in place.

    Returns
    -------
    Decoded
    """
    rows = scaled(queries, scale)
    codes = None
    if held.n_exact >= n_sinks(held):
        member = held.n_seen % rows.shape[1]
        codes = ops.quantize(rows[:, member : member + 1, :], held.queries.scales.dtype)
    new_keys, new_values, new_queries = written(held, keys, values, codes, ops)
    used = held.n_means + held.n_exact + 1
    outputs, _ = answer(held, rows, new_keys[:, :used, :], new_values[:, :used, :], 1, ops)
    return Decoded(new_keys, new_values, new_queries, narrow(outputs, queries))


def answer(held: Held, rows: Array, keys: Array, values: Array, causal: int, ops: Any) -> tuple[Array, Array]:
    """Outputs and logsumexp of scaled queries over the clusters that are held and the exact pairs.

    Parameters
    ----------
    held : Held
    rows : array, shape (streams, m, head_dim)
    keys, values : array, shape (streams, n, dim)
        What is held up to the last exact pair.
    causal : int
        See `subgen.mass.sketch_attention`.
    ops : Operations

    Returns
    -------
    outputs : array, shape (streams, m, value_dim)
    logsumexp : array, shape (streams, m)
    """
    counts, spread = held.counts, held.spread
    answered: tuple[Array, Array]
    if held.key_codes is None:
        answered = ops.sketch_attention(rows, keys, values, counts, spread, causal, ops.weighted_attention)
    else:
        answered = ops.coded_attention(
            rows, keys, values, counts, spread, held.key_codes, held.value_codes, causal, ops
        )
    return answered


def n_sinks(held: Held) -> int:
    """Places of sinks, which keep no query."""
    return int(held.keys.shape[1] - held.n_means - held.queries.scales.shape[1])


def written(held: Held, keys: Array, values: Array, codes: Codes | None, ops: Any) -> tuple[Array, Array, Codes]:
    """Put tokens behind the exact ones.

    Parameters
    ----------
    held : Held
    keys, values : array, shape (streams, n, dim)
        No more than there is room for.
    codes : Codes or None
        A query of each of them that is no sink.
    ops : Operations

    Returns
    -------
    keys, values : array, shape (streams, places, dim)
    queries : Codes
    """
    place, queries = held.n_means + held.n_exact, held.queries
    new_keys, new_values = ops.write(held.keys, place, keys), ops.write(held.values, place, values)
    if codes is not None and codes.scales.shape[1]:
        behind = max(0, held.n_exact - n_sinks(held))
        queries = Codes(
            ops.write(queries.codes, behind, codes.codes),
            ops.write(queries.scales, behind, codes.scales),
        )
    return new_keys, new_values, queries
