"""Launches of kernels/absorbing.cu: what is done around the merging when half a window joins the clusters."""

from __future__ import annotations

from math import sqrt

from subgen.absorbing import VALUE_WEIGHT, Dithers, Settled
from subgen.merging import Means
from subgen.metric import LEAST_ANGLE, RIDGE
from subgen.rounding import GOLDEN, Codes

from ._launch import ELEMENTS, MAX_SHARED, Array, Device, Launch, Module, address, ceil_div, element, f64, i32, i64

__all__ = ["MOST_DIM", "absorbing_module", "collect", "key_moment", "query_moment", "settle"]

_WARPS = 8
_THREADS = 256
_ROWS = 32
_TILE = 32
_KEY_THREADS = 1024

#: Numbers of a key that a block has room for in every warp.
MOST_DIM = MAX_SHARED // (4 * _WARPS)


def absorbing_module(stored: str, means: str) -> Module:
    """Return the kernels for tokens stored in a dtype, and means in that or in float32."""
    return Module("absorbing.cu", types=(("ELEMENT", ELEMENTS[stored]), ("MEAN", ELEMENTS[means])))


def collect(device: Device, held: Means, keys: Array, values: Array, leave: int, weight: float) -> tuple[Means, Array]:
    """Put the tokens that leave behind the clusters; see `subgen.absorbing.collect`. Three launches.

    Keys, values, spread and importance are stored in one dtype of up to 32 bits; means in that or in float32. Keys have
    at most `MOST_DIM` numbers.
    """
    streams, window, head_dim = keys.shape
    value_dim, (clusters, bands) = values.shape[-1], held.spread.shape[1:]
    stored, places = element(keys.dtype), clusters + leave
    module = absorbing_module(stored, element(held.keys.dtype))
    rows = clusters + window
    chunks = ceil_div(rows, _ROWS)
    (held_keys, held_key_step), (held_values, held_value_step) = map(device.streams, (held.keys, held.values))
    (keys, key_step), (values, value_step) = map(device.streams, (keys, values))
    counts, spread, importance = map(device.packed, (held.counts, held.spread, held.importance))
    leaders = None if held.leaders is None else device.packed(held.leaders)
    nearest = None if held.nearest is None else device.packed(held.nearest, "int32")
    pool = Means(
        keys=device.empty((streams, places, head_dim), "float32"),
        values=device.empty((streams, places, value_dim), "float32"),
        counts=device.empty((streams, places), "int32"),
        spread=device.empty((streams, places, bands), "float32"),
        importance=device.empty((streams, places), "float32"),
        leaders=None if leaders is None else device.empty((streams, places, head_dim), stored),
        nearest=None if nearest is None else device.empty((streams, places), "int32"),
    )
    sums = device.empty((streams, chunks, head_dim), "float32")
    lengths, away = device.empty((streams, rows), "float32"), device.empty((streams, rows), "float32")
    norms, value_scale = device.empty((streams, window), "float32"), device.empty((streams,), "float32")
    arguments = [
        *(address(device, x) for x in (held_keys, held_values, counts, spread, importance, leaders, nearest)),
        *(address(device, x) for x in (keys, values)),
        *(i64(step) for step in (held_key_step, held_value_step, key_step, value_step)),
        *(i32(x) for x in (clusters, window, leave, head_dim, value_dim, bands)),
        *(address(device, x) for x in (*pool.arrays(), sums, lengths, norms)),
    ]
    device.run(Launch(module, "gather", streams * chunks, _THREADS, arguments, shared=4 * _WARPS * head_dim))
    arguments = [
        *(address(device, x) for x in (held_keys, keys, sums, lengths)),
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
    device.run(Launch(absorbing_module("float32", "float32"), "query_moment", blocks, _THREADS, arguments))
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
    device.run(Launch(absorbing_module(dtype, dtype), "key_moment", streams, _KEY_THREADS, arguments))
    return moment


def settle(
    device: Device,
    means: Means,
    keys: Array,
    values: Array,
    queries: Codes,
    leave: int,
    dithers: Dithers,
    coded: bool,
) -> Settled:
    """Round clusters, and move up the tokens that stay; see `subgen.absorbing.settle`. One launch.

    Means are in float32, tokens in one dtype of up to 32 bits.
    """
    streams, exact, head_dim = keys.shape
    value_dim, (clusters, bands), window = values.shape[-1], means.spread.shape[1:], queries.codes.shape[1]
    dtype = element(keys.dtype)
    (keys, key_step), (values, value_step) = map(device.streams, (keys, values))
    of_means = [device.packed(x, "float32") for x in (means.keys, means.values, means.spread, means.importance)]
    codes, scales = device.packed(queries.codes), device.packed(queries.scales, "float32")

    def empty_codes(dim: int) -> Codes:
        return Codes(device.empty((streams, clusters, dim), "int8"), device.empty((streams, clusters), dtype))

    places = exact if coded else clusters + exact
    settled = Settled(
        keys=device.empty((streams, places, head_dim), dtype),
        values=device.empty((streams, places, value_dim), dtype),
        spread=device.empty((streams, clusters, bands), dtype),
        importance=device.empty((streams, clusters), dtype),
        key_codes=empty_codes(head_dim) if coded else None,
        value_codes=empty_codes(value_dim) if coded else None,
        queries=Codes(device.empty((streams, window, head_dim), "int8"), device.empty((streams, window), "float32")),
    )
    results = [settled.keys, settled.values, settled.spread, settled.importance]
    for of in (settled.key_codes, settled.value_codes, settled.queries):
        results += [None, None] if of is None else [of.codes, of.scales]
    rows = streams * (clusters + exact)
    arguments = [
        *(address(device, x) for x in (*of_means, keys, values, codes, scales)),
        *(i64(x) for x in (key_step, value_step, rows)),
        *(i32(x) for x in (clusters, exact - window, window, leave, head_dim, value_dim, bands)),
        *(f64(x) for x in (GOLDEN, *(d.drawn for d in (dithers.keys, dithers.values, dithers.spread)))),
        f64(dithers.importance.drawn),
        *(address(device, x) for x in results),
    ]
    device.run(Launch(absorbing_module(dtype, dtype), "settle", ceil_div(rows, _WARPS), _THREADS, arguments))
    return settled
