"""Launches of kernels/absorb.cu, and the operations `absorb` and `absorb_blocks`, which replays a CUDA graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from subgen.backends import PORTABLE
from subgen.default.absorb import AbsorbOptions, Tokens, sample_evicted
from subgen.default.merging import n_live
from subgen.default.metric import RULE
from subgen.default.quantization import GOLDEN
from subgen.default.state import BufferOwner, Clusters, Exact, Quantized, State
from subgen.default.threshold import join_leaders
from subgen.leaders import padded_capacity

from .attend import STORED, stored_alike
from .device import device_of
from .graph import Recorder
from .launch import (
    ALIGNMENT,
    ELEMENTS,
    MAX_SHARED,
    Array,
    Device,
    Launch,
    Module,
    address,
    ceil_div,
    element,
    f64,
    i32,
    i64,
    kernel,
)
from .merging import MAX_CLUSTERS, merge_closest, shrink, stream_parts

__all__ = [
    "MAX_DIM",
    "MIN_STEPS",
    "Steps",
    "absorb",
    "absorb_blocks",
    "absorb_module",
    "gather",
    "new_arrays",
    "query_moment",
    "replay_blocks",
    "store",
]

_WARPS = 8
_THREADS = 256
_ROWS = 32
_TILE = 32
_NULL = np.uint64(0)

#: Longest key: each warp of a block needs as many floats of shared memory.
MAX_DIM = MAX_SHARED // (4 * _WARPS)

#: Recording fewer steps than this takes as long as it saves.
MIN_STEPS = 8


def absorb_module(stored: str, quantized: bool = False) -> Module:
    """Return the kernels for tokens stored in a dtype, and means in that or in int8."""
    kind = ELEMENTS[stored]
    return Module("absorb.cu", types=(("ELEMENT", kind), ("MEAN", "signed char" if quantized else kind)))


@dataclass(frozen=True)
class Steps:
    """The numbers that differ between steps of `absorb_blocks`, in device memory, so that every step launches the same.

    Attributes
    ----------
    table : float64 array, shape (steps, 6)
        The weight; the dithers of keys, values, key variance and importance; whether the step refreshes.
    counters : int64 array, shape (2,)
        A step reads its number from one element, and writes the next number to the other.
    odd : bool
        Whether this step reads the second element.
    """

    table: Array
    counters: Array
    odd: bool

    def addresses(self, device: Device) -> list[Any]:
        """Return the arguments of kernels: the table, the number of this step, and that of the next."""
        counters = device.pointer(self.counters)
        now, later = (counters + 8, counters) if self.odd else (counters, counters + 8)
        return [address(device, self.table), np.uint64(now), np.uint64(later)]


def gather(
    device: Device,
    clusters: Clusters,
    keys: Array,
    values: Array,
    options: AbsorbOptions,
    steps: Steps | None = None,
) -> tuple[Clusters, Array]:
    """Put the evicted tokens behind the clusters; see `subgen.default.absorb.gather`. Three launches.

    Keys, values, key variance and importance are stored in one dtype of up to 32 bits. Means are in that dtype, or in
    int8 with scales in it. Keys have at most `MAX_DIM` numbers.
    """
    streams, window, head_dim = keys.shape
    value_dim, (n, bands) = values.shape[-1], clusters.key_variance.shape[1:]
    stored, places = element(keys.dtype), n + options.n_evicted
    means, scales = [clusters.keys, clusters.values], [None, None]
    quantized = isinstance(clusters.keys, Quantized)
    if quantized:
        means, scales = [x.codes for x in means], [device.packed(x.scales) for x in means]
    module = absorb_module(stored, quantized)
    rows = n + window
    chunks = ceil_div(rows, _ROWS)
    (mean_keys, mean_key_step), (mean_values, mean_value_step) = map(device.streams, means)
    (keys, key_step), (values, value_step) = map(device.streams, (keys, values))
    counts = device.packed(clusters.counts, "int64")
    variance, importance = map(device.packed, (clusters.key_variance, clusters.importance))
    leaders = None if clusters.leaders is None else device.packed(clusters.leaders)
    nearest = None if clusters.nearest is None else device.packed(clusters.nearest, "int32")
    pool = Clusters(
        keys=device.empty((streams, places, head_dim), "float32"),
        values=device.empty((streams, places, value_dim), "float32"),
        counts=device.empty((streams, places), "int64"),
        key_variance=device.empty((streams, places, bands), "float32"),
        importance=device.empty((streams, places), "float32"),
        leaders=None if leaders is None else device.empty((streams, places, head_dim), stored),
        nearest=None if nearest is None else device.empty((streams, places), "int32"),
    )
    step = [_NULL] * 3 if steps is None else steps.addresses(device)
    sums = device.empty((streams, chunks, head_dim), "float32")
    lengths, dissimilarity = device.empty((streams, rows), "float32"), device.empty((streams, rows), "float32")
    norms, unit = device.empty((streams, window), "float32"), device.empty((streams,), "float32")
    pooled = (pool.keys, pool.values, pool.counts, pool.key_variance, pool.importance, pool.leaders, pool.nearest)
    arguments = [
        *(address(device, x) for x in (mean_keys, mean_values, *scales)),
        *(address(device, x) for x in (counts, variance, importance, leaders, nearest)),
        *(address(device, x) for x in (keys, values)),
        *(i64(x) for x in (mean_key_step, mean_value_step, key_step, value_step)),
        *(i32(x) for x in (n, window, options.n_evicted, head_dim, value_dim, bands)),
        *(address(device, x) for x in (*pooled, sums, lengths, norms)),
        i32(options.refresh),
        *step,
    ]
    device.run(Launch(module, "gather", streams * chunks, _THREADS, arguments, shared=4 * _WARPS * head_dim))
    arguments = [
        *(address(device, x) for x in (mean_keys, scales[0], keys, sums, lengths)),
        *(i64(x) for x in (mean_key_step, key_step)),
        *(i32(x) for x in (n, window, head_dim)),
        address(device, dissimilarity),
    ]
    device.run(Launch(module, "angles", streams * chunks, _THREADS, arguments, shared=4 * head_dim))
    arguments = [
        *(address(device, x) for x in (dissimilarity, counts, norms)),
        *(i32(x) for x in (n, window, options.n_evicted)),
        f64(options.weight),
        *(f64(x) for x in (RULE.value_weight, RULE.least_angle, RULE.least_ratio, RULE.most_ratio)),
        *(address(device, x) for x in (pool.importance, unit)),
        *step[:2],
    ]
    device.run(Launch(module, "weigh", streams, _THREADS, arguments))
    return pool, unit


def query_moment(device: Device, exact: Exact, sink: int, scale: float | None) -> Array:
    """Compute the metric; see `subgen.default.metric.query_second_moment`. One launch."""
    streams, places, head_dim = exact.queries.codes.shape
    codes, scales = device.packed(exact.queries.codes), device.packed(exact.queries.scales, "float32")
    keys, key_step = device.streams(exact.keys[:, sink:])
    moment = device.empty((streams, head_dim, head_dim), "float32")
    arguments = [
        *(address(device, x) for x in (codes, scales, keys)),
        i64(key_step),
        *(i32(x) for x in (places, sink, head_dim)),
        *(f64(x) for x in (RULE.ridge, 1.0 / head_dim if scale is None else scale * scale)),
        address(device, moment),
    ]
    blocks = streams * ceil_div(head_dim, _TILE) ** 2
    module = absorb_module(element(keys.dtype))
    device.run(Launch(module, "query_moment", blocks, _THREADS, arguments, aside=True))
    return moment


def new_arrays(device: Device, clusters: Clusters, exact: Exact, quantized: bool) -> tuple[Clusters, Exact]:
    """Allocate the clusters, in the storage wanted, and the exact tokens that `store` writes."""
    streams, n, head_dim = clusters.keys.codes.shape if isinstance(clusters.keys, Quantized) else clusters.keys.shape
    value_dim, bands, dtype = exact.values.shape[-1], clusters.key_variance.shape[-1], element(exact.keys.dtype)

    def codes(places: int, dim: int, scales: str) -> Quantized:
        return Quantized(device.empty((streams, places, dim), "int8"), device.empty((streams, places), scales))

    def mean(dim: int) -> Any:
        return codes(n, dim, dtype) if quantized else device.empty((streams, n, dim), dtype)

    new = Clusters(
        keys=mean(head_dim),
        values=mean(value_dim),
        counts=device.empty((streams, n), "int64"),
        key_variance=device.empty((streams, n, bands), dtype),
        importance=device.empty((streams, n), dtype),
        nearest=None if clusters.nearest is None else device.empty((streams, n), "int32"),
    )
    keys, values = (device.empty((streams, exact.capacity, dim), dtype) for dim in (head_dim, value_dim))
    return new, Exact(keys, values, codes(exact.capacity, head_dim, "float32"), exact.n, BufferOwner(None))


def store(
    device: Device,
    new: tuple[Clusters, Exact],
    clusters: Clusters,
    exact: Exact,
    options: AbsorbOptions,
    steps: Steps | None = None,
    tokens: Tokens | None = None,
) -> None:
    """Round clusters to what they are stored in, and remove the evicted tokens. One launch.

    See `subgen.default.absorb.store` and `evict`. Clusters are in float32, tokens in one dtype of up to 32 bits. With
    ``steps``, the tokens of the current step fill the free space; ``tokens`` has those of all steps.
    """
    new_clusters, new_exact = new
    (streams, places, head_dim), value_dim = exact.keys.shape, exact.values.shape[-1]
    (n, bands), dtype, queries = clusters.key_variance.shape[1:], element(exact.keys.dtype), exact.queries
    (keys, key_step), (values, value_step) = map(device.streams, (exact.keys, exact.values))
    wide = (clusters.keys, clusters.values, clusters.key_variance, clusters.importance)
    of_clusters = [device.packed(x, "float32") for x in wide]
    counts = device.packed(clusters.counts, "int64")
    nearest = None if clusters.nearest is None else device.packed(clusters.nearest, "int32")
    codes, scales = device.packed(queries.codes), device.packed(queries.scales, "float32")
    results: list[Array | None] = []
    means = (new_clusters.keys, new_clusters.values)
    if isinstance(means[0], Quantized):
        results += [None, None, *(part for x in means for part in (x.codes, x.scales))]
    else:
        results += [*means, *[None] * 4]
    results += [new_clusters.key_variance, new_clusters.importance, new_exact.keys, new_exact.values]
    results += [new_exact.queries.codes, new_exact.queries.scales]
    block: list[Array | None] = [None] * 4
    block_steps = [0, 0, 0]
    if tokens is not None:
        (block[0], block_steps[0]), (block[1], block_steps[1]) = map(device.streams, (tokens.keys, tokens.values))
        block_steps[2] = tokens.keys.shape[1]
        if tokens.queries is not None:
            block[2:] = device.packed(tokens.queries.codes), device.packed(tokens.queries.scales, "float32")
    rows = streams * (n + places)
    dithers = [dither.drawn for dither in _dithers(options)]
    arguments = [
        *(address(device, x) for x in (*of_clusters, keys, values, codes, scales)),
        *(i64(x) for x in (key_step, value_step, rows)),
        *(i32(x) for x in (n, options.sink, places, options.n_evicted, head_dim, value_dim, bands)),
        *(f64(x) for x in (GOLDEN, *dithers)),
        *(address(device, x) for x in results),
        *(address(device, x) for x in (counts, nearest, new_clusters.counts, new_clusters.nearest)),
        *([_NULL] * 2 if steps is None else steps.addresses(device)[:2]),
        *(address(device, x) for x in block),
        *(i64(x) for x in block_steps),
    ]
    device.run(Launch(absorb_module(dtype), "store", ceil_div(rows, _WARPS), _THREADS, arguments))


def _dithers(options: AbsorbOptions) -> list[Any]:
    dithers = options.dithers
    return [dithers.keys, dithers.values, dithers.key_variance, dithers.importance]


def _absorbs(state: State, options: AbsorbOptions) -> bool:
    exact, clusters = state.exact, state.clusters
    stored = element(exact.keys.dtype)
    return (
        stored in STORED
        and {element(x.dtype) for x in (exact.values, clusters.key_variance, clusters.importance)} == {stored}
        and stored_alike(state)
        and element(exact.queries.scales.dtype) == "float32"
        and exact.keys.shape[-1] <= MAX_DIM
        and 0 not in (math.prod(exact.keys.shape), math.prod(exact.values.shape))
    )


@kernel(when=_absorbs)
def absorb(state: State, options: AbsorbOptions) -> State:
    """Absorb the oldest tokens of the window; see `subgen.default.absorb.absorb`."""
    device, exact, n_clusters = device_of(state.exact.keys), state.exact, state.clusters.counts.shape[1]
    keys, values = (x[:, options.sink :] for x in (exact.keys, exact.values))
    pool, unit = gather(device, state.clusters, keys, values, options)
    joined = None
    if options.delta is not None:
        clusters, tokens = pool.part(slice(n_clusters)), pool.part(slice(n_clusters, None))
        pool, joined = join_leaders(clusters, tokens, options.delta)
    metric = query_moment(device, exact, options.sink, options.scale)
    places = pool.counts.shape[1]
    left = places if options.max_clusters is None else min(places, options.max_clusters)
    result = merge_closest(pool, metric, unit, left, left)
    if result is NotImplemented:
        result = PORTABLE["merge_closest"](pool, metric, unit, left, left)
    merged, assignment = result
    if options.delta is not None:
        capacity = padded_capacity(int(device.xp.max(n_live(merged))))
        merged = merged.part(slice(min(capacity, merged.counts.shape[1])))
    new_clusters, new_exact = new_arrays(device, merged, exact, isinstance(state.clusters.keys, Quantized))
    store(device, (new_clusters, new_exact), merged, exact, options)
    n = exact.n - options.n_evicted
    return State(
        clusters=replace(new_clusters, leaders=merged.leaders),
        exact=replace(new_exact, n=n, owner=BufferOwner(n)),
        residual=sample_evicted(state, options, joined, assignment),
        n_seen=state.n_seen,
    )


def _replays(state: State, tokens: Tokens, steps: Sequence[AbsorbOptions]) -> bool:
    exact, stored = state.exact, element(state.exact.keys.dtype)
    streams, n = state.clusters.counts.shape
    size = 4 if stored == "float32" else 2
    return (
        len(steps) >= MIN_STEPS
        and _absorbs(state, steps[0])
        and {element(x.dtype) for x in (tokens.keys, tokens.values)} == {stored}
        and all(x.shape[-1] * size % ALIGNMENT == 0 for x in (exact.keys, exact.values))
        and 0 < n <= MAX_CLUSTERS - steps[0].n_evicted
        and len(stream_parts(streams, n + steps[0].n_evicted)) == 1
        and device_of(exact.keys).recordable
    )


@kernel(when=_replays)
def absorb_blocks(state: State, tokens: Tokens, steps: Sequence[AbsorbOptions]) -> State:
    """Absorb half a window and append as many tokens, step after step; see `subgen.default.absorb.absorb_blocks`."""
    return replay_blocks(device_of(state.exact.keys), state, tokens, steps)


def replay_blocks(device: Device, state: State, tokens: Tokens, steps: Sequence[AbsorbOptions]) -> State:
    """Do what `absorb_blocks` does; from the fourth step on, launches are replayed, two steps at a time.

    The first step reads the given state and writes one set of arrays. The second step writes another set, the third the
    first set again. The launches of these two are replayed for all later steps. A table on the device holds the numbers
    that differ between steps, and kernels count the steps. Rows must be multiples of 16 bytes: then nothing is copied.

    Parameters
    ----------
    device : Device
    state, tokens, steps
        As in `absorb_blocks`, with at least three steps.

    Returns
    -------
    State
    """
    options, n = steps[0], state.clusters.counts.shape[1]
    quantized = isinstance(state.clusters.keys, Quantized)
    sets = [new_arrays(device, state.clusters, state.exact, quantized) for _ in range(2)]
    tokens = _packed(device, tokens)
    rows = [[x.weight, *(dither.drawn for dither in _dithers(x)), float(x.refresh)] for x in steps]
    table = device.upload(np.array(rows))
    counters = device.upload(np.zeros(2, dtype=np.int64))

    def step(device: Device, clusters: Clusters, exact: Exact, new: tuple[Clusters, Exact], odd: bool) -> None:
        at = Steps(table, counters, odd)
        metric = query_moment(device, exact, options.sink, options.scale)
        keys, values = (x[:, options.sink :] for x in (exact.keys, exact.values))
        pool, unit = gather(device, clusters, keys, values, options, at)
        merged, _ = shrink(device, pool, metric, unit, n, n)
        store(device, new, merged, exact, options, at, tokens)

    step(device, state.clusters, state.exact, sets[0], False)
    recorder = Recorder(device)
    step(recorder, *sets[0], sets[1], True)
    first = list(recorder.launches)
    step(recorder, *sets[1], sets[0], False)
    replay = device.replayed(recorder.launches)
    pairs, one_more = divmod(len(steps) - 3, 2)
    for _ in range(pairs):
        replay()
    if one_more:
        for launch in first:
            device.run(launch)
    clusters, exact = sets[one_more]
    filled = replace(exact, owner=BufferOwner(exact.n))
    return State(clusters, filled, state.residual, state.n_seen + len(steps) * options.n_evicted)


def _packed(device: Device, tokens: Tokens) -> Tokens:
    """Copy, once, those arrays that kernels cannot read in place."""
    queries = tokens.queries
    if queries is not None:
        queries = Quantized(device.packed(queries.codes), device.packed(queries.scales, "float32"))
    return Tokens(device.streams(tokens.keys)[0], device.streams(tokens.values)[0], queries)
