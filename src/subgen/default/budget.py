"""How many clusters a sketch may hold after n tokens: a number, a power of n, bytes, or a share of the cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .._checks import check_integer, check_ratio, check_real

__all__ = ["Budget", "Bytes", "Fixed", "Footprint", "Power", "Share", "budget_arguments", "check_budget"]


@dataclass(frozen=True)
class Footprint:
    """Bytes of a sketch.

    Attributes
    ----------
    streams : int
    pair, cluster : int
        Bytes of one exact (key, value) pair, and of one cluster with all that is kept of it.
    fixed : int
        Bytes of one stream whatever its clusters: sinks, window and its queries, samples.
    window : int
        Most recent tokens kept exactly.
    few : int
        Clusters of a stream up to which they take no more.
    cached : int
        Further bytes of each cluster beyond that number: its cached nearest neighbour.
    """

    streams: int
    pair: int
    cluster: int
    fixed: int
    window: int
    few: int
    cached: int

    def stream_bytes(self, clusters: int) -> int:
        """Count the bytes of one stream with so many clusters."""
        more = self.cached if clusters > self.few else 0
        return self.fixed + clusters * (self.cluster + more)

    def clusters_in(self, nbytes: int) -> int:
        """Count the clusters that fit into so many bytes of one stream; below 1 where none does."""
        clusters = (nbytes - self.fixed) // self.cluster
        if clusters <= self.few:
            return clusters
        return max(self.few, (nbytes - self.fixed) // (self.cluster + self.cached))


class Budget(Protocol):
    """Clusters of each stream as a function of the tokens seen, which must not fall as they grow."""

    def clusters(self, n_seen: int, footprint: Footprint) -> int:
        """Return the most clusters that a stream of ``n_seen`` tokens may hold; at least 1.

        Raises
        ------
        ValueError
            If the budget can never hold one.
        """


@dataclass(frozen=True)
class Fixed:
    """The same number of clusters at any length."""

    max_clusters: int

    def clusters(self, n_seen: int, footprint: Footprint) -> int:
        """See `subgen.default.budget.Budget.clusters`."""
        return self.max_clusters


@dataclass(frozen=True)
class Power:
    """A sublinear schedule: ``coefficient * n ** exponent`` clusters after n tokens, rounded down, at least 1.

    Parameters
    ----------
    coefficient : float
        Above 0.
    exponent : float
        0 to 1: 0.5 lets the memory grow as the square root of the stream.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of bounds.

    Examples
    --------
    >>> import numpy as np, subgen
    >>> keys = np.random.default_rng(0).normal(size=(1, 4000, 8))
    >>> sketch = subgen.AttentionSketch(subgen.Power(2, 0.5), window=32)
    >>> for block in np.split(keys, [1000], axis=1):
    ...     sketch.update(block, block)
    ...     print(sketch.n_seen, sketch.n_clusters.tolist())
    1000 [63]
    4000 [126]
    """

    coefficient: float
    exponent: float

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "coefficient", check_real("coefficient", self.coefficient, minimum=0.0, strict=True, maximum=2.0**40)
        )
        object.__setattr__(self, "exponent", check_real("exponent", self.exponent, minimum=0.0, maximum=1.0))

    def clusters(self, n_seen: int, footprint: Footprint) -> int:
        """See `subgen.default.budget.Budget.clusters`."""
        return max(1, int(self.coefficient * float(n_seen) ** self.exponent))


@dataclass(frozen=True)
class Bytes:
    """As many clusters as fit into a number of bytes, all streams together."""

    max_bytes: int

    def clusters(self, n_seen: int, footprint: Footprint) -> int:
        """See `subgen.default.budget.Budget.clusters`."""
        clusters = footprint.clusters_in(self.max_bytes // footprint.streams)
        if clusters < 1:
            least = footprint.streams * footprint.stream_bytes(1)
            raise ValueError(
                f"max_bytes={self.max_bytes} holds no cluster beside sinks and window: {footprint.streams} streams of "
                f"this shape and dtype need at least {least} bytes; raise it, or lower window"
            )
        return clusters


@dataclass(frozen=True)
class Share:
    """What is left of an exact cache of as many tokens once a share of its bytes is removed.

    While that is less than twice the window and the sinks, ``window`` clusters are held all the same.
    """

    compression_ratio: float

    def clusters(self, n_seen: int, footprint: Footprint) -> int:
        """See `subgen.default.budget.Budget.clusters`."""
        allowed = math.floor((1.0 - self.compression_ratio) * n_seen * footprint.pair)
        return max(footprint.window, footprint.clusters_in(allowed))


def check_budget(
    max_clusters: object, max_bytes: object, compression_ratio: object, delta: float | None
) -> Budget | None:
    """Make the budget from arguments of `subgen.AttentionSketch`; ``None`` if only ``delta`` bounds the clusters."""
    given = {
        name: value
        for name, value in (
            ("max_clusters", max_clusters),
            ("max_bytes", max_bytes),
            ("compression_ratio", compression_ratio),
        )
        if value is not None
    }
    if len(given) > 1:
        raise ValueError(f"give one budget, got {' and '.join(f'{name}={value!r}' for name, value in given.items())}")
    if max_bytes is not None:
        return Bytes(check_integer("max_bytes", max_bytes))
    if compression_ratio is not None:
        return Share(check_ratio(compression_ratio))
    if isinstance(max_clusters, Mapping):
        max_clusters = Power(**max_clusters)
    if isinstance(max_clusters, Power):
        return max_clusters
    if max_clusters is not None:
        return Fixed(check_integer("max_clusters", max_clusters))
    return None if delta is not None else Fixed(1024)


def budget_arguments(budget: Budget | None) -> dict[str, Any]:
    """Return the arguments of `check_budget` that make a budget, as JSON can hold them.

    Raises
    ------
    TypeError
        If the budget is of a class that this release does not save.
    """
    if budget is None:
        return {}
    if isinstance(budget, Power):
        return {"max_clusters": {"coefficient": budget.coefficient, "exponent": budget.exponent}}
    if isinstance(budget, (Fixed, Bytes, Share)):
        return dict(vars(budget))
    raise TypeError(f"cannot save a budget of {type(budget).__name__}")
