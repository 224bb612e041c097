"""Where the CUDA kernels are tested: on the CPU by emulation, and on a GPU."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import cuda_emulation
import ml_dtypes
import numpy as np
import pytest
from cuda_emulation import EmulatedDevice
from subgen_cupy import BACKEND, device_torch, torch_backend
from subgen_cupy.device_cupy import CupyDevice
from subgen_cupy.device_torch import TorchDevice
from subgen_cupy.launch import Device, Launch

from subgen import _array, backends
from subgen._tree import tree_map

__all__ = [
    "DTYPES",
    "Target",
    "emulation",
    "emulation_for_torch",
    "gpu",
    "gpu_for_torch",
    "knowing_bfloat16",
    "using_device",
    "using_kernels",
    "using_portable",
    "why_no_gpu",
]

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}

# Modules of `subgen_cupy` that look up the device of their arguments.
_BY_DEVICE = ("absorb", "append", "attend", "decoder", "leaders", "merging")


@dataclass(frozen=True)
class Target:
    """A device, and the conversion of NumPy's arrays to its own and back.

    Attributes
    ----------
    name : str
    library : str
        Whose arrays it has: ``"numpy"``, ``"torch"`` or ``"cupy"``.
    device : Device
    """

    name: str
    library: str = "numpy"
    device: Device = field(default_factory=EmulatedDevice)

    @property
    def emulated(self) -> bool:
        """Whether kernels run on the CPU."""
        return hasattr(self.device, "launches")

    @property
    def launches(self) -> list[Launch]:
        """Launches so far, of the emulation only."""
        return self.device.launches  # type: ignore[attr-defined, no-any-return]

    def put(self, tree: Any) -> Any:
        """Convert an array of NumPy, or every array of a tree."""
        return tree_map(self.put_array, tree)

    def get(self, tree: Any) -> Any:
        """Convert to NumPy."""
        return tree_map(self.get_array, tree)

    def put_array(self, x: Any) -> Any:
        return np.array(x)

    def get_array(self, x: Any) -> Any:
        return x

    def seeded(self, seed: int) -> Target:
        """Return the target with another order of threads, where that can be chosen."""
        return replace(self, device=EmulatedDevice(seed=seed, multiprocessors=1 + 5 * (seed % 3)))


@dataclass(frozen=True)
class EmulatedTorchDevice(TorchDevice):
    """Tensors of torch on the CPU, and kernels that the emulation executes on them."""

    emulated: EmulatedDevice = field(default_factory=EmulatedDevice)
    where: Any = "cpu"
    multiprocessors: int = 4
    clusters: bool = False

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """Allocate with all bits set, so that an element that is not written shows."""
        x = super().empty(shape, dtype)
        x.untyped_storage().fill_(255)
        return x

    @property
    def launches(self) -> list[Launch]:
        return self.emulated.launches

    def run(self, launch: Launch) -> None:
        self.emulated.run(launch)

    @property
    def recordable(self) -> bool:
        return True

    def replayed(self, launches: Sequence[Launch]) -> Callable[[], None]:
        return self.emulated.replayed(launches)


class TorchTarget(Target):
    """Tensors of torch."""

    def put_array(self, x: Any) -> Any:
        import torch

        x = np.array(x)
        if x.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)

    def get_array(self, x: Any) -> Any:
        import torch

        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


class CupyGpu(Target):
    """CuPy's first device."""

    def put_array(self, x: Any) -> Any:
        import cupy

        x = np.asarray(x)
        if x.dtype != ml_dtypes.bfloat16:
            return cupy.asarray(x)
        try:
            return cupy.asarray(x.view(np.uint16)).view(ml_dtypes.bfloat16)
        except (TypeError, ValueError) as error:
            pytest.skip(f"CuPy {cupy.__version__} has no bfloat16: {error}")

    def get_array(self, x: Any) -> Any:
        import cupy

        return cupy.asnumpy(x)

    def seeded(self, seed: int) -> Target:
        return self


class TorchGpu(TorchTarget):
    """Torch's first CUDA device."""

    def put_array(self, x: Any) -> Any:
        return super().put_array(x).cuda()

    def get_array(self, x: Any) -> Any:
        return super().get_array(x.cpu())


def why_no_gpu() -> str | None:
    """Return why there is no GPU for the tests, or None where there is one."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA device: {error}"
    return None if count else "no CUDA device"


def emulation() -> Target:
    """Return the emulation, or skip the test."""
    if cuda_emulation.compiler() is None:
        pytest.skip("g++ is not installed")
    return Target("emulation")


def emulation_for_torch() -> Target:
    """Return the emulation for tensors of torch, or skip the test."""
    pytest.importorskip("torch")
    emulation()
    return TorchTarget("torch", "torch", EmulatedTorchDevice(0))


def gpu() -> Target:
    """Return a GPU, or skip the test."""
    reason = why_no_gpu()
    if reason is not None:
        pytest.skip(reason)
    return CupyGpu("gpu", "cupy", CupyDevice(0))


def gpu_for_torch() -> Target:
    """Return a GPU that torch can use too, or skip the test."""
    gpu()
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return TorchGpu("torch_gpu", "torch", TorchDevice(0))


@contextmanager
def using_device(target: Target) -> Iterator[None]:
    """Launch on the device of a target within the block, whatever arrays the operations of `subgen_cupy` get."""
    with ExitStack() as stack:
        for name in _BY_DEVICE:
            module = importlib.import_module(f"subgen_cupy.{name}")
            stack.enter_context(patch.object(module, "device_of", lambda x: target.device))
        stack.enter_context(patch.object(device_torch, "on_cuda", lambda x: True))
        yield


@contextmanager
def knowing_bfloat16() -> Iterator[None]:
    """Let the portable functions take the bfloat16 of ml_dtypes in arrays of NumPy, as in those of CuPy."""
    known = patch.object(_array, "_is_cupys_bfloat16", lambda dtype, xp: _array.dtype_name(dtype) == "bfloat16")
    with known:
        _array.is_floating.cache_clear()
        try:
            yield
        finally:
            _array.is_floating.cache_clear()


@contextmanager
def using_kernels(target: Target) -> Iterator[None]:
    """Run operations on the arrays of a target by the kernels within the block."""
    with ExitStack() as stack:
        if target.library != "cupy":  # CuPy has them anyway
            backend = BACKEND if target.library == "numpy" else torch_backend()
            stack.enter_context(patch.dict(backends._resolved, {target.library: backend.operations}))
        if target.emulated:
            stack.enter_context(using_device(target))
        if target.library == "numpy":  # its bfloat16 then stands for CuPy's
            stack.enter_context(knowing_bfloat16())
        yield


@contextmanager
def using_portable() -> Iterator[None]:
    """Run the portable functions on arrays of NumPy within the block."""
    with patch.dict(backends._resolved, {"numpy": {}}):
        yield
