"""Where the contracts of the CUDA kernels are tested: on the CPU by emulation, and on a GPU by CuPy."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import cuda_emulation
import ml_dtypes
import numpy as np
import pytest
from cuda_emulation import EmulatedDevice
from subgen_cupy._cupy import CupyDevice
from subgen_cupy._launch import Device, Launch
from subgen_cupy._torch import TorchDevice

__all__ = ["DTYPES", "Lab", "emulation", "emulation_for_torch", "gpu", "gpu_for_torch", "why_no_gpu"]

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}


@dataclass(frozen=True)
class Lab:
    """A device, and the way there and back for NumPy arrays."""

    name: str
    device: Device = field(default_factory=EmulatedDevice)

    def put(self, x: Any) -> Any:
        """Bring an array to the device."""
        return np.array(x)

    def get(self, x: Any) -> Any:
        """Bring an array home."""
        return x

    def seeded(self, seed: int) -> Lab:
        """The same place with another order of threads, where that can be chosen."""
        return Lab(self.name, EmulatedDevice(seed=seed, multiprocessors=1 + 5 * (seed % 3)))


@dataclass(frozen=True)
class EmulatedTorchDevice(TorchDevice):
    """Tensors of torch on the CPU, and kernels that the emulation executes on them."""

    emulated: EmulatedDevice = field(default_factory=EmulatedDevice)
    where: Any = "cpu"
    multiprocessors: int = 4
    clusters: bool = False

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """With all bits set: what is not written shows."""
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


class TorchLab(Lab):
    """Tensors of torch."""

    def put(self, x: Any) -> Any:
        import torch

        x = np.array(x)
        if x.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)

    def get(self, x: Any) -> Any:
        import torch

        return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


class Gpu(Lab):
    """CuPy's first device."""

    def put(self, x: Any) -> Any:
        import cupy

        x = np.asarray(x)
        if x.dtype != ml_dtypes.bfloat16:
            return cupy.asarray(x)
        try:
            return cupy.asarray(x.view(np.uint16)).view(ml_dtypes.bfloat16)
        except (TypeError, ValueError) as error:
            pytest.skip(f"CuPy {cupy.__version__} has no bfloat16: {error}")

    def get(self, x: Any) -> Any:
        import cupy

        return cupy.asnumpy(x)

    def seeded(self, seed: int) -> Lab:
        return self


class TorchGpu(TorchLab):
    """Torch's first CUDA device."""

    def put(self, x: Any) -> Any:
        return super().put(x).cuda()

    def get(self, x: Any) -> Any:
        return super().get(x.cpu())


def why_no_gpu() -> str | None:
    """Say why there is no GPU for the tests, or None where there is one."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    import cupy

    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"no CUDA device: {error}"
    return None if count else "no CUDA device"


def emulation() -> Lab:
    """The emulation, or a skip."""
    if cuda_emulation.compiler() is None:
        pytest.skip("g++ is not installed")
    return Lab("emulation")


def emulation_for_torch() -> Lab:
    """The emulation for tensors of torch, or a skip."""
    pytest.importorskip("torch")
    emulation()
    return TorchLab("torch", EmulatedTorchDevice(0))


def gpu() -> Lab:
    """A GPU, or a skip."""
    reason = why_no_gpu()
    if reason is not None:
        pytest.skip(reason)
    return Gpu("gpu", CupyDevice(0))


def gpu_for_torch() -> Lab:
    """A GPU that torch can use too, or a skip."""
    gpu()
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    return TorchGpu("torch_gpu", TorchDevice(0))
