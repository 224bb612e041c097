"""Launches of kernels/attention.cu: split over the keys, then joined by logsumexp; two, whatever the shapes."""

from __future__ import annotations

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


def attention_module(dtype: str, query_dtype: str, head_dim: int, value_dim: int, rows: int, bands: int) -> Module:
    """Choose the variant of the kernels for a shape.

    Parameters
    ----------
    dtype, query_dtype : str
        Names in `ELEMENTS`.
    head_dim, value_dim, rows, bands : int

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
        types=(("ELEMENT", ELEMENTS[dtype]), ("QUERY", ELEMENTS[query_dtype])),
        constants=(
            ("HEAD_DIM", head_dim),
            ("VALUE_DIM", value_dim),
            ("BANDS", bands),
            ("ROWS", tile),
            ("VECTOR", vector),
            ("LANES", lanes),
            ("AHEAD", ahead),
            ("BLOCKS", 3 if held <= 16 else 2),
        ),
    )


def _pieces(count: int, streams_and_tiles: int, keys_a_turn: int, device: Device) -> int:
    """Cut a stream's keys so that the device is full, but no warp is left without a key."""
    if count == 0:
        return 0
    wanted = ceil_div(_BLOCKS_EACH * device.multiprocessors, streams_and_tiles)
    return max(1, min(wanted, ceil_div(count, keys_a_turn), _MOST_PIECES))


def attend(
    device: Device,
    queries: Array,
    scale: float,
    exact: tuple[Array, Array, Array | None] | None,
    clusters: tuple[Array, Array, Array, Array] | None,
) -> tuple[Array, Array]:
    """Weighted attention over exact pairs and merged clusters at once.

    Parameters
    ----------
    device : Device
    queries : array, shape (streams, m, head_dim)
        float32, or the dtype of the keys. Query heads that share a key-value head are rows of one stream.
    scale : float
        Factor of the queries.
    exact : (keys, values, log_weights or None), or None
        Shapes (streams, n, head_dim), (streams, n, value_dim) and float32 (1 or streams, 1 or m, n); None is a
        weight of one.
    clusters : (keys, values, counts, spread), or None
        Shapes (streams, c, head_dim), (streams, c, value_dim), float32 (streams, c) and (streams, c, bands).
        Log-weights as in `subgen.means.log_weights`; a count of zero is a free place.

    Returns
    -------
    outputs : float32 array, shape (streams, m, value_dim)
    logsumexp : float32 array, shape (streams, m)
    """
    some = exact if exact is not None else clusters
    if some is None:
        raise ValueError("attend needs exact pairs, clusters or both")
    streams, rows, head_dim = queries.shape
    value_dim, dtype = some[1].shape[-1], element(some[0].dtype)
    queries = device.packed(queries)
    bands = 1 if clusters is None else clusters[3].shape[-1]
    module = attention_module(dtype, element(queries.dtype), head_dim, value_dim, rows, bands)
    constants = dict(module.constants)
    tiles = ceil_div(rows, constants["ROWS"])

    exact_arguments: list[object] = [address(device, None)] * 3 + [i64(0), i64(0)]
    mean_arguments: list[object] = [address(device, None)] * 4
    exact_count = mean_count = 0
    kept: list[Array] = []  # copies must live until the launch
    if exact is not None:
        exact_count = exact[0].shape[1]
        keys, values = (device.packed(x, dtype) for x in exact[:2])
        weights = None if exact[2] is None else device.packed(exact[2], "float32")
        kept += [keys, values, weights]
        per_row = 0 if weights is None or weights.shape[1] == 1 else exact_count
        per_stream = 0 if weights is None or weights.shape[0] == 1 else weights.shape[1] * exact_count
        exact_arguments = [*(address(device, x) for x in (keys, values, weights)), i64(per_stream), i64(per_row)]
    if clusters is not None:
        mean_count = clusters[0].shape[1]
        means = [device.packed(x, d) for x, d in zip(clusters, (dtype, dtype, "float32", "float32"), strict=True)]
        kept += means
        mean_arguments = [address(device, x) for x in means]

    keys_a_turn = _WARPS * (32 // constants["LANES"]) * constants["AHEAD"]
    # Exact pairs and clusters share the blocks in proportion.
    exact_pieces = _pieces(exact_count, streams * tiles * (2 if mean_count > exact_count else 1), keys_a_turn, device)
    mean_pieces = _pieces(mean_count, streams * tiles, keys_a_turn, device)
    pieces = exact_pieces + mean_pieces
    if streams * rows * value_dim == 0 or pieces == 0:
        raise ValueError(
            f"attend needs queries and pairs, got queries {tuple(queries.shape)}, {exact_count} exact pairs and "
            f"{mean_count} clusters"
        )
    outputs = device.empty((streams, rows, value_dim), "float32")
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
                *exact_arguments,
                i32(exact_count),
                i32(exact_pieces),
                *mean_arguments,
                i32(mean_count),
                i32(mean_pieces),
                address(device, partial),
                address(device, totals),
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
                address(device, outputs),
                address(device, logsumexp),
            ],
        )
    )
    return outputs, logsumexp
