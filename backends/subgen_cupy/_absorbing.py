"""Launches of kernels/absorbing.cu: what is done around the merging when half a window joins the clusters."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import sqrt
from typing import Any

import numpy as np

from subgen.absorbing import VALUE_WEIGHT, Dithers, Exact, Settled
from subgen.blocks import Tokens
from subgen.merging import Means
from subgen.metric import LEAST_ANGLE, RIDGE
from subgen.rounding import GOLDEN, Codes

from ._launch import ELEMENTS, MAX_SHARED, Array, Device, Launch, Module, address, ceil_div, element, f64, i32, i64

__all__ = [
    "MOST_DIM",
    "Stored",
    "Turns",
    "absorbing_module",
    "collect",
    "key_moment",
    "query_moment",
    "settle",
    "settle_into",
    "stored_like",
]

_WARPS = 8
_THREADS = 256
_ROWS = 32
_TILE = 32
_KEY_THREADS = 1024
_NULL = np.uint64(0)

#: Numbers of a key that a block has room for in every warp.
MOST_DIM = MAX_SHARED // (4 * _WARPS)


def absorbing_module(stored: str, coded: bool = False) -> Module:
    """Return the kernels for tokens stored in a dtype, and means in that or in 8 bits."""
    element_type = ELEMENTS[stored]
    return Module("absorbing.cu", types=(("ELEMENT", element_type), ("MEAN", "signed char" if coded else element_type)))


@dataclass(frozen=True)
class Turns:
    """Where the numbers are that differ between turns of `subgen.blocks`: what is launched is then the same each time.

    Attributes
    ----------
    table : float64 array, shape (turns, 6)
        The factor of importance; what was drawn for keys, values, spread and importance; whether all are compared anew.
    counters : int64 array, shape (2,)
        A turn reads its number from one of them, and leaves the next in the other.
    odd : bool
        Whether this turn reads the second.
    """

    table: Array
    counters: Array
    odd: bool

    def addresses(self, device: Device) -> list[Any]:
        """Return the arguments: the table, this turn and the next."""
        counters = device.pointer(self.counters)
        now, later = (counters + 8, counters) if self.odd else (counters, counters + 8)
        return [address(device, self.table), np.uint64(now), np.uint64(later)]


def collect(
    device: Device,
    held: Means,
    keys: Array,
    values: Array,
    leave: int,
    weight: float = 0.0,
    turns: Turns | None = None,
) -> tuple[Means, Array]:
    """Put the tokens that leave behind the clusters; see `subgen.absorbing.collect`. Three launches.

    Keys, values, spread and importance are stored in one dtype of up to 32 bits; means in that, or in 8 bits with
    scales in that. Keys have at most `MOST_DIM` numbers. The weight is an argument, or in memory.
    """
    streams, window, head_dim = keys.shape
    value_dim, (clusters, bands) = values.shape[-1], held.spread.shape[1:]
    stored, places = element(keys.dtype), clusters + leave
    means, scales = [held.keys, held.values], [None, None]
    coded = isinstance(held.keys, Codes)
    if coded:
        means, scales = [x.codes for x in means], [device.packed(x.scales) for x in means]
    module = absorbing_module(stored, coded)
    rows = clusters + window
    chunks = ceil_div(rows, _ROWS)
    (held_keys, held_key_step), (held_values, held_value_step) = map(device.streams, means)
    (keys, key_step), (values, value_step) = map(device.streams, (keys, values))
    counts = device.packed(held.counts, "int64")
    spread, importance = map(device.packed, (held.spread, held.importance))
    leaders = None if held.leaders is None else device.packed(held.leaders)
    nearest = None if held.nearest is None else device.packed(held.nearest, "int32")
    pool = Means(
        keys=device.empty((streams, places, head_dim), "float32"),
        values=device.empty((streams, places, value_dim), "float32"),
        counts=device.empty((streams, places), "int64"),
        spread=device.empty((streams, places, bands), "float32"),
        importance=device.empty((streams, places), "float32"),
        leaders=None if leaders is None else device.empty((streams, places, head_dim), stored),
        nearest=None if nearest is None else device.empty((streams, places), "int32"),
    )
    turn = [_NULL] * 3 if turns is None else turns.addresses(device)
    sums = device.empty((streams, chunks, head_dim), "float32")
    lengths, away = device.empty((streams, rows), "float32"), device.empty((streams, rows), "float32")
    norms, value_scale = device.empty((streams, window), "float32"), device.empty((streams,), "float32")
    arguments = [
        *(address(device, x) for x in (held_keys, held_values, *scales)),
        *(address(device, x) for x in (counts, spread, importance, leaders, nearest)),
        *(address(device, x) for x in (keys, values)),
        *(i64(step) for step in (held_key_step, held_value_step, key_step, value_step)),
        *(i32(x) for x in (clusters, window, leave, head_dim, value_dim, bands)),
        *(address(device, x) for x in (*pool.arrays(), sums, lengths, norms)),
        *turn,
    ]
    device.run(Launch(module, "gather", streams * chunks, _THREADS, arguments, shared=4 * _WARPS * head_dim))
    arguments = [
        *(address(device, x) for x in (held_keys, scales[0], keys, sums, lengths)),
        *(i64(step) for step in (held_key_step, key_step)),
        *(i32(x) for x in (clusters, window, head_dim)),
        address(device, away),
    ]
    device.run(Launch(module, "turn_away", streams * chunks, _THREADS, arguments, shared=4 * head_dim))
    arguments = [
        *(address(device, x) for x in (away, counts, norms)),
        *(i32(x) for x in (clusters, window, leave)),
        *(f64(x) for x in (weight, LEAST_ANGLE, sqrt(VALUE_WEIGHT))),
        *(address(device, x) for x in (pool.importance, value_scale)),
        *turn[:2],
    ]
    device.run(Launch(module, "weigh", streams, _THREADS, arguments))
    return pool, value_scale


def query_moment(device: Device, queries: Codes, asked: int) -> Array:
    """Second moment of the queries of the first tokens; see `subgen.metric.query_moment`. One launch."""
    streams, places, head_dim = queries.codes.shape
    codes, scales = device.packed(queries.codes), device.packed(queries.scales, "float32")
    moment = device.empty((streams, head_dim, head_dim), "float32")
    arguments = [
        *(address(device, x) for x in (codes, scales)),
        *(i32(x) for x in (places, asked, head_dim)),
        f64(RIDGE),
        address(device, moment),
    ]
    blocks = streams * ceil_div(head_dim, _TILE) ** 2
    module = absorbing_module("float32")
    device.run(Launch(module, "query_moment", blocks, _THREADS, arguments, aside=True))
    return moment


def key_moment(device: Device, keys: Array, scale: float | None) -> Array:
    """Second moment of queries that nobody has shown; see `subgen.metric.query_moment`. One launch."""
    streams, n, head_dim = keys.shape
    dtype = element(keys.dtype)
    keys, step = device.streams(keys)
    moment = device.empty((streams, head_dim, head_dim), "float32")
    arguments = [
        address(device, keys),
        i64(step),
        *(i32(x) for x in (n, head_dim)),
        f64(1.0 / head_dim if scale is None else scale * scale),
        address(device, moment),
    ]
    device.run(Launch(absorbing_module(dtype), "key_moment", streams, _KEY_THREADS, arguments, aside=True))
    return moment


@dataclass(frozen=True)
class Stored:
    """A sketch as it is stored: clusters, and behind them the exact tokens and room.

    Attributes
    ----------
    keys, values : array, shape (streams, clusters + sink + window, dim)
        With codes of the means, exact tokens alone.
    counts, spread, importance, nearest
        See `subgen.merging.Means`. None where `settle` does not write them: counts and nearest others are as they were
        after the merging.
    key_codes, value_codes, queries : Codes
        See `subgen.absorbing.Settled`.
    """

    keys: Array
    values: Array
    spread: Array
    importance: Array
    queries: Codes
    key_codes: Codes | None = None
    value_codes: Codes | None = None
    counts: Array | None = None
    nearest: Array | None = None


def stored_like(device: Device, means: Means, exact: Exact, coded: bool, whole: bool) -> Stored:
    """Return arrays for `settle` to write.

    Parameters
    ----------
    device : Device
    means : Means
        As many as will be written, in any form.
    exact : Exact
    coded : bool
        Whether means are in 8 bits.
    whole : bool
        With counts, and with nearest others.
    """
    (streams, places, head_dim), value_dim = exact.keys.shape, exact.values.shape[-1]
    (clusters, bands), dtype = means.spread.shape[1:], element(exact.keys.dtype)

    def codes(n: int, dim: int, scales: str) -> Codes:
        return Codes(device.empty((streams, n, dim), "int8"), device.empty((streams, n), scales))

    before = 0 if coded else clusters
    return Stored(
        keys=device.empty((streams, before + places, head_dim), dtype),
        values=device.empty((streams, before + places, value_dim), dtype),
        spread=device.empty((streams, clusters, bands), dtype),
        importance=device.empty((streams, clusters), dtype),
        queries=codes(places - exact.sink, head_dim, "float32"),
        key_codes=codes(clusters, head_dim, dtype) if coded else None,
        value_codes=codes(clusters, value_dim, dtype) if coded else None,
        counts=device.empty((streams, clusters), "int64") if whole else None,
        nearest=device.empty((streams, clusters), "int32") if whole else None,
    )


def settle(device: Device, means: Means, exact: Exact, leave: int, dithers: Dithers | None, coded: bool) -> Settled:
    """Round clusters, and move up the tokens that stay; see `subgen.absorbing.settle`. One launch.

    Means are in float32, tokens in one dtype of up to 32 bits.
    """
    new = stored_like(device, means, exact, coded, whole=False)
    settle_into(device, new, means, exact, leave, dithers)
    names = ("keys", "values", "spread", "importance", "key_codes", "value_codes", "queries")
    return Settled(**{name: getattr(new, name) for name in names})


def settle_into(
    device: Device,
    new: Stored,
    means: Means,
    exact: Exact,
    leave: int,
    dithers: Dithers | None = None,
    turns: Turns | None = None,
    coming: Tokens | None = None,
) -> None:
    """Do what `settle` does, into arrays. One launch.

    Dithers are an argument, or in memory. With turns, their tokens take the room that is left: ``coming`` are those of
    all turns.
    """
    (streams, places, head_dim), value_dim = exact.keys.shape, exact.values.shape[-1]
    (clusters, bands), dtype, queries = means.spread.shape[1:], element(exact.keys.dtype), exact.queries
    (keys, key_step), (values, value_step) = map(device.streams, (exact.keys, exact.values))
    of_means = [device.packed(x, "float32") for x in (means.keys, means.values, means.spread, means.importance)]
    codes, scales = device.packed(queries.codes), device.packed(queries.scales, "float32")
    results = [new.keys, new.values, new.spread, new.importance]
    for of in (new.key_codes, new.value_codes, new.queries):
        results += [None, None] if of is None else [of.codes, of.scales]
    drawn = [0.0] * 4 if dithers is None else [getattr(dithers, field.name).drawn for field in fields(dithers)]
    arriving: list[Array | None] = [None] * 4
    steps = [0, 0, 0]
    if coming is not None:
        (arriving[0], steps[0]), (arriving[1], steps[1]) = map(device.streams, (coming.keys, coming.values))
        steps[2] = coming.keys.shape[1]
        if coming.queries is not None:
            arriving[2:] = device.packed(coming.queries.codes), device.packed(coming.queries.scales, "float32")
    rows = streams * (clusters + places)
    arguments = [
        *(address(device, x) for x in (*of_means, keys, values, codes, scales)),
        *(i64(x) for x in (key_step, value_step, rows)),
        *(i32(x) for x in (clusters, exact.sink, places - exact.sink, leave, head_dim, value_dim, bands)),
        *(f64(x) for x in (GOLDEN, *drawn)),
        *(address(device, x) for x in results),
        *(address(device, x) for x in (means.counts, means.nearest, new.counts)),
        address(device, None if means.nearest is None else new.nearest),
        *([_NULL] * 2 if turns is None else turns.addresses(device)[:2]),
        *(address(device, x) for x in arriving),
        *(i64(step) for step in steps),
    ]
    device.run(Launch(absorbing_module(dtype), "settle", ceil_div(rows, _WARPS), _THREADS, arguments))
