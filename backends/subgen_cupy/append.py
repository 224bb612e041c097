"""Launches of kernels/append.cu: quantize queries, and append the token of a decoding step and answer its queries."""

from __future__ import annotations

import math
from dataclasses import replace

from subgen.default.state import Quantized, State, reserve

from .attend import STORED, attention, few_rows, stored_alike
from .device import device_of
from .launch import ELEMENTS, Array, Device, Launch, Module, address, ceil_div, element, f32, i32, i64, kernel

__all__ = [
    "append_module",
    "appends",
    "count_tokens",
    "decode",
    "decode_token",
    "quantize",
    "quantize_queries",
]

_WARPS = 8


def append_module(stored: str, queries: str) -> Module:
    """Return the kernels for tokens stored in a dtype, and queries in theirs."""
    return Module("append.cu", types=(("ELEMENT", ELEMENTS[stored]), ("QUERY", ELEMENTS[queries])))


def _quantizes(queries: Array, scale: float, n_seen: int, dtype: object) -> bool:
    return element(queries.dtype) in STORED and element(dtype) == "float32" and 0 not in queries.shape


@kernel(when=_quantizes)
def quantize_queries(queries: Array, scale: float, n_seen: int, dtype: object) -> Quantized:
    """Select, scale and round a query of each token; see `subgen.default.append.quantize_queries`. One launch."""
    device, (streams, group, n, dim) = device_of(queries), queries.shape
    return quantize(device, device.xp.reshape(queries, (streams * group, n, dim)), group, scale, n_seen)


def quantize(device: Device, queries: Array, group: int, scale: float, first: int) -> Quantized:
    """Select a query of each token, scale it in float32 and round it to nearest.

    Parameters
    ----------
    device : Device
    queries : array, shape (streams * group, n, head_dim)
        float16, bfloat16 or float32; heads may be strided.
    group : int
    scale : float
    first : int
        Number of tokens before these.

    Returns
    -------
    Quantized
        With scales in float32.
    """
    heads, n, dim = queries.shape
    streams = heads // group
    queries, per_head = device.streams(queries)
    codes, scales = device.empty((streams, n, dim), "int8"), device.empty((streams, n), "float32")
    arguments = [
        address(device, queries),
        *(i64(x) for x in (per_head, streams * n)),
        i32(group),
        i64(first),
        *(i32(x) for x in (n, dim)),
        f32(scale),
        *(address(device, result) for result in (codes, scales)),
    ]
    dtype = element(queries.dtype)
    blocks = ceil_div(streams * n, _WARPS)
    device.run(Launch(append_module(dtype, dtype), "quantize_queries", blocks, 32 * _WARPS, arguments))
    return Quantized(codes, scales)


def appends(state: State, queries: Array, keys: Array, values: Array, scale: float = 1.0) -> bool:
    """Whether the kernels append a token to a state in place and answer its queries."""
    device, stored, exact = device_of(keys), element(keys.dtype), state.exact
    places = (exact.keys, exact.values, exact.queries.codes, exact.queries.scales)
    return (
        few_rows(queries, keys, values, STORED)
        and {element(x.dtype) for x in (queries, exact.keys, exact.values)} == {stored}
        and stored_alike(state)
        and element(exact.queries.scales.dtype) == "float32"
        and 0 not in (math.prod(x.shape) for x in places)
        and all(device.packed(x) is x for x in places)
    )


@kernel(when=appends)
def decode(state: State, queries: Array, keys: Array, values: Array, scale: float) -> tuple[State, Array]:
    """Append one token and answer its queries; see `subgen.default.attend.decode`. Three launches.

    The host passes the place of the token. `subgen_cupy.Decoder` keeps it on the device, so that every token launches
    the same.
    """
    state = reserve(state, 1)
    outputs = decode_token(device_of(keys), state, queries, keys, values, scale)
    exact = replace(state.exact, n=state.exact.n + 1)
    return replace(state, exact=exact, n_seen=state.n_seen + 1), outputs


def count_tokens(device: Device, counters: Array, n_exact: int, n_seen: int) -> None:
    """Write the numbers of tokens to the device, see `decode_token`. One launch, without a copy from the host."""
    arguments = [address(device, counters), *(i64(x) for x in (n_exact, n_seen))]
    device.run(Launch(append_module("float32", "float32"), "count_tokens", 1, 1, arguments))


def decode_token(
    device: Device,
    state: State,
    queries: Array,
    keys: Array,
    values: Array,
    scale: float,
    counters: Array | None = None,
) -> Array:
    """Write a token behind the exact ones, in place, and answer its queries.

    Parameters
    ----------
    device : Device
    state : State
        Its exact tokens are packed, and the space is reserved.
    queries : array, shape (streams, group, head_dim)
        In the dtype of the tokens: float16, bfloat16 or float32.
    keys, values : array, shape (streams, 1, dim)
    scale : float
        Softmax scale.
    counters : int64 array, shape (2,), or None
        Exact tokens before this one, and all tokens before it, as `count_tokens` writes them. Every token then launches
        the same. ``None`` takes both numbers from the state.

    Returns
    -------
    array, shape (streams, group, value_dim)
        In the dtype of the tokens.
    """
    streams, group, head_dim = queries.shape
    exact, value_dim = state.exact, values.shape[-1]
    queries = device.packed(queries)
    (keys, key_step), (values, value_step) = device.streams(keys), device.streams(values)
    arguments = [
        *(address(device, x) for x in (queries, keys, values)),
        *(i64(step) for step in (key_step, value_step)),
        address(device, counters),
        *(i64(x) for x in ((exact.n, state.n_seen) if counters is None else (0, 0))),
        f32(scale),
        i64(3 * streams),
        *(i32(x) for x in (group, head_dim, value_dim, exact.capacity)),
        *(address(device, x) for x in (exact.keys, exact.values, exact.queries.codes, exact.queries.scales)),
    ]
    stored = element(exact.keys.dtype)
    module = append_module(stored, element(queries.dtype))
    device.run(Launch(module, "append_token", ceil_div(3 * streams, _WARPS), 32 * _WARPS, arguments))
    used = exact.n + 1 if counters is None else exact.capacity
    outputs, _ = attention(
        device,
        queries,
        exact.keys[:, :used],
        exact.values[:, :used],
        state.clusters,
        scale=scale,
        output_dtype=stored,
        counters=counters,
    )
    return outputs
