"""Tensors of torch on a CUDA device: the same kernels, launched by CuPy on torch's stream, without copies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from subgen.backends import PORTABLE, Backend

from ._cupy import graph_of, has_clusters, launch_on, multiprocessors_of, stream_at
from ._launch import ALIGNMENT, Array, Launch, element, stream_step

__all__ = ["TorchDevice", "backend_for", "device_of", "on_cuda"]


@dataclass(frozen=True)
class TorchDevice:
    """A CUDA device through torch, on torch's current stream; see `subgen_cupy._launch.Device`."""

    number: int

    @property
    def xp(self) -> Any:
        """The array API namespace of torch."""
        import array_api_compat.torch

        return array_api_compat.torch

    @property
    def where(self) -> Any:
        """What torch calls the device."""
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
        """Whether nobody records what the current stream is given."""
        import torch

        return not torch.cuda.is_current_stream_capturing()

    def upload(self, x: Any) -> Array:
        """Copy from the host."""
        import torch

        return torch.from_numpy(x).to(self.where)

    def packed(self, x: Array, dtype: str | None = None) -> Array:
        """Copy if need be."""
        if dtype is not None and element(x.dtype) != dtype:
            x = x.to(getattr(self.xp, dtype))
        x = x.contiguous()
        return x if self.pointer(x) % ALIGNMENT == 0 else x.clone()  # a view may start anywhere

    def streams(self, x: Array) -> tuple[Array, int]:
        """Copy if need be; return the step from stream to stream too."""
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
        """Return a graph of them, launched on torch's current stream of the device."""
        import cupy
        import torch

        graph = graph_of(self.number, launches)

        def replay() -> None:
            stream = torch.cuda.current_stream(self.number).cuda_stream
            with cupy.cuda.Device(self.number), stream_at(stream, self.number):
                graph.launch()

        return replay


def on_cuda(x: Array) -> bool:
    """Whether a tensor is where kernels run."""
    return bool(x.is_cuda)


def device_of(x: Array) -> TorchDevice:
    """Return the device of a CUDA tensor."""
    return TorchDevice(int(x.device.index))


def backend_for(own: Backend) -> Backend:
    """Return a backend of torch with kernels in the place of its operations where tensors are on a CUDA device."""
    from . import BACKEND as kernels  # noqa: N811

    served = {
        name: _by_device(kernel, own.operations.get(name, PORTABLE[name]))
        for name, kernel in kernels.operations.items()
        if name != "write"  # no kernel, and torch has rules of its own for tensors of inference mode
    }
    return Backend("torch", {**own.operations, **served})


def _by_device(kernel: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    @functools.wraps(kernel)
    def operation(given: Any, *rest: Any, **named: Any) -> Any:
        tensor = given if isinstance(given, torch.Tensor) else given.keys
        if not on_cuda(tensor):
            return own(given, *rest, **named)
        with torch.no_grad():
            return kernel(given, *rest, **named)

    return operation
