"""Launches of kernels/attention.cu: split over the keys, then joined by logsumexp; two, whatever the shapes."""

from __future__ import annotations

from functools import cache, lru_cache

from subgen.merging import bands as bands_of
from subgen.rounding import Codes

from ._launch import ELEMENTS, MAX_SHARED, Array, Device, Launch, Module, address, ceil_div, element, f32, i32, i64

__all__ = ["MOST_DIM", "MOST_ROWS", "attend", "attention_module"]

#: Up to this many query rows a stream, reading keys and values is what takes the time; beyond, the arithmetic does, and
#: matrix units (the array library's products) are the better choice.
MOST_ROWS = 16

#: Longest rows that the registers of a warp hold.
MOST_DIM = 512

_THREADS = 128
_WARPS = 4
# Blocks wanted for each multiprocessor: about as many as are resident, twice over.
_BLOCKS_EACH = 6
# Of exact pairs and of clusters each: what `attend_join` has room for.
_MOST_PIECES = 64


@cache
def attention_module(
    dtype: str,
    spread_dtype: str,
    head_dim: int,
    value_dim: int,
    rows: int,
    bands: int,
    query_dtype: str = "float32",
    output_dtype: str = "float32",
    coded: bool = False,
) -> Module:
    """Choose the variant of the kernels for a shape.

    Parameters
    ----------
    dtype, spread_dtype : str
        Names in `ELEMENTS`: of keys and values, and of the spread of clusters.
    head_dim, value_dim, rows, bands : int
    query_dtype, output_dtype : str
    coded : bool
        Whether means of clusters are in 8 bits.

    Returns
    -------
    Module

    Raises
    ------
    ValueError
        If a value has more elements than the registers of a warp hold.
    """
    size = {"float32": 4, "float16": 2, "bfloat16": 2}[dtype]
    vector = 16 // size
    while head_dim % vector or value_dim % vector:
        vector //= 2
    lanes = 1
    while lanes < 32 and lanes * vector < max(head_dim, value_dim):
        lanes *= 2
    chunks = ceil_div(head_dim, lanes * vector) + ceil_div(value_dim, lanes * vector)
    # Numbers a lane holds for each row, and what that leaves registers for.
    held = vector * chunks
    if held > 96:
        raise ValueError(f"head_dim {head_dim} and value_dim {value_dim} are too large for the kernel")
    tile = 4 if rows > 2 else rows
    while tile > 1 and (tile * held > 64 or _WARPS * tile * (value_dim + 2) * 4 > MAX_SHARED - 1024):
        tile //= 2
    # Three blocks a multiprocessor with 3 loads of a kilobyte in flight for each warp: more than the latency of memory
    # asks for, and no spills on any architecture.
    ahead = 1 if held > 32 else 2 if held > 16 else 3 if tile == 4 else 4
    return Module(
        "attention.cu",
        types=(
            ("ELEMENT", ELEMENTS[dtype]),
            ("SPREAD", ELEMENTS[spread_dtype]),
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
            ("BLOCKS", 3 if held <= 16 else 2),
            ("CODED", int(coded)),
        ),
    )


@lru_cache(maxsize=4096)
def _cut(
    module: Module, streams: int, rows: int, exact_count: int, mean_count: int, multiprocessors: int
) -> tuple[int, int, int]:
    """Tiles of the rows, and pieces of the exact pairs and of the clusters: enough that the device is full."""
    constants = dict(module.constants)
    tiles = ceil_div(rows, constants["ROWS"])
    keys_a_turn = _WARPS * (32 // constants["LANES"]) * constants["AHEAD"]

    def pieces(count: int, streams_and_tiles: int) -> int:
        """Cut a stream's keys, but leave no warp without a key."""
        wanted = ceil_div(_BLOCKS_EACH * multiprocessors, streams_and_tiles)
        return max(1, min(wanted, ceil_div(count, keys_a_turn), _MOST_PIECES)) if count else 0

    # Exact pairs and clusters share the blocks in proportion.
    of_exact = pieces(exact_count, streams * tiles * (2 if mean_count > exact_count else 1))
    return tiles, of_exact, pieces(mean_count, streams * tiles)


def attend(
    device: Device,
    queries: Array,
    keys: Array,
    values: Array,
    clusters: tuple[Array, Array] | None = None,
    log_weights: Array | None = None,
    scale: float = 1.0,
    output_dtype: str = "float32",
    counters: Array | None = None,
    codes: tuple[Codes, Codes] | None = None,
) -> tuple[Array, Array]:
    """Weighted attention over merged clusters, and over exact pairs behind them.

    Parameters
    ----------
    device : Device
    queries : array, shape (streams, m, head_dim)
        float16, bfloat16 or float32. Query heads that share a key-value head are rows of one stream.
    keys, values : array, shape (streams, n, head_dim) and (streams, n, value_dim)
        float16, bfloat16 or float32. Each stream may be the front of a longer buffer: it is read where it lies.
    clusters : (counts, spread), or None
        Of the first pairs: int64 (streams, c) and (streams, c, bands). Log-weights as in `subgen.mass.log_weights`;
        a count of zero is a free place.
    log_weights : float32 array, shape (1 or streams, 1 or m, n - c), or None
        Of the exact pairs; None is a weight of one.
    scale : float
        What queries are multiplied by, in float32.
    output_dtype : str
        Numbers beyond it become its largest.
    counters : int64 array, shape (2,), or None
        Its first element is one less than how many of the exact pairs there are; None, and all are.
    codes : (Codes, Codes), or None
        Means of the clusters in 8 bits, their scales in the dtype of keys and values, which are then exact pairs alone.

    Returns
    -------
    outputs : array, shape (streams, m, value_dim)
    logsumexp : float32 array, shape (streams, m)
    """
    streams, rows, head_dim = queries.shape
    value_dim = values.shape[-1]
    mean_count = 0 if clusters is None else clusters[0].shape[1]
    exact_count = keys.shape[1] - (mean_count if codes is None else 0)
    queries = device.packed(queries)
    (keys, keys_per_stream), (values, values_per_stream) = device.streams(keys), device.streams(values)
    dtype = element(keys.dtype)
    counts = spread = weights = None
    # Without clusters, the variant that most calls with them need: one compilation for both.
    bands, spread_dtype = bands_of(head_dim), dtype
    if clusters is not None and mean_count:
        counts, spread = device.packed(clusters[0], "int64"), device.packed(clusters[1])
        bands, spread_dtype = spread.shape[-1], element(spread.dtype)
    per_stream = per_row = 0
    if log_weights is not None:
        weights = device.packed(log_weights, "float32")
        per_row = 0 if weights.shape[1] == 1 else exact_count
        per_stream = 0 if weights.shape[0] == 1 else weights.shape[1] * exact_count
    query_dtype = element(queries.dtype)
    coded: list[Array | None] = [None] * 4
    if codes is not None and mean_count:
        coded = [device.packed(x) for x in (*(of.codes for of in codes), *(of.scales for of in codes))]
    shape = head_dim, value_dim, rows, bands
    module = attention_module(dtype, spread_dtype, *shape, query_dtype, output_dtype, coded[0] is not None)
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
                *(address(device, x) for x in (*coded, counts, spread)),
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
