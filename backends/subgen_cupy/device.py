"""The device of an array: of CuPy, or of torch on a CUDA device."""

from __future__ import annotations

from . import device_cupy, device_torch
from .launch import Array, Device

__all__ = ["device_of"]


def device_of(x: Array) -> Device:
    """Return the device that an array is on.

    Raises
    ------
    TypeError
        If it is not on a CUDA device.
    """
    if type(x).__module__.split(".")[0] == "torch" and device_torch.on_cuda(x):
        return device_torch.device_of(x)
    if hasattr(getattr(x, "data", None), "ptr"):
        return device_cupy.device_of(x)
    raise TypeError(f"the kernels take arrays of CuPy, or tensors of torch on a CUDA device: got {type(x)}")
