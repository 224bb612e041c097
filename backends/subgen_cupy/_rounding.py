"""Launches of kernels/rounding.cu."""

from __future__ import annotations

from subgen.rounding import Codes

from ._launch import Array, Device, Launch, Module, address, ceil_div, i32, i64

__all__ = ["ROUNDING", "quantize"]

ROUNDING = Module("rounding.cu")
_WARPS = 8


def quantize(device: Device, x: Array) -> Codes:
    """Round to nearest; see `subgen.rounding.quantize`. Float32 vectors, whose streams may lie apart."""
    streams, n, dim = x.shape
    x, per_stream = device.streams(x)
    codes, scales = device.empty((streams, n, dim), "int8"), device.empty((streams, n), "float32")
    arguments = [
        address(device, x),
        i64(per_stream),
        i64(streams * n),
        *(i32(size) for size in (n, dim)),
        *(address(device, result) for result in (codes, scales)),
    ]
    device.run(Launch(ROUNDING, "quantize", ceil_div(streams * n, _WARPS), 32 * _WARPS, arguments))
    return Codes(codes, scales)
