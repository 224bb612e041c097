"""What is done when half a window joins the clusters: `absorb`, and of it what comes before they merge and after.

`collect` and `settle` pass over all that a sketch holds once. They, and the whole, are operations of the registry of
backends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ._array import Array, array_namespace, compute_dtype
from .merging import Means, clusters_of_one, join
from .metric import typical_direction, unusualness
from .rounding import Codes, Dither, dequantize, quantize, round_to

__all__ = [
    "VALUE_WEIGHT",
    "Absorbed",
    "Dithers",
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


def means_and_exact(stored: Any, clusters: int) -> tuple[Array, Array, Array, Array]:
    """Return the means of keys and of values, as they are stored, and the exact ones with the room behind them.

    Parameters
    ----------
    stored : Settled
        Or anything else that has its keys and values, and codes of the means or None.
    clusters : int
        Means that there are, before the exact tokens if they are no codes.
    """
    keys, values = stored.keys, stored.values
    if stored.key_codes is not None:
        return stored.key_codes, stored.value_codes, keys, values
    return keys[:, :clusters, :], values[:, :clusters, :], keys[:, clusters:, :], values[:, clusters:, :]


def widened(means: Means, wide: object) -> Means:
    """Cast what is stored to the dtype to compute in; counts, leaders and nearest others stay."""
    xp = array_namespace(means.counts)
    keys, values, spread, importance = (
        dequantize(x, wide) if isinstance(x, Codes) else xp.astype(x, wide, copy=False)
        for x in (means.keys, means.values, means.spread, means.importance)
    )
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
class Settled:
    """Clusters as they are stored, and the exact tokens behind them; see `subgen.means.MeansState`."""

    keys: Array
    values: Array
    spread: Array
    importance: Array
    key_codes: Codes | None
    value_codes: Codes | None
    queries: Codes


def settle(
    means: Means, keys: Array, values: Array, queries: Codes, leave: int, dithers: Dithers, coded: bool
) -> Settled:
    """Round clusters to what they are stored in, and move up the tokens behind those that leave the window.

    Parameters
    ----------
    means : Means
        In float32 or float64.
    keys, values : array, shape (streams, sink + window, dim)
        The exact tokens, and room behind them, in the dtype to store in.
    queries : Codes, of shape (streams, window, head_dim)
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
    xp = array_namespace(keys)
    dtype, sink = keys.dtype, keys.shape[1] - queries.codes.shape[1]

    def moved_up(x: Array, first: int) -> list[Array]:
        return [x[:, :first, ...], x[:, first + leave :, ...], xp.zeros_like(x[:, :leave, ...])]

    def queue(x: Array) -> Array:
        return xp.concat(moved_up(x, 0), axis=1)

    exact_keys, exact_values = moved_up(keys, sink), moved_up(values, sink)
    key_codes = value_codes = None
    if coded:
        key_codes = quantize(means.keys, dtype, dithers.keys)
        value_codes = quantize(means.values, dtype, dithers.values)
    else:
        exact_keys.insert(0, round_to(means.keys, dtype, dithers.keys))
        exact_values.insert(0, round_to(means.values, dtype, dithers.values))
    return Settled(
        keys=xp.concat(exact_keys, axis=1),
        values=xp.concat(exact_values, axis=1),
        spread=round_to(means.spread, dtype, dithers.spread),
        importance=round_to(means.importance, dtype, dithers.importance),
        key_codes=key_codes,
        value_codes=value_codes,
        queries=Codes(queue(queries.codes), queue(queries.scales)),
    )


@dataclass(frozen=True)
class Absorbed:
    """What `absorb` gives.

    Attributes
    ----------
    settled : Settled
    counts : int32 array, shape (streams, clusters)
    nearest : int32 array, shape (streams, clusters), or None
        See `subgen.merging.Means`.
    moved : int64 array, shape (streams, clusters that were held + tokens that left)
        The place where each is now.
    """

    settled: Settled
    counts: Array
    nearest: Array | None
    moved: Array


def absorb(
    held: Means,
    keys: Array,
    values: Array,
    queries: Codes,
    asked: tuple[bool, ...],
    scale: float | None,
    leave: int,
    weight: float,
    most: int,
    dithers: Dithers,
    coded: bool,
    ops: Any,
) -> Absorbed:
    """Let the oldest tokens of the window join the clusters, and merge the closest until there is room.

    Parameters
    ----------
    held : Means
        The clusters, as they are stored; without leaders, by which others join (`subgen.leaders`).
    keys, values : array, shape (streams, sink + window, dim)
        The exact tokens, as they are stored.
    queries : Codes, of shape (streams, window, head_dim)
    asked : tuple of bool, length window
        Which tokens in the window came with queries.
    scale : float or None
        Factor of the logits; see `subgen.metric.query_moment`.
    leave : int
        How many tokens leave the window, from behind the sinks.
    weight : float
        Factor of their importance; see `collect`.
    most : int
        Clusters that may be left.
    dithers : Dithers
    coded : bool
        Whether means are stored in 8 bits, those that are held too; see `settle`.
    ops : Operations
        `collect`, `subgen.metric.query_moment`, `subgen.merging.merge_closest` and `settle`, one after the other, are
        what this is.

    Returns
    -------
    Absorbed
    """
    sink = keys.shape[1] - queries.codes.shape[1]
    window_keys = keys[:, sink:, :]
    pool, unit = ops.collect(held, window_keys, values[:, sink:, :], leave, weight)
    metric = ops.query_moment(window_keys, queries, asked, scale)
    merged, moved = ops.merge_closest(pool, metric, unit, most, most)
    settled = ops.settle(merged, keys, values, queries, leave, dithers, coded)
    return Absorbed(settled, merged.counts, merged.nearest, moved)
