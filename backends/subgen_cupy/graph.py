"""CUDA graphs: launches that are recorded once and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .launch import Array, Device, Launch

__all__ = ["CopiedError", "Recorder", "capture"]

Result = TypeVar("Result")


class CopiedError(RuntimeError):
    """A copy was made while launches were recorded; a replay would not make it."""


@dataclass(frozen=True)
class Recorder:
    """A device that keeps launches and the arrays they use, so that they can be replayed.

    Parameters
    ----------
    device : Device
        Runs each launch at once as well.
    """

    device: Device
    launches: list[Launch] = field(default_factory=list)
    kept: list[Array] = field(default_factory=list)

    @property
    def xp(self) -> Any:
        """The namespace of the arrays."""
        return self.device.xp

    @property
    def multiprocessors(self) -> int:
        """Streaming multiprocessors."""
        return self.device.multiprocessors

    @property
    def clusters(self) -> bool:
        """Whether blocks of a cluster may write into each other's shared memory."""
        return self.device.clusters

    @property
    def recordable(self) -> bool:
        """Always false: a recording cannot be recorded."""
        return False

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Allocate an array and keep it."""
        self.kept.append(self.device.empty(shape, dtype))
        return self.kept[-1]

    def upload(self, x: Any) -> Array:
        """Raise: a replay would not copy."""
        raise CopiedError(f"an array of shape {x.shape} comes from the host while launches are recorded")

    def packed(self, x: Array, dtype: str | None = None) -> Array:
        """Return the array, which must be packed."""
        return self._same(x, self.device.packed(x, dtype))

    def streams(self, x: Array) -> tuple[Array, int]:
        """Return the array, whose streams must be packed, and the step from stream to stream."""
        packed, step = self.device.streams(x)
        return self._same(x, packed), step

    def pointer(self, x: Array) -> int:
        """Return the address of the first element."""
        return self.device.pointer(x)

    def run(self, launch: Launch) -> None:
        """Launch, and keep the launch."""
        self.launches.append(launch)
        self.device.run(launch)

    def replayed(self, launches: Sequence[Launch]) -> Callable[[], None]:
        """Return a function that runs the launches again."""
        return self.device.replayed(launches)

    def _same(self, given: Array, packed: Array) -> Array:
        if packed is not given:
            raise CopiedError(f"an array of shape {tuple(given.shape)} is copied while launches are recorded")
        return given


def capture(step: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    """Record the launches of a function as a CUDA graph: one launch from the host for any number of kernels.

    Parameters
    ----------
    step : callable
        Reads and writes arrays with fixed addresses, without host synchronisation. Called twice: once to compile
        kernels and allocate memory, once to record.

    Returns
    -------
    replay : callable
        Repeats the launches on CuPy's current stream, without waiting for the device.
    result
        What the function returned. Each replay writes it again.
    """
    import cupy

    # The graph gets its own pool: nothing else may use its temporary memory between replays.
    pool = cupy.cuda.MemoryPool()
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.using_allocator(pool.malloc), stream:
        step()
        stream.synchronize()
        stream.begin_capture()
        try:
            result = step()
        except BaseException:
            if stream.is_capturing():
                stream.end_capture()
            raise
        graph = stream.end_capture()

    # The arrays that the graph uses live as long as the graph.
    def replay(kept: tuple[object, ...] = (pool, result, step)) -> None:
        graph.launch()

    return replay, result
