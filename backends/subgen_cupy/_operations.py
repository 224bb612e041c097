"""What the backend offers: the choice, by shape and dtype, between its kernels and what there is without them.

Arrays are CuPy's, or tensors of torch on a CUDA device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from subgen.absorbing import Dithers, Exact, Settled
from subgen.backends import PORTABLE
from subgen.blocks import Tokens, Turn, Turned
from subgen.decoding import Decoded, Held
from subgen.merging import Means, merge_in_parts
from subgen.rounding import Codes, Dither

from . import _absorbing, _attention, _blocks, _cupy, _decoding, _leaders, _merging, _rounding, _threefry, _torch
from ._launch import ALIGNMENT, Array, Device, element

__all__ = [
    "absorb_blocks",
    "assign_leaders",
    "coded_attention",
    "collect",
    "decode",
    "device_of",
    "merge_closest",
    "quantize",
    "query_codes",
    "query_moment",
    "settle",
    "sketch_attention",
    "threefry2x32",
    "weighted_attention",
    "write",
]

_STORED = ("float16", "bfloat16", "float32")


def device_of(x: Array) -> Device:
    """Return where an array is.

    Raises
    ------
    TypeError
        If it is not on a CUDA device.
    """
    if _is_torchs(x) and _torch.on_cuda(x):
        return _torch.device_of(x)
    if hasattr(getattr(x, "data", None), "ptr"):
        return _cupy.device_of(x)
    raise TypeError(f"the kernels take arrays of CuPy, or tensors of torch on a CUDA device: got {type(x)}")


def _is_torchs(x: Array) -> bool:
    return type(x).__module__.split(".")[0] == "torch"


def _without(operation: str, x: Array) -> Callable[..., Any]:
    """Return what serves such arrays where no kernel does: of torch's backend, or portable."""
    if _is_torchs(x):
        import subgen_torch

        return subgen_torch.OWN.operations.get(operation, PORTABLE[operation])
    return PORTABLE[operation]


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
    if not _few_rows(queries, keys, values):
        answer: tuple[Array, Array] = _without("weighted_attention", queries)(queries, keys, values, log_weights)
        return answer
    return _attention.attend(device_of(queries), queries, keys, values, log_weights=log_weights)


def sketch_attention(
    rows: Array,
    keys: Array,
    values: Array,
    counts: Array,
    spread: Array,
    causal: int = 0,
    weighted: Callable[..., tuple[Array, Array]] = weighted_attention,
) -> tuple[Array, Array]:
    """Attention over clusters, and over exact pairs behind them; see `subgen.mass.sketch_attention`.

    One pass over both where there are few rows and each sees every pair, as in decoding: a query of the last token
    does. Two launches and no question to the host, so it can be captured in a CUDA graph.
    """
    if causal > 1 or not _few_rows(rows, keys, values) or element(spread.dtype) not in _STORED:
        answer: tuple[Array, Array] = _without("sketch_attention", rows)(
            rows, keys, values, counts, spread, causal, weighted
        )
        return answer
    return _attention.attend(device_of(rows), rows, keys, values, (counts, spread))


def coded_attention(
    rows: Array,
    keys: Array,
    values: Array,
    counts: Array,
    spread: Array,
    key_codes: Codes,
    value_codes: Codes,
    causal: int,
    ops: Any,
) -> tuple[Array, Array]:
    """Attention over clusters in 8 bits, and over exact pairs; see `subgen.mass.coded_attention`.

    One pass over both, as in `sketch_attention`.
    """
    stored = element(keys.dtype)
    if causal > 1 or not _few_rows(rows, keys, values) or not _coded_in(stored, spread, key_codes, value_codes):
        answer: tuple[Array, Array] = _without("coded_attention", rows)(
            rows, keys, values, counts, spread, key_codes, value_codes, causal, ops
        )
        return answer
    codes = key_codes, value_codes
    return _attention.attend(device_of(rows), rows, keys, values, (counts, spread), codes=codes)


def _coded_in(stored: str, spread: Array, *codes: Codes) -> bool:
    """Whether means in 8 bits, if they are, have scales in a dtype, and spread is stored as kernels read it."""
    return element(spread.dtype) in _STORED and {element(x.scales.dtype) for x in codes} <= {stored}


def merge_closest(
    means: Means, metric: Array | None, value_scale: Array, most: int, places: int
) -> tuple[Means, Array]:
    """Merge closest pairs of clusters; see `subgen.merging.merge_closest`.

    In float32, and up to as many clusters as the matching has room for, without a question to the host. Streams take
    turns where the costs of all together are too many.
    """
    n = means.counts.shape[1]
    if element(means.keys.dtype) != "float32" or n > _merging.MOST_CLUSTERS or not (means.keys.size and most > 0):
        answer: tuple[Means, Array] = _without("merge_closest", means.keys)(means, metric, value_scale, most, places)
        return answer
    device, parts = device_of(means.keys), _merging.parts(means.counts.shape[0], n)
    if len(parts) == 1:
        return _merging.shrink(device, means, metric, value_scale, most, places)
    return merge_in_parts(partial(_merging.shrink, device), parts, means, metric, value_scale, most, places)


def write(x: Array, start: int, block: Array) -> Array:
    """Put a block into an array along its second axis, in place; see `subgen.tail.write`."""
    x[:, start : start + block.shape[1]] = block
    return x


def query_codes(queries: Array, scale: float, first: int, dtype: object, ops: Any) -> Codes:
    """Choose and round a query of each token; see `subgen.queries.query_codes`. In one launch."""
    if element(queries.dtype) not in _STORED or element(dtype) != "float32" or 0 in queries.shape:
        codes: Codes = _without("query_codes", queries)(queries, scale, first, dtype, ops)
        return codes
    device, (streams, group, n, dim) = device_of(queries), queries.shape
    rows = device.xp.reshape(queries, (streams * group, n, dim))
    return _rounding.query_codes(device, rows, group, scale, first)


def quantize(x: Array, dtype: object, uniform: Dither | None = None) -> Codes:
    """Round vectors to 8 bits; see `subgen.rounding.quantize`. To nearest, in float32, in one launch."""
    if uniform is not None or {element(x.dtype), element(dtype)} != {"float32"} or x.size == 0:
        codes: Codes = _without("quantize", x)(x, dtype, uniform)
        return codes
    return _rounding.query_codes(device_of(x), x, 1, 1.0, 0)


def collect(held: Means, keys: Array, values: Array, leave: int, weight: float) -> tuple[Means, Array]:
    """Put the tokens that leave the window behind the clusters; see `subgen.absorbing.collect`."""
    stored = element(keys.dtype)
    arrays = (*_numbers(held), values, held.spread, held.importance)
    taken = (
        stored in _STORED
        and {element(x.dtype) for x in arrays} == {stored}
        and keys.shape[-1] <= _absorbing.MOST_DIM
        and 0 not in (keys.size, values.size)
    )
    if not taken:
        answer: tuple[Means, Array] = _without("collect", keys)(held, keys, values, leave, weight)
        return answer
    return _absorbing.collect(device_of(keys), held, keys, values, leave, weight)


def _numbers(held: Means) -> list[Array]:
    """Return the means of keys and values, or their scales if they are in 8 bits."""
    return [x.scales if isinstance(x, Codes) else x for x in (held.keys, held.values)]


def query_moment(keys: Array, queries: Codes, asked: tuple[bool, ...], scale: float | None) -> Array:
    """Second moment of the queries in the window; see `subgen.metric.query_moment`.

    By a kernel where all tokens came with queries, or none.
    """
    if element(keys.dtype) not in _STORED or 0 in (keys.size, queries.codes.size) or len(set(asked)) > 1:
        moment: Array = _without("query_moment", keys)(keys, queries, asked, scale)
        return moment
    if any(asked):
        return _absorbing.query_moment(device_of(keys), queries, len(asked))
    return _absorbing.key_moment(device_of(keys), keys, scale)


def settle(means: Means, exact: Exact, leave: int, dithers: Dithers, coded: bool) -> Settled:
    """Round clusters, and move up the tokens that stay; see `subgen.absorbing.settle`."""
    keys, values = exact.keys, exact.values
    stored, wide = element(keys.dtype), {element(x.dtype) for x in (means.keys, means.values, means.spread)}
    if stored not in _STORED or element(values.dtype) != stored or wide != {"float32"} or 0 in (keys.size, values.size):
        settled: Settled = _without("settle", keys)(means, exact, leave, dithers, coded)
        return settled
    return _absorbing.settle(device_of(keys), means, exact, leave, dithers, coded)


def absorb_blocks(
    held: Means,
    exact: Exact,
    tokens: Tokens,
    scale: float | None,
    leave: int,
    turns: Sequence[Turn],
    ops: Any,
) -> Turned:
    """Let half a window join the clusters, turn after turn; see `subgen.blocks.absorb_blocks`.

    Recorded as a CUDA graph and replayed, where there are enough turns and kernels take the arrays as they lie.
    """
    keys, values = exact.keys, exact.values
    stored, arrays = element(keys.dtype), (*_numbers(held), held.spread, held.importance, values)
    size = 4 if stored == "float32" else 2
    taken = (
        len(turns) >= _blocks.FEWEST_TURNS
        and stored in _STORED
        and {element(x.dtype) for x in (*arrays, tokens.keys, tokens.values)} == {stored}
        and element(exact.queries.scales.dtype) == "float32"
        and all(x.shape[-1] * size % ALIGNMENT == 0 and x.shape[-1] for x in (keys, values))
        and keys.shape[-1] <= _absorbing.MOST_DIM
        and 0 < held.counts.shape[1] <= _merging.MOST_CLUSTERS - leave
        and len(_merging.parts(held.counts.shape[0], held.counts.shape[1] + leave)) == 1
        and 0 not in (keys.size, values.size)
        and (device := device_of(keys)).recordable
    )
    if not taken:
        turned: Turned = _without("absorb_blocks", keys)(held, exact, tokens, scale, leave, turns, ops)
        return turned
    return _blocks.absorb_blocks(device, held, exact, tokens, scale, leave, turns)


def decode(held: Held, queries: Array, keys: Array, values: Array, scale: float, ops: Any) -> Decoded:
    """Put a token behind the exact ones and answer it; see `subgen.decoding.decode`. Three launches.

    Where the token goes is known to the host; `subgen_cupy.Decoder` launches the same for every token.
    """
    if not takes_in(held, queries, keys, values):
        decoded: Decoded = _without("decode", keys)(held, queries, keys, values, scale, ops)
        return decoded
    return _decoding.decode(device_of(keys), held, queries, keys, values, scale)


def takes_in(held: Held, queries: Array, keys: Array, values: Array) -> bool:
    """Whether kernels take a token in and answer it."""
    device, stored = device_of(keys), element(keys.dtype)
    return (
        _few_rows(queries, keys, values, _STORED)
        and {element(x.dtype) for x in (queries, held.keys, held.values)} == {stored}
        and _coded_in(stored, held.spread, *(x for x in (held.key_codes, held.value_codes) if x is not None))
        and element(held.queries.scales.dtype) == "float32"
        and held.queries.codes.shape[1] > 0
        and all(_decoding.stays(device, x) for x in (held.keys, held.values, held.queries.codes, held.queries.scales))
    )


def _few_rows(queries: Array, keys: Array, values: Array, dtypes: tuple[str, ...] = ("float32",)) -> bool:
    """Whether the kernel takes it: queries of a dtype, so few that reading keys and values is what takes the time."""
    rows, dim = queries.shape[1], max(keys.shape[-1], values.shape[-1])
    return (
        element(queries.dtype) in dtypes
        and element(keys.dtype) in _STORED
        and element(values.dtype) == element(keys.dtype)
        and rows <= _attention.MOST_ROWS
        and 0 < dim <= _attention.MOST_DIM
        and 0 not in (queries.size, keys.size, values.size)
    )
