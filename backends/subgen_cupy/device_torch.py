"""Torch's CUDA tensors: CuPy launches the kernels on torch's current stream, without copying the tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from subgen._tree import example
from subgen.backends import Backend

from .device_cupy import graph_of, has_clusters, launch_on, multiprocessors_of, stream_at
from .launch import ALIGNMENT, Array, Launch, element, stream_step

__all__ = ["TorchDevice", "backend_for", "device_of", "on_cuda"]


@dataclass(frozen=True)
class TorchDevice:
    """A CUDA device through torch, on torch's current stream; see `subgen_cupy.launch.Device`."""

    number: int

    @property
    def xp(self) -> Any:
        """The array API namespace of torch."""
        import array_api_compat.torch

        return array_api_compat.torch

    @property
    def where(self) -> Any:
        """Name of the device in torch."""
        return f"cuda:{self.number}"

    @property
    def multiprocessors(self) -> int:
        """Streaming multiprocessors."""
        return multiprocessors_of(self.number)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Allocate by torch."""
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.where)

    @property
    def clusters(self) -> bool:
        """Whether blocks of a cluster may write into each other's shared memory."""
        return has_clusters(self.number)

    @property
    def recordable(self) -> bool:
        """Whether the current stream is not being captured."""
        import torch

        return not torch.cuda.is_current_stream_capturing()

    def upload(self, x: Any) -> Array:
        """Copy from the host."""
        import torch

        return torch.from_numpy(x).to(self.where)

    def packed(self, x: Array, dtype: str | None = None) -> Array:
        """Return the tensor, or a copy; see `subgen_cupy.launch.Device`."""
        if dtype is not None and element(x.dtype) != dtype:
            x = x.to(getattr(self.xp, dtype))
        x = x.contiguous()
        return x if self.pointer(x) % ALIGNMENT == 0 else x.clone()  # a view may start anywhere

    def streams(self, x: Array) -> tuple[Array, int]:
        """Return the tensor, or a copy, and the step from stream to stream."""
        step = stream_step(x.shape, x.stride(), x.element_size(), self.pointer(x))
        return (self.packed(x), x.shape[1] * x.shape[2]) if step is None else (x, step)

    def pointer(self, x: Array) -> int:
        """Return the address of the first element."""
        return int(x.data_ptr())

    def run(self, launch: Launch) -> None:
        """Launch on torch's current stream of the device."""
        import cupy
        import torch

        stream = torch.cuda.current_stream(self.number).cuda_stream
        with cupy.cuda.Device(self.number), stream_at(stream, self.number):
            launch_on(self.number, launch)

    def replayed(self, launches: Sequence[Launch]) -> Callable[[], None]:
        """Return a function that launches a graph of them on torch's current stream of the device."""
        import cupy
        import torch

        graph = graph_of(self.number, launches)

        def replay() -> None:
            stream = torch.cuda.current_stream(self.number).cuda_stream
            with cupy.cuda.Device(self.number), stream_at(stream, self.number):
                graph.launch()

        return replay


def on_cuda(x: Array) -> bool:
    """Whether a tensor is on a CUDA device."""
    return bool(x.is_cuda)


def device_of(x: Array) -> TorchDevice:
    """Return the device of a CUDA tensor."""
    return TorchDevice(int(x.device.index))


def backend_for(own: Backend) -> Backend:
    """Return a torch backend whose operations are the kernels for CUDA tensors, and its own for all others."""
    from . import BACKEND as kernels  # noqa: N811

    served = {
        name: _by_device(kernel, own.operations.get(name))
        for name, kernel in kernels.operations.items()
        if name != "append"  # not a kernel, and torch's own follows the rules of inference mode
    }
    return Backend("torch", {**own.operations, **served})


def _by_device(kernel: Callable[..., Any], own: Callable[..., Any] | None) -> Callable[..., Any]:
    import torch

    @functools.wraps(kernel)
    def operation(given: Any, *rest: Any, **named: Any) -> Any:
        if on_cuda(example(given)):
            with torch.no_grad():
                result = kernel(given, *rest, **named)
            if result is not NotImplemented:
                return result
        return NotImplemented if own is None else own(given, *rest, **named)

    return operation
