"""Launches of kernels/decoding.cu, and of attention after it: three for a token, whatever the shapes."""

from __future__ import annotations

from subgen.decoding import Decoded, Held, n_sinks

from ._attention import attend
from ._launch import ELEMENTS, Array, Device, Launch, Module, address, ceil_div, element, f32, i32, i64

__all__ = ["count_tokens", "decode", "decoding_module", "stays"]

_WARPS = 8


def decoding_module(stored: str, queries: str) -> Module:
    """Return the kernels for tokens stored in a dtype, and queries in theirs."""
    return Module("decoding.cu", types=(("ELEMENT", ELEMENTS[stored]), ("QUERY", ELEMENTS[queries])))


def stays(device: Device, x: Array) -> bool:
    """Whether a kernel can write into an array where it is."""
    return device.packed(x) is x


def count_tokens(device: Device, counters: Array, n_exact: int, n_seen: int) -> None:
    """Write how many tokens there are; see `decode`. One launch, without a copy from the host."""
    arguments = [address(device, counters), *(i64(x) for x in (n_exact, n_seen))]
    device.run(Launch(decoding_module("float32", "float32"), "count_tokens", 1, 1, arguments))


def decode(
    device: Device, held: Held, queries: Array, keys: Array, values: Array, scale: float, counters: Array | None = None
) -> Decoded:
    """Take a token in and answer its queries; see `subgen.decoding.decode`. Written in place.

    Parameters
    ----------
    device : Device
    held : Held
        Its keys, values and queries are packed.
    queries : array, shape (streams, group, head_dim)
        float16, bfloat16 or float32, as the tokens.
    keys, values : array, shape (streams, 1, dim)
        In the dtype of those held.
    scale : float
    counters : int64 array, shape (2,), or None
        How many exact tokens there are before this one, and how many tokens, as `count_tokens` writes it. None takes
        both from what is held; else what is launched is the same for every token.

    Returns
    -------
    Decoded
    """
    streams, group, head_dim = queries.shape
    value_dim, window, sink = values.shape[-1], held.queries.scales.shape[1], n_sinks(held)
    queries = device.packed(queries)
    (keys, key_step), (values, value_step) = device.streams(keys), device.streams(values)
    codes, scales = held.queries.codes, held.queries.scales
    arguments = [
        *(address(device, x) for x in (queries, keys, values)),
        *(i64(step) for step in (key_step, value_step)),
        address(device, counters),
        *(i64(x) for x in ((held.n_exact, held.n_seen) if counters is None else (0, 0))),
        f32(scale),
        i64(3 * streams),
        *(i32(x) for x in (group, head_dim, value_dim, held.n_means, sink, window)),
        *(address(device, x) for x in (held.keys, held.values, codes, scales)),
    ]
    stored = element(held.keys.dtype)
    module = decoding_module(stored, element(queries.dtype))
    device.run(Launch(module, "take_in", ceil_div(3 * streams, _WARPS), 32 * _WARPS, arguments))
    used = held.n_means + (sink + window if counters is not None else held.n_exact + 1)
    outputs, _ = attend(
        device,
        queries,
        held.keys[:, :used],
        held.values[:, :used],
        (held.counts, held.spread),
        scale=scale,
        output_dtype=stored,
        counters=counters,
        codes=None if held.key_codes is None or held.value_codes is None else (held.key_codes, held.value_codes),
    )
    return Decoded(held.keys, held.values, held.queries, outputs)
