"""Launches of kernels/threefry.cu."""

from __future__ import annotations

from math import prod

from ._launch import Array, Device, Launch, Module, address, ceil_div, i64

__all__ = ["THREEFRY", "threefry"]

THREEFRY = Module("threefry.cu")
_THREADS = 256


def threefry(device: Device, words: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
    """Encrypt; see `subgen.counter.threefry2x32`. The words are int64 arrays of one shape."""
    shape = words[0].shape
    count = prod(shape)
    packed = [device.packed(word, "int64") for word in words]
    results = device.empty(shape, "int64"), device.empty(shape, "int64")
    if count:
        arguments = [*(address(device, x) for x in packed), i64(count), *(address(device, x) for x in results)]
        device.run(Launch(THREEFRY, "threefry2x32", ceil_div(count, _THREADS), _THREADS, arguments))
    return results
