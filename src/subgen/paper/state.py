"""The state of the paper's algorithm: frozen dataclasses of arrays.

Every array has a first axis of independent streams. Functions take a state and return a new one. A state never changes,
so it can be kept, shared and compared; `subgen.default.state.BufferOwner` explains how free space is written.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._array import Array

__all__ = ["Clusters", "PaperState", "ValueReservoir"]


@dataclass(frozen=True)
class Clusters:
    """The set D of the paper: clusters of keys, each with a uniform sample of its members.

    Attributes
    ----------
    centres : array, shape (streams, capacity, head_dim)
        Representatives x_i, in order of opening; the dtype of the keys.
    counts : int64 array, shape (streams, capacity)
        Members n_i; zero marks padding.
    samples : array, shape (streams, capacity, t, head_dim)
        The slots S_i; the dtype of the keys.
    due : int64 array, shape (streams, capacity, t)
        The count at which each slot is next replaced.
    """

    centres: Array
    counts: Array
    samples: Array
    due: Array


@dataclass(frozen=True)
class ValueReservoir:
    """The slots M of the paper: pairs sampled in proportion to the squared norm of the value.

    Attributes
    ----------
    keys, values : array, shape (streams, s, head_dim) and (streams, s, value_dim)
        The slots; zeros before the first value that is not zero.
    due : float64 array, shape (streams, s)
        The running weight at which each slot is next replaced.
    weight : float64 array, shape (streams,)
        The running weight mu, the sum of the squared norms of all values.
    """

    keys: Array
    values: Array
    due: Array
    weight: Array


@dataclass(frozen=True)
class PaperState:
    """State of Algorithm 1: the clusters D, the reservoir M, and the number of tokens seen."""

    clusters: Clusters
    reservoir: ValueReservoir
    n_seen: int
