"""What the backend offers: the checks and choices before the launches."""

from __future__ import annotations

from subgen.backends import PORTABLE
from subgen.merging import Means

from . import _attention, _leaders, _merging, _threefry
from ._cupy import device_of
from ._launch import Array, Device, element

__all__ = ["assign_leaders", "attend_clusters", "merge_closest", "threefry2x32", "weighted_attention"]

_STORED = ("float16", "bfloat16", "float32")


def threefry2x32(key0: Array, key1: Array, counter0: Array, counter1: Array) -> tuple[Array, Array]:
    """Encrypt a counter under a key; see `subgen.counter.threefry2x32`."""
    device = device_of(counter0)
    words: list[Array] = device.xp.broadcast_arrays(key0, key1, counter0, counter1)
    return _threefry.threefry(device, (words[0], words[1], words[2], words[3]))


def assign_leaders(keys: Array, centres: Array, n_clusters: Array, delta: float) -> tuple[Array, Array]:
    """Assign a block of keys to clusters; see `subgen.clustering.assign_leaders`."""
    return _leaders.leaders(device_of(keys), keys, centres, n_clusters, delta)


def weighted_attention(queries: Array, keys: Array, values: Array, log_weights: Array) -> tuple[Array, Array]:
    """Weighted softmax attention; see `subgen.weighted.weighted_attention`.

    Few rows of queries over keys of up to 32 bits go to the kernels; the rest are matrix products, which CuPy has.
    """
    if not _fits(queries, keys, values):
        answer: tuple[Array, Array] = PORTABLE["weighted_attention"](queries, keys, values, log_weights)
        return answer
    return _attention.attend(device_of(queries), queries, 1.0, (keys, values, log_weights), None)


def attend_clusters(
    queries: Array,
    scale: float,
    exact: tuple[Array, Array, Array | None] | None,
    clusters: tuple[Array, Array, Array, Array] | None,
    *,
    device: Device | None = None,
) -> tuple[Array, Array]:
    """Answer queries from exact pairs and clusters at once, the log-weights of clusters computed on the way.

    Two launches, no question to the host: it can be captured in a CUDA graph.

    Parameters
    ----------
    queries : array, shape (streams, m, head_dim)
        float32 or the dtype of the keys; the query heads of a group are rows of one stream.
    scale : float
        Factor of the queries.
    exact : (keys, values, log_weights or None), or None
        Shapes (streams, n, head_dim), (streams, n, value_dim), (1 or streams, 1 or m, n); None is a weight of one.
    clusters : (keys, values, counts, spread), or None
        Shapes (streams, c, head_dim), (streams, c, value_dim), (streams, c), (streams, c, bands).
    device : Device, optional
        Where the arrays live, for arrays other than CuPy's.

    Returns
    -------
    outputs : float32 array, shape (streams, m, value_dim)
    logsumexp : float32 array, shape (streams, m)

    Raises
    ------
    ValueError
        If shapes do not fit each other, there is nothing to attend to, or a row is too long for the kernel.
    TypeError
        If a dtype is not float16, bfloat16 or float32.
    """
    if queries.ndim != 3:
        raise ValueError(f"queries must have shape (streams, m, head_dim), got {tuple(queries.shape)}")
    streams, rows, head_dim = queries.shape
    for name, pairs in (("exact", exact), ("clusters", clusters)):
        if pairs is None:
            continue
        keys, values = pairs[:2]
        if (
            keys.ndim != 3
            or keys.shape[0] != streams
            or keys.shape[2] != head_dim
            or keys.shape[:2] != values.shape[:2]
        ):
            raise ValueError(
                f"{name}: keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit queries "
                f"{tuple(queries.shape)}; expected ({streams}, n, {head_dim}) and ({streams}, n, value_dim)"
            )
        for what, x in (("keys", keys), ("values", values)):
            if element(x.dtype) not in _STORED:
                raise TypeError(f"{name}: {what} must be {', '.join(_STORED)}; got {element(x.dtype)}")
        if element(keys.dtype) != element(values.dtype):
            raise TypeError(
                f"{name}: keys and values must have one dtype, got {element(keys.dtype)} and {element(values.dtype)}"
            )
    if exact is not None and exact[2] is not None:
        n = exact[0].shape[1]
        shape = tuple(exact[2].shape)
        if len(shape) != 3 or shape[0] not in (1, streams) or shape[1] not in (1, rows) or shape[2] != n:
            raise ValueError(f"log-weights {shape} must be (1 or {streams}, 1 or {rows}, {n})")
    if clusters is not None:
        keys, _, counts, spread = clusters
        bands = spread.shape[-1]
        if tuple(counts.shape) != tuple(keys.shape[:2]) or tuple(spread.shape) != (*keys.shape[:2], bands):
            raise ValueError(
                f"counts {tuple(counts.shape)} and spread {tuple(spread.shape)} must be {tuple(keys.shape[:2])} and "
                f"{tuple(keys.shape[:2])} with a number of bands"
            )
        if bands < 1 or head_dim % bands:
            raise ValueError(f"head_dim {head_dim} cannot be cut into {bands} bands")
    stored = {element(pairs[0].dtype) for pairs in (exact, clusters) if pairs is not None}
    if len(stored) > 1:
        raise TypeError(f"exact pairs and clusters must have one dtype, got {sorted(stored)}")
    if element(queries.dtype) not in {"float32", *stored}:
        raise TypeError(f"queries must be float32 or the dtype of the keys, got {element(queries.dtype)}")
    return _attention.attend(device or device_of(queries), queries, scale, exact, clusters)


def merge_closest(
    means: Means,
    metric: Array | None,
    value_scale: Array,
    most: int,
    places: int | None = None,
    *,
    device: Device | None = None,
) -> Means:
    """Merge closest pairs of clusters and move those left to the front, without a question to the host.

    `subgen.merging.merge_closest` and `compact` in one, in float32.

    Parameters
    ----------
    means : subgen.merging.Means
    metric : array, shape (streams, head_dim, head_dim) or (streams, head_dim), or None
        The second is a diagonal; None is the identity.
    value_scale : array, shape (streams,)
    most : int
        Clusters left in every stream, at most.
    places : int, optional
        Places of the result; ``most`` by default, or as many as there were if those are fewer.
    device : Device, optional
        Where the arrays live, for arrays other than CuPy's.

    Returns
    -------
    subgen.merging.Means

    Raises
    ------
    ValueError
        If there are more clusters than the matching has room for.
    """
    n = means.keys.shape[1]
    where = device or device_of(means.keys)
    merged = _merging.shrink(
        where, means.arrays(), metric, value_scale, most, min(most, n) if places is None else places
    )
    return Means(*merged)


def _fits(queries: Array, keys: Array, values: Array) -> bool:
    rows, dim = queries.shape[1], max(keys.shape[-1], values.shape[-1])
    return (
        element(queries.dtype) == "float32"
        and element(keys.dtype) in _STORED
        and element(values.dtype) == element(keys.dtype)
        and rows <= _attention.MOST_ROWS
        and 0 < dim <= _attention.MOST_DIM
        and 0 not in (queries.size, keys.size, values.size)
    )
