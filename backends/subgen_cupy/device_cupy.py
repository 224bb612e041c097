"""CUDA devices through CuPy: compile a module when it is first needed, and launch its kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from .launch import ALIGNMENT, Array, Launch, Module, element, elements, stream_step

__all__ = [
    "CupyDevice",
    "KernelError",
    "device_of",
    "graph_of",
    "has_clusters",
    "launch_on",
    "multiprocessors_of",
    "stream_at",
]


class KernelError(RuntimeError):
    """The kernels do not compile for this device."""


@cache
def _function(device: int, module: Module, kernel: str) -> Any:
    """Compile for the current device, whose number is part of the cache key; CuPy caches the result on disk."""
    import cupy

    try:
        return _module(device, module).get_function(kernel)
    except cupy.cuda.compiler.CompileException as error:
        raise KernelError(
            f"{module.file} does not compile for device {device} with {module.preamble()!r}: {error}"
        ) from error


@cache
def _module(device: int, module: Module) -> Any:
    import cupy

    return cupy.RawModule(code=module.source(), options=("--std=c++17",))


def launch_on(device: int, launch: Launch) -> None:
    """Launch on the current stream of the current device, whose number is given."""
    function = _function(device, launch.module, launch.kernel)
    function((launch.blocks,), (launch.threads,), tuple(launch.arguments), shared_mem=launch.shared)


def graph_of(device: int, launches: Sequence[Launch]) -> Any:
    """Record launches as a CUDA graph, without running them. Each must have been launched before, to be compiled.

    Launches aside are a branch of the graph.
    """
    import cupy

    with cupy.cuda.Device(device), cupy.cuda.Stream(non_blocking=True) as stream:
        beside, pending = cupy.cuda.Stream(non_blocking=True), None
        stream.begin_capture()
        try:
            for launch in launches:
                if launch.aside:
                    beside.wait_event(stream.record())
                    with beside:
                        launch_on(device, launch)
                    pending = beside.record()
                    continue
                if launch.joins and pending is not None:
                    stream.wait_event(pending)
                    pending = None
                launch_on(device, launch)
            if pending is not None:
                stream.wait_event(pending)
        finally:
            graph = stream.end_capture()
    return graph


@dataclass(frozen=True)
class _Foreign:
    """A stream of another library, with the protocol of CUDA streams: version, address."""

    pointer: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@cache
def stream_at(pointer: int, device: int) -> Any:
    """Return a stream of another library, to launch on."""
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_Foreign(pointer))
    return cupy.cuda.ExternalStream(pointer, device)  # before CuPy 14


@cache
def multiprocessors_of(device: int) -> int:
    """Streaming multiprocessors of a device."""
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


@cache
def has_clusters(device: int) -> bool:
    """Whether a device has clusters of blocks."""
    import cupy

    return int(cupy.cuda.Device(device).compute_capability) >= 90


@dataclass(frozen=True)
class CupyDevice:
    """A CUDA device through CuPy, on CuPy's current stream; see `subgen_cupy.launch.Device`."""

    number: int

    @property
    def xp(self) -> Any:
        """CuPy."""
        import cupy

        return cupy

    @property
    def multiprocessors(self) -> int:
        """Streaming multiprocessors."""
        return multiprocessors_of(self.number)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Allocate from CuPy's pool."""
        with self.xp.cuda.Device(self.number):
            return self.xp.empty(shape, dtype=_dtype(dtype))

    @property
    def clusters(self) -> bool:
        """Whether blocks of a cluster may write into each other's shared memory."""
        return has_clusters(self.number)

    @property
    def recordable(self) -> bool:
        """Whether the current stream is not being captured."""
        with self.xp.cuda.Device(self.number):
            return not self.xp.cuda.get_current_stream().is_capturing()

    def upload(self, x: Any) -> Array:
        """Copy from the host."""
        with self.xp.cuda.Device(self.number):
            return self.xp.asarray(x)

    def packed(self, x: Array, dtype: str | None = None) -> Array:
        """Return the array, or a copy; see `subgen_cupy.launch.Device`."""
        if dtype in (None, element(x.dtype)) and x.flags.c_contiguous and self.pointer(x) % ALIGNMENT == 0:
            return x
        xp = self.xp
        with xp.cuda.Device(self.number):
            if dtype is not None and element(x.dtype) != dtype:
                x = x.astype(_dtype(dtype))
            x = xp.ascontiguousarray(x)
            return x if self.pointer(x) % ALIGNMENT == 0 else x.copy()  # a view may start anywhere

    def streams(self, x: Array) -> tuple[Array, int]:
        """Return the array, or a copy, and the step from stream to stream."""
        step = stream_step(x.shape, elements(x.strides, x.dtype.itemsize), x.dtype.itemsize, self.pointer(x))
        return (self.packed(x), x.shape[1] * x.shape[2]) if step is None else (x, step)

    def pointer(self, x: Array) -> int:
        """Return the address of the first element."""
        return int(x.data.ptr)

    def run(self, launch: Launch) -> None:
        """Launch on the current stream of the device."""
        with self.xp.cuda.Device(self.number):
            launch_on(self.number, launch)

    def replayed(self, launches: Sequence[Launch]) -> Callable[[], None]:
        """Return a function that launches a graph of them on the current stream of the device."""
        graph = graph_of(self.number, launches)

        def replay() -> None:
            with self.xp.cuda.Device(self.number):
                graph.launch()

        return replay


def _dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return name


def device_of(x: Array) -> CupyDevice:
    """Return the device of a CuPy array."""
    return CupyDevice(int(x.device.id))
