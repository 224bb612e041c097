"""The array libraries of the test matrix, and the way there and back from NumPy."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Array = Any


@dataclass(frozen=True)
class Library:
    """An array library by the name of its module."""

    name: str
    module: str

    def __repr__(self) -> str:
        return self.name

    @property
    def compiles(self) -> bool:
        """Say if it compiles every operation for every shape, which takes far longer than what is tested."""
        return self.name == "jax"

    def array(self, x: Any) -> Array:
        """Make an array of this library from NumPy's."""
        module = importlib.import_module(self.module)
        return module.asarray(np.asarray(x))


LIBRARIES = {
    name: Library(name, module)
    for name, module in {
        "numpy": "numpy",
        "strict": "array_api_strict",
        "torch": "torch",
        "jax": "jax.numpy",
    }.items()
}
NUMPY = LIBRARIES["numpy"]


def skip_compiling(library: Library) -> None:
    """Skip a library that compiles: other tests show the same operations on it in fewer shapes."""
    if library.compiles:
        pytest.skip(f"{library.name} compiles for every shape")


def to_numpy(x: Array) -> NDArray[Any]:
    """Bring an array of any library home."""
    if type(x).__module__.startswith("array_api_strict"):
        x = x._array
    if type(x).__module__ == "torch" and not x.dtype.is_complex and x.dtype.itemsize < 4 and x.is_floating_point():
        x = x.float()  # exact, and NumPy has no bfloat16
    return np.asarray(x)
