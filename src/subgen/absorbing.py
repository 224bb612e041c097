"""What is done when half a window joins the clusters: `absorb`, and of it what comes before they merge and after.

`collect` and `settle` pass over all that a sketch holds once. They, and the whole, are operations of the registry of
backends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ._array import Array, array_namespace, compute_dtype
from .merging import Means, clusters_of_one, join
from .metric import typical_direction, unusualness
from .rounding import Codes, Dither, dequantize, from_roots, quantize, round_roots, round_to

__all__ = [
    "VALUE_WEIGHT",
    "Absorbed",
    "Absorption",
    "Dithers",
    "Exact",
    "Settled",
    "absorb",
    "collect",
    "means_and_exact",
    "settle",
    "value_scale",
    "widened",
]

# Weight of a squared distance of values, in units of their typical norm, beside one of logits: keys that were merged
# wrongly are mended by the spread, values are not.
VALUE_WEIGHT = 3.0


def collect(held: Means, keys: Array, values: Array, leave: int, weight: float) -> tuple[Means, Array]:
    """Put the tokens that leave the window behind the clusters, as clusters of one.

    Parameters
    ----------
    held : Means
        The clusters, as they are stored.
    keys, values : array, shape (streams, window, dim)
        The window, as it is stored.
    leave : int
        Its first tokens that leave.
    weight : float
        Factor of their importance, which is that of `subgen.metric.unusualness` among the clusters and the window.

    Returns
    -------
    means : Means
        In the dtype to compute in, but for leaders and nearest others.
    value_scale : array, shape (streams,)
        See ``value_scale``: the typical norm of a value in the window.
    """
    xp = array_namespace(keys)
    wide = compute_dtype(keys)
    leaders = None if held.leaders is None else keys[:, :leave, :]
    keys, values = (xp.astype(x, wide, copy=False) for x in (keys, values))
    tokens, held = keys[:, :leave, :], widened(held, wide)
    typical = typical_direction(keys, held.keys, xp.astype(held.counts, wide))
    leaving = clusters_of_one(
        tokens,
        values[:, :leave, :],
        unusualness(tokens, *typical) * weight,
        leaders,
        remember=held.nearest is not None,
    )
    return join(held, leaving), value_scale(values)


def widened(means: Means, wide: object) -> Means:
    """Cast what is stored to the dtype to compute in; counts, leaders and nearest others stay."""
    xp = array_namespace(means.counts)
    keys, values = (
        dequantize(x, wide) if isinstance(x, Codes) else xp.astype(x, wide, copy=False)
        for x in (means.keys, means.values)
    )
    spread, importance = (from_roots(x, wide) for x in (means.spread, means.importance))
    return replace(means, keys=keys, values=values, spread=spread, importance=importance)


def value_scale(values: Array) -> Array:
    """Unit of a distance of values: their mean norm in the window, by weight."""
    xp = array_namespace(values)
    norms = xp.sqrt(xp.sum(values * values, axis=-1))
    scale = xp.mean(norms, axis=-1) / math.sqrt(VALUE_WEIGHT)
    return xp.where(scale > 0, scale, xp.ones_like(scale))


@dataclass(frozen=True)
class Dithers:
    """The dither of each array of clusters."""

    keys: Dither
    values: Dither
    spread: Dither
    importance: Dither


@dataclass(frozen=True)
class Exact:
    """The exact tokens, as they are stored: sinks, the window, and room behind them.

    Attributes
    ----------
    keys, values : array, shape (streams, sink + window, dim)
    queries : Codes, of shape (streams, window, head_dim)
        One of each token in the window.
    asked : tuple of bool
        Which tokens in the window came with queries.
    """

    keys: Array
    values: Array
    queries: Codes
    asked: tuple[bool, ...]

    @property
    def sink(self) -> int:
        """How many tokens are sinks."""
        return int(self.keys.shape[1] - self.queries.scales.shape[1])

    @property
    def window(self) -> tuple[Array, Array]:
        """Keys and values behind the sinks: ``(streams, window, dim)``."""
        return self.keys[:, self.sink :, :], self.values[:, self.sink :, :]

    def each(self, function: Callable[[Any], Any]) -> Exact:
        """Apply a function to every array."""
        return Exact(function(self.keys), function(self.values), self.queries.each(function), self.asked)


@dataclass(frozen=True)
class Settled:
    """Clusters as they are stored, and the exact tokens behind them; see `subgen.means.MeansState`."""

    keys: Array
    values: Array
    spread: Array
    importance: Array
    key_codes: Codes | None
    value_codes: Codes | None
    queries: Codes


def means_and_exact(stored: Any, clusters: int, asked: tuple[bool, ...]) -> tuple[Any, Any, Exact]:
    """Return the means of keys and of values, as they are stored, and the exact tokens.

    Parameters
    ----------
    stored : Settled
        Or anything else that has its keys, values and queries, and codes of the means or None.
    clusters : int
        Means that there are, before the exact tokens if they are no codes.
    asked : tuple of bool
        Which tokens in the window came with queries.
    """
    keys, values = stored.keys, stored.values
    if stored.key_codes is not None:
        return stored.key_codes, stored.value_codes, Exact(keys, values, stored.queries, asked)
    exact = Exact(keys[:, clusters:, :], values[:, clusters:, :], stored.queries, asked)
    return keys[:, :clusters, :], values[:, :clusters, :], exact


def settle(means: Means, exact: Exact, leave: int, dithers: Dithers, coded: bool) -> Settled:
    """Round clusters to what they are stored in, and move up the tokens behind those that leave the window.

    Parameters
    ----------
    means : Means
        In float32 or float64.
    exact : Exact
        In the dtype to store in.
    leave : int
        How many leave from behind the sinks; as much room, zeros, comes behind the last.
    dithers : Dithers
    coded : bool
        Whether means are stored in 8 bits, and then not before the exact tokens.

    Returns
    -------
    Settled
        New arrays: room is written in place.
    """
    xp = array_namespace(exact.keys)
    dtype, sink = exact.keys.dtype, exact.sink

    def moved_up(x: Array, first: int) -> list[Array]:
        return [x[:, :first, ...], x[:, first + leave :, ...], xp.zeros_like(x[:, :leave, ...])]

    def queue(x: Array) -> Array:
        return xp.concat(moved_up(x, 0), axis=1)

    keys, values = moved_up(exact.keys, sink), moved_up(exact.values, sink)
    key_codes = value_codes = None
    if coded:
        key_codes = quantize(means.keys, dtype, dithers.keys)
        value_codes = quantize(means.values, dtype, dithers.values)
    else:
        keys.insert(0, round_to(means.keys, dtype, dithers.keys))
        values.insert(0, round_to(means.values, dtype, dithers.values))
    return Settled(
        keys=xp.concat(keys, axis=1),
        values=xp.concat(values, axis=1),
        spread=round_roots(means.spread, dtype, dithers.spread),
        importance=round_roots(means.importance, dtype, dithers.importance),
        key_codes=key_codes,
        value_codes=value_codes,
        queries=exact.queries.each(queue),
    )


@dataclass(frozen=True)
class Absorption:
    """What `absorb` is told.

    Attributes
    ----------
    leave : int
        How many tokens leave the window, from behind the sinks.
    weight : float
        Factor of their importance; see `collect`.
    most : int
        Clusters that may be left.
    scale : float or None
        Factor of the logits; see `subgen.metric.query_moment`.
    dithers : Dithers
    coded : bool
        Whether means are stored in 8 bits, those that are held too; see `settle`.
    """

    leave: int
    weight: float
    most: int
    scale: float | None
    dithers: Dithers
    coded: bool


@dataclass(frozen=True)
class Absorbed:
    """What `absorb` gives.

    Attributes
    ----------
    settled : Settled
    counts : int64 array, shape (streams, clusters)
    nearest : int32 array, shape (streams, clusters), or None
        See `subgen.merging.Means`.
    moved : int64 array, shape (streams, clusters that were held + tokens that left)
        The place where each is now.
    """

    settled: Settled
    counts: Array
    nearest: Array | None
    moved: Array


def absorb(held: Means, exact: Exact, told: Absorption, ops: Any) -> Absorbed:
    """Let the oldest tokens of the window join the clusters, and merge the closest until there is room.

    Parameters
    ----------
    held : Means
        The clusters, as they are stored; without leaders, by which others join (`subgen.leaders`).
    exact : Exact
        With a full window.
    told : Absorption
    ops : Operations
        `collect`, `subgen.metric.query_moment`, `subgen.merging.merge_closest` and `settle`, one after the other, are
        what this is.

    Returns
    -------
    Absorbed
    """
    keys, values = exact.window
    pool, unit = ops.collect(held, keys, values, told.leave, told.weight)
    metric = ops.query_moment(keys, exact.queries, exact.asked, told.scale)
    merged, moved = ops.merge_closest(pool, metric, unit, told.most, told.most)
    settled = ops.settle(merged, exact, told.leave, told.dithers, told.coded)
    return Absorbed(settled, merged.counts, merged.nearest, moved)
