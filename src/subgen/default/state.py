"""The state of the default sketch: frozen dataclasses of arrays, and who may write behind the last token.

Every array has a first axis of independent streams. Functions take a state and give a new one; what a state holds never
changes, so states can be kept, shared and compared.

A token that is appended need not copy the window all the same. The arrays of the exact tokens end in free space. The
states that share such arrays share a `BufferOwner`, which counts the tokens written by any of them. The state that
reaches that far may write behind it in place; any other copies first (`reserve`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .._array import Array, array_namespace
from .._tree import tree_map

__all__ = [
    "BufferOwner",
    "Clusters",
    "Exact",
    "Quantized",
    "Residual",
    "State",
    "clear_free_space",
    "copied",
    "reserve",
]


@dataclass(frozen=True)
class Quantized:
    """Vectors in int8, each with one scale.

    Attributes
    ----------
    codes : int8 array, shape (streams, n, dim)
        -127 to 127.
    scales : array, shape (streams, n)
        The number of code 1, in the unit `subgen.default.quantization.scale_unit`.
    """

    codes: Array
    scales: Array


@dataclass(frozen=True)
class Clusters:
    """Clusters as weighted entries; in the dtype of storage, or in float32 or float64 to compute with.

    Attributes
    ----------
    keys, values : array or Quantized, shape (streams, clusters, head_dim) and (streams, clusters, value_dim)
        Means of the members.
    counts : int64 array, shape (streams, clusters)
        Number of members; zero marks a free place.
    key_variance : array, shape (streams, clusters, bands)
        Variance of the members' keys about their mean, averaged over the coordinates of each band; see
        `subgen.default.merging.bands`.
    importance : array, shape (streams, clusters)
        Weight of the cluster in the cost of a merge, see `subgen.default.merging.ward_costs`; adds up in a merge. Where
        clusters are stored in 16 bits, this and the key variance are roots, see `subgen.default.quantization`.
    leaders : array, shape (streams, clusters, head_dim), or None
        The key that opened each cluster, in the dtype of the input; with ``delta`` (`subgen.default.threshold`).
    nearest : int32 array, shape (streams, clusters), or None
        Cached nearest neighbour of each cluster, among those it was compared with; -1 for a cluster that has not been
        compared with all others since it last changed, and for a free place. ``None`` where nothing is cached.
    """

    keys: Any
    values: Any
    counts: Array
    key_variance: Array
    importance: Array
    leaders: Array | None = None
    nearest: Array | None = None

    def part(self, places: slice) -> Clusters:
        """Return the clusters in some places."""
        return tree_map(lambda x: x[:, places, ...], self)


@dataclass(frozen=True)
class Exact:
    """The exact tokens: sinks, the window, and free space behind them.

    Attributes
    ----------
    keys, values : array, shape (streams, sink + window, dim)
        In the dtype of the input.
    queries : Quantized, shape (streams, sink + window, head_dim)
        One query of each token, scaled; the query heads of a group take turns. Scale zero: the token came without one.
    n : int
        Tokens held.
    owner : BufferOwner
    """

    keys: Array
    values: Array
    queries: Quantized
    n: int
    owner: BufferOwner

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return int(self.keys.shape[1])


@dataclass(frozen=True)
class Residual:
    """A sample of the tokens behind the clusters, with replacement.

    Attributes
    ----------
    keys, values : array, shape (streams, slots, dim)
        As they came, in the dtype of the input.
    cluster : int32 array, shape (streams, slots)
        The place of the token's cluster.
    due : int64 array, shape (streams, slots)
        The number of tokens at which each slot is next replaced.
    """

    keys: Array
    values: Array
    cluster: Array
    due: Array


@dataclass(frozen=True)
class State:
    """What the default sketch holds.

    Attributes
    ----------
    clusters : Clusters
        In the dtype of the input, or with means in int8.
    exact : Exact
    residual : Residual or None
        See `subgen.default.residual`.
    n_seen : int
        Tokens so far.
    """

    clusters: Clusters
    exact: Exact
    residual: Residual | None
    n_seen: int


class BufferOwner:
    """How many tokens are written into arrays that states share: the only thing here that changes.

    Parameters
    ----------
    filled : int or None
        Tokens written by any of the states; ``None`` lets no state write.
    """

    __slots__ = ("_free",)

    def __init__(self, filled: int | None) -> None:
        # `pop` hands the number to one thread; a second one finds an empty list, and copies. A lock would do the same,
        # but cannot be copied or pickled, and stays locked in a process that forks.
        self._free = [] if filled is None else [filled]

    def claim(self, start: int, stop: int) -> bool:
        """Claim the free space from ``start`` to ``stop``; whether it was free.

        Of states that share arrays and append at the same moment, in threads, at most one succeeds.
        """
        try:
            filled = self._free.pop()
        except IndexError:
            return False
        self._free.append(stop if filled == start else filled)
        return filled == start

    def __reduce__(self) -> tuple[type[BufferOwner], tuple[None]]:
        # A pickle or a deep copy may lie in shared or read-only memory: its states copy before they write.
        return BufferOwner, (None,)


def reserve(state: State, size: int) -> State:
    """Reserve space for ``size`` tokens, copying the arrays of the exact tokens if another state owns them.

    Parameters
    ----------
    state : State
        With so much free space.
    size : int

    Returns
    -------
    State
    """
    filled = state.exact.n
    return state if state.exact.owner.claim(filled, filled + size) else copied(state, filled + size)


def copied(state: State, filled: int | None) -> State:
    """Copy the arrays of the exact tokens; ``filled`` of them count as written, see `BufferOwner`."""
    xp = array_namespace(state.exact.keys)
    exact = tree_map(lambda x: xp.asarray(x, copy=True), state.exact)
    return replace(state, exact=replace(exact, owner=BufferOwner(filled)))


def clear_free_space(state: State) -> State:
    """Return the same state in arrays of its own, with zeros behind the last token.

    Another state may have written there, or be writing.
    """
    xp, n = array_namespace(state.exact.keys), state.exact.n
    exact = tree_map(lambda x: xp.concat([x[:, :n, ...], xp.zeros_like(x[:, n:, ...])], axis=1), state.exact)
    return replace(state, exact=replace(exact, owner=BufferOwner(n)))
