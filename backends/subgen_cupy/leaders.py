"""Launches of kernels/leaders.cu: two, without synchronisation, for any number of new clusters."""

from __future__ import annotations

from .device import device_of
from .launch import ELEMENTS, Array, Device, Launch, Module, address, ceil_div, element, f64, i32

__all__ = ["assign_leaders", "leaders", "leaders_module"]

_TILE = 32
_THREADS = 256


def leaders_module(dtype: str) -> Module:
    """Return the kernels for keys of a dtype."""
    return Module("leaders.cu", types=(("ELEMENT", ELEMENTS[dtype]),))


def assign_leaders(keys: Array, centres: Array, n_clusters: Array, delta: float) -> tuple[Array, Array]:
    """Assign a block of keys to clusters; see `subgen.leaders.assign_leaders`."""
    return leaders(device_of(keys), keys, centres, n_clusters, delta)


def leaders(device: Device, keys: Array, centres: Array, n_clusters: Array, delta: float) -> tuple[Array, Array]:
    """Do what `assign_leaders` does, on a device."""
    streams, n, head_dim = keys.shape
    capacity = centres.shape[1]
    dtype = element(keys.dtype)
    module = leaders_module(dtype)
    keys, centres, n_clusters = device.packed(keys), device.packed(centres, dtype), device.packed(n_clusters, "int64")
    nearest = device.empty((streams, n), "float64")
    assignment, opened = device.empty((streams, n), "int64"), device.empty((streams, n), "bool")
    if streams and n:
        inputs = [address(device, x) for x in (keys, centres, n_clusters)]
        results = [address(device, x) for x in (nearest, assignment)]
        arguments = [*inputs, i32(n), i32(capacity), i32(head_dim), *results]
        device.run(Launch(module, "nearest_centres", ceil_div(n, _TILE) * streams, _THREADS, arguments))
        arguments = [inputs[0], inputs[2], i32(n), i32(head_dim), f64(delta), *results, address(device, opened)]
        device.run(Launch(module, "open_leaders", streams, _THREADS, arguments))
    return assignment, opened
