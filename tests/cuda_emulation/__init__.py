"""Run the CUDA kernels on the CPU: `EmulatedDevice` replaces a GPU in the tests.

It runs the same launches as a GPU, with the addresses of NumPy arrays; `emulation.h` describes how.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from subgen_cupy.launch import Launch, Module, element, elements, stream_step

__all__ = ["FOLDER", "EmulatedDevice", "EmulationError", "barriers", "compiler", "library", "sanitizer", "sanitizing"]

#: Environment variable: a folder for compiled kernels, if several processes are to share them.
FOLDER = "CUDA_EMULATION"

_HERE = Path(__file__).parent
_KERNEL = re.compile(
    r"__global__\s+void\s+(?:BLOCK_CLUSTER\s+|__cluster_dims__\([^)]*\)\s*)?(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\("
)
_DYNAMIC = re.compile(r"extern\s+__shared__\s+([\w ]+?)\s+(\w+)\s*\[\s*\]\s*;")


class EmulationError(RuntimeError):
    """A launch whose behaviour is undefined on a GPU."""


def compiler() -> str | None:
    """Path of g++, or None."""
    return shutil.which("g++")


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cuda_emulation_")


def _made(name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder of a name, and make it if it does not exist, in one step: another process may make the same."""
    base = Path(os.environ.get(FOLDER) or _own_folder().name)
    if not (base / name).exists():
        made = Path(tempfile.mkdtemp(dir=base))
        make(made)
        with contextlib.suppress(OSError):  # the other was faster
            made.rename(base / name)
    return base / name


def _flags(sanitize: bool) -> list[str]:
    # Products and sums round separately, as in NumPy: the discrete decisions can then be compared to the last bit.
    watched = (
        ["-g1", "-O0", "-fsanitize=address,alignment", "-fno-sanitize-recover=alignment", "-fno-omit-frame-pointer"]
        if sanitize
        else ["-O1"]
    )
    return ["-std=c++17", "-fPIC", "-ffp-contract=off", "-w", *watched]


def _compile(*arguments: str) -> None:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise EmulationError(done.stderr)


@functools.cache
def _header(sanitize: bool) -> Path:
    """Return a folder with the precompiled header, which takes most of the time of a compilation."""

    def make(folder: Path) -> None:
        header = Path(shutil.copy(_HERE / "emulation.h", folder))
        _compile(*_flags(sanitize), "-x", "c++-header", str(header), "-o", f"{header}.gch")

    return _made(f"header{sanitize:d}", make)


def build(source: str, sanitize: bool = False) -> Path:
    """Compile CUDA C++ to a library for ctypes."""
    text = _DYNAMIC.sub(r"EMULATION_DYNAMIC_SHARED(\1, \2);", source)
    exports = "\n".join(f"EMULATION_EXPORT({name})" for name in _KERNEL.findall(source))
    # Lines are counted from the source's first, so that a barrier can be named by its line.
    lines = ['#include "emulation.h"', "using std::min; using std::max;", '#line 1 "kernels.cu"', text, exports]
    unit = "\n".join(lines) + "\n"

    def make(folder: Path) -> None:
        (folder / "kernels.cpp").write_text(unit)
        place = [str(folder / "kernels.cpp"), "-o", str(folder / "kernels.so")]
        _compile(*_flags(sanitize), "-shared", f"-I{_header(sanitize)}", *place)

    return _made(f"{hashlib.sha256(unit.encode()).hexdigest()}{sanitize:d}", make) / "kernels.so"


@functools.cache
def library(source: str, sanitize: bool = False) -> ctypes.CDLL:
    """Compile, once."""
    return ctypes.CDLL(str(build(source, sanitize)))


def _peers(module: Module) -> int:
    """Blocks of a cluster."""
    return dict(module.constants).get("PEERS", 1)


def barriers(module: Module) -> list[int]:
    """Lines of the barriers in the source of a module; those of a cluster of PEERS blocks, if it is one."""
    together = _peers(module) > 1
    barrier = (
        r"^ +ALL_PEERS\(|^ +__syncthreads\(\);|__cluster_barrier_wait\(\);" if together else r"__sync(threads|warp)\(\)"
    )
    return [
        number for number, line in enumerate(module.source().splitlines(), 1) if re.search(barrier, line.split("//")[0])
    ]


@dataclass
class EmulatedDevice:
    """A device for NumPy arrays; see `subgen_cupy.launch.Device`.

    Parameters
    ----------
    seed : int
        Order of blocks and threads; 0 is their natural order.
    removed : int
        Line of a barrier to leave out, -1 for none.
    edit : (str, str)
        A text in the source, and its replacement.
    """

    seed: int = 1
    removed: int = -1
    edit: tuple[str, str] = ("", "")
    multiprocessors: int = 4
    sanitize: bool = False
    launches: list[Launch] = field(default_factory=list)
    xp: Any = np
    clusters: bool = False

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Allocate, filled with NaN or with all bits set, so that an element that is not written shows."""
        kind = np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))
        return np.full(int(np.prod(shape)) * kind.itemsize, 255, dtype=np.uint8).view(kind).reshape(shape)

    @property
    def recordable(self) -> bool:
        return True

    def upload(self, x: Any) -> Any:
        return np.array(x)

    def packed(self, x: Any, dtype: str | None = None) -> Any:
        kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype or element(x.dtype), dtype or x.dtype)
        x = np.require(x, dtype=kind, requirements="CA")
        if x.ctypes.data % 16:
            space = np.empty(x.nbytes + 16, dtype=np.uint8)
            start = -space.ctypes.data % 16
            aligned = space[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
            aligned[...] = x
            x = aligned
        return x

    def streams(self, x: Any) -> tuple[Any, int]:
        step = stream_step(x.shape, elements(x.strides, x.itemsize), x.itemsize, self.pointer(x))
        return (self.packed(x), x.shape[1] * x.shape[2]) if step is None else (x, step)

    def pointer(self, x: Any) -> int:
        return int(x.ctypes.data)

    def run(self, launch: Launch) -> None:
        self.launches.append(launch)
        source = launch.module.source()
        if self.edit[0]:
            source = source.replace(*self.edit)
        function = getattr(library(source, self.sanitize), f"emulated_{launch.kernel}")
        function.restype = ctypes.c_char_p
        cells = [np.array(argument).reshape(1) for argument in launch.arguments]
        pointers = (ctypes.c_void_p * len(cells))(*(cell.ctypes.data for cell in cells))
        sizes = (ctypes.c_uint * len(cells))(*(cell.itemsize for cell in cells))
        dims = (ctypes.c_uint * 7)(launch.blocks, 1, 1, launch.threads, 1, 1, _peers(launch.module))
        error = function(
            dims,
            ctypes.c_size_t(launch.shared),
            pointers,
            sizes,
            ctypes.c_uint(len(cells)),
            ctypes.c_uint64(self.seed),
            ctypes.c_int(self.removed),
        )
        if error:
            raise EmulationError(f"{launch.kernel}: {error.decode()}")

    def replayed(self, launches: Sequence[Launch]) -> Callable[[], None]:
        recorded = list(launches)

        def replay() -> None:
            for launch in recorded:
                self.run(launch)

        return replay


def sanitizer() -> str | None:
    """Path of the address sanitizer's library, which a process must start with, or None."""
    if compiler() is None:
        return None
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


def sanitizing(asan: str) -> dict[str, str]:
    """Return the environment of a process whose kernels are to be watched by the address sanitizer."""
    # Without these, it reports swapped stacks, and a Python that was built without it.
    options = "detect_leaks=0,detect_stack_use_after_return=0"
    path = os.pathsep.join(filter(None, [str(_HERE.parent), os.environ.get("PYTHONPATH", "")]))
    return {"LD_PRELOAD": asan, "ASAN_OPTIONS": options, "PYTHONPATH": path}
