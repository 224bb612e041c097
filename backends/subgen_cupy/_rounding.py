"""Launches of kernels/rounding.cu."""

from __future__ import annotations

from subgen.rounding import Codes

from ._launch import ELEMENTS, Array, Device, Launch, Module, address, ceil_div, element, f32, i32, i64

__all__ = ["query_codes", "rounding_module"]

_WARPS = 8


def rounding_module(dtype: str) -> Module:
    """Return the kernel for queries in a dtype."""
    return Module("rounding.cu", types=(("QUERY", ELEMENTS[dtype]),))


def query_codes(device: Device, queries: Array, group: int, scale: float, first: int) -> Codes:
    """Choose a query of each token and round it to nearest; see `subgen.queries.query_codes`. One launch.

    Parameters
    ----------
    device : Device
    queries : array, shape (streams * group, n, head_dim)
        float16, bfloat16 or float32; heads may lie apart.
    group : int
    scale : float
        Multiplied in float32.
    first : int

    Returns
    -------
    Codes
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
    module = rounding_module(element(queries.dtype))
    device.run(Launch(module, "query_codes", ceil_div(streams * n, _WARPS), 32 * _WARPS, arguments))
    return Codes(codes, scales)
