"""Launches as data, independent of the library that runs them.

The modules of this package turn shapes and pointers into `Launch` objects. A `Device` runs them: CuPy on a GPU
(`device_cupy`) for its own arrays and for torch's (`device_torch`), and in the tests an emulation on the CPU. So the
geometry, the arguments and the order of launches are tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from importlib.resources import files
from typing import Any, Protocol

import numpy as np

from subgen._array import dtype_name

__all__ = [
    "ALIGNMENT",
    "ELEMENTS",
    "MAX_SHARED",
    "Device",
    "Launch",
    "Module",
    "address",
    "ceil_div",
    "element",
    "elements",
    "f32",
    "f64",
    "i32",
    "i64",
    "kernel",
    "stream_step",
]

Array = Any

#: By the name of a dtype, its type in kernels/common.cuh.
ELEMENTS = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float", "float64": "double"}

#: Alignment in bytes of the widest load of a kernel.
ALIGNMENT = 16

#: Bytes of shared memory that a block has by default, on every device.
MAX_SHARED = 48 << 10

# Arguments are NumPy scalars, of the size of the kernel's parameter.
i32, i64, f32, f64 = np.int32, np.int64, np.float32, np.float64


@cache
def element(dtype: Any) -> str:
    """Return the name of a dtype; cached, as a block of tokens needs dozens."""
    return dtype_name(dtype)


def ceil_div(a: int, b: int) -> int:
    """Divide, rounding up."""
    return -(-a // b)


@dataclass(frozen=True)
class Module:
    """A file of kernels and the definitions put before it; equal ones are compiled once per device.

    Parameters
    ----------
    file : str
        Name in the folder ``kernels``.
    types : tuple of (str, str)
        Each becomes ``typedef <second> <first>;``.
    constants : tuple of (str, int)
        Each becomes ``#define <first> <second>``.
    """

    file: str
    types: tuple[tuple[str, str], ...] = ()
    constants: tuple[tuple[str, int], ...] = ()

    def preamble(self) -> str:
        """Return the definitions."""
        types = "".join(f"typedef {name} {alias};\n" for alias, name in self.types)
        return types + "".join(f"#define {name} {value}\n" for name, value in self.constants)

    def source(self) -> str:
        """Return the whole CUDA C++ source."""
        folder = files("subgen_cupy") / "kernels"
        common, kernels = ((folder / name).read_text(encoding="utf-8") for name in ("common.cuh", self.file))
        return f"{common}\n{self.preamble()}\n{kernels}"


@dataclass(frozen=True)
class Launch:
    """One kernel on one grid.

    Parameters
    ----------
    module : Module
    kernel : str
        Its ``extern "C"`` name.
    blocks, threads : int
        All grids are one-dimensional, so the limit of 65535 blocks does not apply.
    arguments : sequence of NumPy scalars
        Pointers as uint64.
    shared : int
        Bytes of dynamic shared memory.
    aside : bool
        Whether a graph may run it in parallel with the launches after it, up to one that joins. Without a graph,
        launches run one after the other.
    joins : bool
        Whether it reads what launches aside write.
    """

    module: Module
    kernel: str
    blocks: int
    threads: int
    arguments: Sequence[Any]
    shared: int = 0
    aside: bool = False
    joins: bool = False


class Device(Protocol):
    """Allocates arrays and runs kernels. Launches run in order; no method waits for them."""

    @property
    def xp(self) -> Any:
        """The namespace of the arrays, for matrix products."""

    @property
    def multiprocessors(self) -> int:
        """Streaming multiprocessors."""

    @property
    def clusters(self) -> bool:
        """Whether blocks of a cluster may write into each other's shared memory: compute capability 9.0 and later."""

    @property
    def recordable(self) -> bool:
        """Whether launches can be recorded now; not while a caller records."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Return a C-contiguous array, not initialised."""

    def upload(self, x: Any) -> Array:
        """Copy an array of NumPy to the device, without waiting for queued launches."""

    def packed(self, x: Array, dtype: str | None = None) -> Array:
        """Return the array, or a copy, C-contiguous, in a dtype and aligned to 16 bytes."""

    def streams(self, x: Array) -> tuple[Array, int]:
        """Return a 3-d array, or a copy, whose streams are packed, and the elements from stream to stream."""

    def pointer(self, x: Array) -> int:
        """Return the address of the first element."""

    def run(self, launch: Launch) -> None:
        """Queue a launch."""

    def replayed(self, launches: Sequence[Launch]) -> Callable[[], None]:
        """Return a function that queues all launches; their arrays must be kept as long as it is called."""


def stream_step(shape: Sequence[int], strides: Sequence[int], size: int, pointer: int) -> int | None:
    """Return the elements from stream to stream in a 3-d array, or None where a kernel cannot read it in place.

    The front of a buffer, ``buffer[:, :n]``, needs no copy: each of its streams is packed.

    Parameters
    ----------
    shape : (int, int, int)
    strides : (int, int, int)
        In elements.
    size : int
        Bytes of an element.
    pointer : int
        Address of the first element.
    """
    streams, n, width = shape
    dense = (n == 1 or strides[1] == width) and (width == 1 or strides[2] == 1) and pointer % ALIGNMENT == 0
    if not dense or 0 in shape:
        return None
    if streams == 1:
        return n * width
    # The step is a multiple of a row, so that every row is as aligned as the first.
    step = strides[0]
    return step if step >= n * width and step % width == 0 else None


def elements(strides: Sequence[int], size: int) -> list[int]:
    """Convert strides in bytes to strides in elements."""
    return [stride // size for stride in strides]


def kernel(when: Callable[..., bool]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate an operation that returns ``NotImplemented`` where the kernels do not take its arguments.

    Parameters
    ----------
    when : callable
        Takes the arguments of the operation, and returns whether the kernels take them.
    """

    def decorate(operation: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(operation)
        def checked(*args: Any, **kwargs: Any) -> Any:
            return operation(*args, **kwargs) if when(*args, **kwargs) else NotImplemented

        return checked

    return decorate


def address(device: Device, x: Array | None) -> Any:
    """Return the pointer to an array as an argument; null for None."""
    return np.uint64(0 if x is None else device.pointer(x))
