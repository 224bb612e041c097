"""Launches of kernels/attend.cu: attention split over the keys, then merged by logsumexp. Two, whatever the shapes."""

from __future__ import annotations

import math
from functools import cache, lru_cache

from subgen.default.merging import bands as bands_of
from subgen.default.state import Clusters, Quantized, State

from .device import device_of
from .launch import (
    ELEMENTS,
    MAX_SHARED,
    Array,
    Device,
    Launch,
    Module,
    address,
    ceil_div,
    element,
    f32,
    i32,
    i64,
    kernel,
)

__all__ = [
    "MAX_DIM",
    "MAX_ROWS",
    "STORED",
    "attend",
    "attention",
    "attention_module",
    "few_rows",
    "stored_alike",
    "weighted_attention",
]

#: What keys and values are stored in.
STORED = ("float16", "bfloat16", "float32")

#: Up to this many query rows a stream, reading keys and values takes most of the time. Beyond, the arithmetic does, and
#: the array library's matrix products are faster.
MAX_ROWS = 16

#: Length of the longest row that fits the registers of a warp.
MAX_DIM = 512

_THREADS = 128
_WARPS = 4
# Blocks for each multiprocessor: about twice as many as are resident.
_BLOCKS_EACH = 6
# Pieces of exact tokens, and of clusters: `attend_join` has space for so many of each.
_MAX_PIECES = 64


@cache
def attention_module(
    dtype: str,
    variance_dtype: str,
    head_dim: int,
    value_dim: int,
    rows: int,
    bands: int,
    query_dtype: str = "float32",
    output_dtype: str = "float32",
    quantized: bool = False,
) -> Module:
    """Choose the variant of the kernels for a shape.

    Parameters
    ----------
    dtype, variance_dtype : str
        Names in `ELEMENTS`: of keys and values, and of the key variance of clusters.
    head_dim, value_dim, rows, bands : int
    query_dtype, output_dtype : str
    quantized : bool
        Whether means of clusters are int8.

    Returns
    -------
    Module

    Raises
    ------
    ValueError
        If a key or value has more elements than the registers of a warp hold.
    """
    size = {"float32": 4, "float16": 2, "bfloat16": 2}[dtype]
    vector = 16 // size
    while head_dim % vector or value_dim % vector:
        vector //= 2
    lanes = 1
    while lanes < 32 and lanes * vector < max(head_dim, value_dim):
        lanes *= 2
    chunks = ceil_div(head_dim, lanes * vector) + ceil_div(value_dim, lanes * vector)
    # Numbers that a lane holds for each row.
    per_lane = vector * chunks
    if per_lane > 96:
        raise ValueError(f"head_dim {head_dim} and value_dim {value_dim} are too large for the kernel")
    tile = 4 if rows > 2 else rows
    while tile > 1 and (tile * per_lane > 64 or _WARPS * tile * (value_dim + 2) * 4 > MAX_SHARED - 1024):
        tile //= 2
    # Three blocks a multiprocessor with 3 loads of a kilobyte in flight for each warp: enough to hide the latency of
    # memory, and no spills on any architecture.
    ahead = 1 if per_lane > 32 else 2 if per_lane > 16 else 3 if tile == 4 else 4
    return Module(
        "attend.cu",
        types=(
            ("ELEMENT", ELEMENTS[dtype]),
            ("MEAN", "signed char" if quantized else ELEMENTS[dtype]),
            ("VARIANCE", ELEMENTS[variance_dtype]),
            ("QUERY", ELEMENTS[query_dtype]),
            ("OUTPUT", ELEMENTS[output_dtype]),
        ),
        constants=(
            ("HEAD_DIM", head_dim),
            ("VALUE_DIM", value_dim),
            ("BANDS", bands),
            ("ROWS", tile),
            ("VECTOR", vector),
            ("LANES", lanes),
            ("AHEAD", ahead),
            ("BLOCKS", 3 if per_lane <= 16 else 2),
            ("QUANTIZED", int(quantized)),
        ),
    )


@lru_cache(maxsize=4096)
def _cut(
    module: Module, streams: int, rows: int, exact_count: int, mean_count: int, multiprocessors: int
) -> tuple[int, int, int]:
    """Return the tiles of the rows, and the pieces of the exact tokens and of the clusters, to fill the device."""
    constants = dict(module.constants)
    tiles = ceil_div(rows, constants["ROWS"])
    keys_per_step = _WARPS * (32 // constants["LANES"]) * constants["AHEAD"]

    def pieces(count: int, streams_and_tiles: int) -> int:
        """Cut the keys of a stream so that every warp has a key."""
        filling = ceil_div(_BLOCKS_EACH * multiprocessors, streams_and_tiles)
        return max(1, min(filling, ceil_div(count, keys_per_step), _MAX_PIECES)) if count else 0

    # The blocks are divided between exact tokens and clusters.
    of_exact = pieces(exact_count, streams * tiles * (2 if mean_count > exact_count else 1))
    return tiles, of_exact, pieces(mean_count, streams * tiles)


def few_rows(queries: Array, keys: Array, values: Array, dtypes: tuple[str, ...] = ("float32",)) -> bool:
    """Whether the kernel takes queries: their dtype, and so few that reading keys and values takes most of the time."""
    rows, dim = queries.shape[1], max(keys.shape[-1], values.shape[-1])
    return (
        element(queries.dtype) in dtypes
        and element(keys.dtype) in STORED
        and element(values.dtype) == element(keys.dtype)
        and rows <= MAX_ROWS
        and 0 < dim <= MAX_DIM
        and 0 not in (math.prod(queries.shape), math.prod(keys.shape), math.prod(values.shape))
    )


def stored_alike(state: State) -> bool:
    """Whether clusters are stored as the kernels read them: means, or their scales, in the dtype of the tokens."""
    means = [x.scales if isinstance(x, Quantized) else x for x in (state.clusters.keys, state.clusters.values)]
    stored = {element(state.exact.keys.dtype)}
    return {element(x.dtype) for x in means} == stored and element(state.clusters.key_variance.dtype) in STORED


@kernel(when=lambda queries, keys, values, log_weights: few_rows(queries, keys, values))
def weighted_attention(queries: Array, keys: Array, values: Array, log_weights: Array) -> tuple[Array, Array]:
    """Compute weighted softmax attention; see `subgen.softmax.weighted_attention`.

    Few rows of queries over keys of up to 32 bits; the rest are matrix products, which CuPy has.
    """
    return attention(device_of(queries), queries, keys, values, log_weights=log_weights)


def _attends(state: State, rows: Array, causal: int = 0) -> bool:
    return causal <= 1 and few_rows(rows, state.exact.keys, state.exact.values) and stored_alike(state)


@kernel(when=_attends)
def attend(state: State, rows: Array, causal: int = 0) -> tuple[Array, Array]:
    """Answer scaled queries from a state; see `subgen.default.attend.attend`.

    One pass over clusters and exact tokens where there are few rows and each sees all tokens, as in decoding. Two
    launches without synchronisation, so it can be captured in a CUDA graph.
    """
    n = state.exact.n
    return attention(device_of(rows), rows, state.exact.keys[:, :n], state.exact.values[:, :n], state.clusters)


def attention(
    device: Device,
    queries: Array,
    keys: Array,
    values: Array,
    clusters: Clusters | None = None,
    log_weights: Array | None = None,
    scale: float = 1.0,
    output_dtype: str = "float32",
    counters: Array | None = None,
) -> tuple[Array, Array]:
    """Launch weighted attention over clusters and exact tokens.

    Parameters
    ----------
    device : Device
    queries : array, shape (streams, m, head_dim)
        float16, bfloat16 or float32. Query heads that share a key-value head are rows of one stream.
    keys, values : array, shape (streams, n, head_dim) and (streams, n, value_dim)
        The exact tokens, in float16, bfloat16 or float32. A stream may be the front of a longer buffer.
    clusters : Clusters or None
        Means in the dtype of the keys, or int8 with scales in it.
    log_weights : float32 array, shape (1 or streams, 1 or m, n), or None
        Of the exact tokens; ``None`` is a weight of one.
    scale : float
        Softmax scale, applied in float32.
    output_dtype : str
        Numbers beyond it become its largest.
    counters : int64 array, shape (2,), or None
        Its first element is one less than the number of exact tokens; ``None``: all are.

    Returns
    -------
    outputs : array, shape (streams, m, value_dim)
    logsumexp : float32 array, shape (streams, m)
    """
    streams, rows, head_dim = queries.shape
    value_dim, exact_count = values.shape[-1], keys.shape[1]
    mean_count = 0 if clusters is None else clusters.counts.shape[1]
    queries = device.packed(queries)
    (keys, keys_per_stream), (values, values_per_stream) = device.streams(keys), device.streams(values)
    dtype = element(keys.dtype)
    counts = variance = weights = None
    means: list[Array | None] = [None] * 2
    scales: list[Array | None] = [None] * 2
    # Without clusters, choose the variant of most calls with clusters: one compilation for both.
    bands, variance_dtype, quantized = bands_of(head_dim), dtype, False
    if clusters is not None and mean_count:
        counts, variance = device.packed(clusters.counts, "int64"), device.packed(clusters.key_variance)
        bands, variance_dtype = variance.shape[-1], element(variance.dtype)
        stored, quantized = [clusters.keys, clusters.values], isinstance(clusters.keys, Quantized)
        if quantized:
            scales = [device.packed(x.scales) for x in stored]
        means = [device.packed(x.codes if quantized else x) for x in stored]
    per_stream = per_row = 0
    if log_weights is not None:
        weights = device.packed(log_weights, "float32")
        per_row = 0 if weights.shape[1] == 1 else exact_count
        per_stream = 0 if weights.shape[0] == 1 else weights.shape[1] * exact_count
    shape = head_dim, value_dim, rows, bands
    module = attention_module(dtype, variance_dtype, *shape, element(queries.dtype), output_dtype, quantized)
    tiles, exact_pieces, mean_pieces = _cut(module, streams, rows, exact_count, mean_count, device.multiprocessors)
    pieces = exact_pieces + mean_pieces
    outputs = device.empty((streams, rows, value_dim), output_dtype)
    logsumexp = device.empty((streams, rows), "float32")
    partial = device.empty((streams, rows, pieces, value_dim), "float32")
    totals = device.empty((streams, rows, pieces, 2), "float32")
    device.run(
        Launch(
            module,
            "attend_split",
            streams * pieces * tiles,
            _THREADS,
            [
                address(device, queries),
                f32(scale),
                i32(rows),
                *(address(device, x) for x in (keys, values)),
                *(i64(x) for x in (keys_per_stream, values_per_stream)),
                *(address(device, x) for x in (*means, *scales, counts, variance)),
                *(i32(x) for x in (mean_count, mean_pieces)),
                address(device, weights),
                *(i64(x) for x in (per_stream, per_row)),
                i32(exact_count),
                address(device, counters),
                i32(exact_pieces),
                *(address(device, x) for x in (partial, totals)),
            ],
        )
    )
    device.run(
        Launch(
            module,
            "attend_join",
            streams * rows,
            _THREADS,
            [
                *(address(device, x) for x in (partial, totals)),
                i32(pieces),
                *(address(device, x) for x in (outputs, logsumexp)),
            ],
        )
    )
    return outputs, logsumexp
