"""What the portable code needs beyond the array API standard: names, dtypes, bytes, slices.

The temporary memory of a call, besides its arguments, its result and the sketch, is bounded here. Whatever grows with
the product of two sizes (logits of queries and pairs, distances of tokens and leaders) is computed in pieces of at most
`transient_limit` numbers. An array of a piece takes 16 MiB in float32 on a CPU, and at most eight exist at once. Costs
of pairs of clusters are those of a stream, if they are more. docs/howto/numpy.md states the sum, and
tests/core/test_memory.py tests every call against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeAlias

import array_api_compat

from ._loading import LOADING

__all__ = [
    "Array",
    "Counts",
    "FloatInfo",
    "Namespace",
    "array_namespace",
    "chunks",
    "clip",
    "compute_dtype",
    "dtype_name",
    "finfo",
    "is_floating",
    "itemsize",
    "library_name",
    "on_cpu",
    "pieces",
    "positions",
    "saturating_cast",
    "transient_limit",
]

# Numbers, not bytes, of one temporary array: on a CPU, and on an accelerator, which is fast with large arrays alone and
# waits for the host between small ones.
TRANSIENT_NUMBERS = 1 << 22
TRANSIENT_NUMBERS_ON_ACCELERATORS = 1 << 26

# The array API has no static type that NumPy, torch and JAX arrays all satisfy.
Array: TypeAlias = Any
Namespace: TypeAlias = Any


class Counts(Protocol):
    """An integer array of any library, as an editor shows it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the axes."""

    def __int__(self) -> int:
        """Return the number of an array of one element."""

    def __getitem__(self, key: Any, /) -> Any:
        """Return a part."""

    def tolist(self) -> Any:
        """Return nested lists of Python integers."""


_namespaces: dict[type, Namespace] = {}


def array_namespace(x: Array) -> Namespace:
    """Return the array API namespace of an array; cached by type, as a single token needs it dozens of times.

    Raises
    ------
    TypeError
        If it is not an array of a library that follows the standard.
    """
    known = _namespaces.get(type(x))
    if known is not None:
        return known
    with LOADING:
        xp = array_api_compat.array_namespace(x)
    # JAX passes gradients that are zero around as arrays of NumPy: these alone do not go by type.
    if type(x).__module__.split(".")[0] != "numpy" or library_name(xp) == "numpy":
        _namespaces[type(x)] = xp
    return xp


@cache
def library_name(xp: Namespace) -> str:
    """Name of the array library behind a namespace: ``"numpy"``, ``"torch"``, ``"jax"``, ...

    Examples
    --------
    >>> import numpy as np
    >>> library_name(array_namespace(np.zeros(1)))
    'numpy'
    """
    name: str = xp.__name__
    return name.removeprefix("array_api_compat.").split(".")[0]


def compute_dtype(x: Array) -> Any:
    """Return the dtype to compute in: float64 for float64 input, float32 for anything narrower."""
    xp = array_namespace(x)
    return xp.float64 if x.dtype == xp.float64 else xp.float32


def dtype_name(dtype: object) -> str:
    """Name of a dtype of any library, or of a type that stands for one: ``"bfloat16"`` for torch's and ml_dtypes'."""
    return str(getattr(dtype, "name", getattr(dtype, "__name__", dtype))).split(".")[-1]


# Others are narrower than an answer may be (float8), or wider than any library but NumPy has.
_FLOATING = ("float16", "bfloat16", "float32", "float64")


@cache
def is_floating(dtype: Any, xp: Namespace) -> bool:
    """Whether streams may have a dtype: one of 16 to 64 bits that the library computes with, as with real numbers.

    Cached, as each token needs it.
    """
    if dtype_name(dtype) not in _FLOATING:
        return False
    if _is_cupys_bfloat16(dtype, xp):
        return True
    try:
        return bool(xp.isdtype(dtype, "real floating"))
    except TypeError:  # a dtype foreign to the library, such as ml_dtypes' bfloat16 in NumPy
        return False


@dataclass(frozen=True)
class FloatInfo:
    """Limits of a floating dtype; see `finfo` of the standard."""

    bits: int
    eps: float
    max: float
    smallest_normal: float


def finfo(dtype: Any, xp: Namespace) -> FloatInfo:
    """Return the limits of a floating dtype."""
    if _is_cupys_bfloat16(dtype, xp):
        return FloatInfo(bits=16, eps=2.0**-7, max=(2.0 - 2.0**-7) * 2.0**127, smallest_normal=2.0**-126)
    info = xp.finfo(dtype)
    return FloatInfo(int(info.bits), float(info.eps), float(info.max), float(info.smallest_normal))


def _is_cupys_bfloat16(dtype: Any, xp: Namespace) -> bool:
    """CuPy casts and computes with the bfloat16 of ml_dtypes, but its functions on dtypes refuse it."""
    return library_name(xp) == "cupy" and dtype_name(dtype) == "bfloat16"


def positions(n: int, like: Array) -> Array:
    """Return ``0 .. n - 1`` as int64 on the device of ``like``."""
    xp = array_namespace(like)
    return xp.arange(n, dtype=xp.int64, device=like.device)


def itemsize(dtype: Any, xp: Namespace) -> int:
    """Bytes of a number of a dtype."""
    if is_floating(dtype, xp):
        return finfo(dtype, xp).bits // 8
    return 1 if xp.isdtype(dtype, "bool") else int(xp.iinfo(dtype).bits) // 8


def clip(x: Array, low: float | None, high: float | None) -> Array:
    """Keep numbers within bounds; the dtype stays.

    By the array's own method where it has one: `array_api_compat` writes through a mask, for which CuPy waits for the
    device, twice a call.
    """
    if hasattr(x, "clip"):
        return x.clip(low, high)
    return array_namespace(x).clip(x, min=low, max=high)


def saturating_cast(x: Array, like: Array) -> Array:
    """Cast to the dtype of another array, saturating: float16 ends at 65504."""
    if x.dtype == like.dtype:
        return x
    xp = array_namespace(like)
    largest = finfo(like.dtype, xp).max
    return xp.astype(clip(x, -largest, largest), like.dtype)


def chunks(n: int, size: int) -> list[slice]:
    """Cut ``0 .. n`` into consecutive slices of at most ``size``."""
    return [slice(start, min(n, start + size)) for start in range(0, n, size)]


def on_cpu(x: Array) -> bool:
    """Whether an array is in the memory of the processor."""
    return "cpu" in str(x.device).lower()


def transient_limit(like: Array) -> int:
    """Return how many numbers a temporary array on the device of another array may have."""
    return TRANSIENT_NUMBERS if on_cpu(like) else TRANSIENT_NUMBERS_ON_ACCELERATORS


def pieces(n: int, numbers: int, like: Array) -> list[slice]:
    """Cut ``0 .. n`` into consecutive slices whose temporary arrays stay within `transient_limit`.

    Parameters
    ----------
    n : int
        Length of the axis to cut.
    numbers : int
        Numbers of a temporary array for each place of the axis. A slice has at least one place.
    like : array
        An array on the device where the temporary arrays are.

    Returns
    -------
    list of slice
        A single one where everything fits.

    Examples
    --------
    >>> import numpy as np
    >>> pieces(5, 1 << 21, np.zeros(1))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    if n * numbers <= TRANSIENT_NUMBERS:  # as a rule, and the device need not be known
        return [slice(0, n)]
    return chunks(n, max(1, transient_limit(like) // max(1, numbers)))
