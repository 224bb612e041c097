"""What a kernel is launched with, apart from who launches it.

The modules beside this one turn shapes and pointers into `Launch` objects. A `Device` runs them: CuPy on a GPU
(`_cupy.py`) for its own arrays and for torch's (`_torch.py`), an emulation on the CPU in the tests. So geometry,
arguments and order of the launches are tested without a GPU too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
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
    "stream_step",
]

Array = Any

#: Names of dtypes, and the types of kernels/common.cuh that keys and values of that dtype are read as.
ELEMENTS = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float", "float64": "double"}

#: Bytes that the widest load of a kernel is aligned to.
ALIGNMENT = 16

#: Shared memory that every device gives a block without being asked for more.
MAX_SHARED = 48 << 10

# Arguments travel as NumPy scalars: their size is then the size of the kernel's parameter, whoever launches it.
i32, i64, f32, f64 = np.int32, np.int64, np.float32, np.float64


@cache
def element(dtype: Any) -> str:
    """Name of a dtype; remembered, as a block of tokens asks for dozens."""
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
        """Return all of the CUDA C++ there is to compile."""
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
        All grids here are one-dimensional: no limit of 65535.
    arguments : sequence of NumPy scalars
        Pointers as uint64.
    shared : int
        Bytes of dynamic shared memory.
    aside : bool
        Whether it may run beside those after it, up to one that joins. Without a graph it is one after the other.
    joins : bool
        Whether it reads what those aside write.
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
    """Where arrays live and kernels run. Launches run in order; none of the methods waits for them."""

    @property
    def xp(self) -> Any:
        """The namespace of the arrays, for matrix products."""

    @property
    def multiprocessors(self) -> int:
        """How many processors the blocks of a kernel are spread over."""

    @property
    def clusters(self) -> bool:
        """Whether blocks of a cluster may write into each other's shared memory: compute capability 9.0 and later."""

    @property
    def recordable(self) -> bool:
        """Whether launches can be recorded now: they cannot while a caller records."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Return a C-contiguous array, not initialised."""

    def upload(self, x: Any) -> Array:
        """Copy an array of NumPy to the device, without waiting for what is in the queue."""

    def packed(self, x: Array, dtype: str | None = None) -> Array:
        """Return the array, or a copy, so that it is C-contiguous, of a dtype and aligned to 16 bytes."""

    def streams(self, x: Array) -> tuple[Array, int]:
        """Return a 3-d array, or a copy, packed but for its first axis, and the elements of a step along that."""

    def pointer(self, x: Array) -> int:
        """Return the address of the first element."""

    def run(self, launch: Launch) -> None:
        """Put a launch into the queue."""

    def replayed(self, launches: Sequence[Launch]) -> Callable[[], None]:
        """Return what puts them all into the queue, as often as it is called; arrays must be kept until then."""


def stream_step(shape: Sequence[int], strides: Sequence[int], size: int, pointer: int) -> int | None:
    """Elements from one stream to the next in a 3-d array; None where a kernel cannot read it as it lies.

    The front of a buffer, ``buffer[:, :n]``, needs no copy: its streams are packed, and only lie apart.

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
    # Whole rows, so that every load is as aligned as that of the first row.
    step = strides[0]
    return step if step >= n * width and step % width == 0 else None


def elements(strides: Sequence[int], size: int) -> list[int]:
    """Strides in elements, from those in bytes."""
    return [stride // size for stride in strides]


def address(device: Device, x: Array | None) -> Any:
    """Return the pointer argument for an array; null for None."""
    return np.uint64(0 if x is None else device.pointer(x))
