"""Arrays as users pass them: made plain, or refused with the remedy; and the modes of a library that change results.

An array is plain if its elements lie in memory as the library computes with them: a strided tensor, a native-endian
`numpy.ndarray`. Everything behind the checks may then use any operation, and share the memory with another library.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

from ._array import Array, Namespace, array_namespace, library_name

__all__ = ["autocast_off", "namespace_of", "outside_modes", "plain"]

P = ParamSpec("P")
T = TypeVar("T")

_NO_CONTEXT: AbstractContextManager[object] = nullcontext()

_NO_VALUES = "and a sketch chooses by values, which are not computed yet"
_UNNEST = (
    "keep a sketch for each of {name}.unbind(), or pad them by torch.nested.to_padded_tensor and give each length its "
    "own"
)
_ALL_VALUES = "and a sketch reads every number: leave masked tokens out, or fill them"

# By type, as a single token needs three. Types that are refused are not cached.
_converters: dict[type, Callable[[str, Any], Array]] = {}
_libraries: dict[type, str] = {}


def plain(name: str, x: Any) -> Array:
    """Return an array as the library computes with it: the array itself, a view of it, or a copy.

    Parameters
    ----------
    name : str
        Of the argument, for the message.
    x : array
        A copy is made of NumPy arrays that are not native-endian or not aligned, and of tensors with the negative
        bit. A `numpy.memmap` is viewed as an array, and a tensor that requires grad is detached.

    Returns
    -------
    array

    Raises
    ------
    TypeError
        If it is not an array, or one of a kind that would be misread: a subclass with rules of its own, sparse, nested,
        lazy, traced, sharded or without data. The message names the remedy.
    """
    convert = _converters.get(type(x))
    if convert is None:
        convert = _converter(name, x)
        _converters[type(x)] = convert
    return convert(name, x)


def namespace_of(name: str, x: Any) -> Namespace:
    """Return the namespace of an array, or raise a TypeError that names the argument."""
    try:
        return array_namespace(x)
    except TypeError:
        raise TypeError(
            f"{name} must be an array of an array API library (NumPy, torch, CuPy, JAX, ...), got "
            f"{type(x).__name__}; convert it first, for example with numpy.asarray"
        ) from None


def _library(x: object) -> str:
    """Name the library of an array that has more than plain arrays: ``"numpy"``, ``"torch"``, ``"jax"`` or ``"dask"``.

    ``""`` for all else, and ``"jax"`` for its tracers alone. By the names of the type's bases: a library that another
    thread is importing has not all of its own yet.
    """
    kind = type(x)
    library = _libraries.get(kind)
    if library is None:
        bases = {(base.__module__.split(".")[0], base.__name__) for base in kind.__mro__}
        names = {"numpy": "ndarray", "torch": "Tensor", "jax": "Tracer", "dask": "Array"}
        library = next((library for library, name in names.items() if (library, name) in bases), "")
        _libraries[kind] = library
    return library


def _converter(name: str, x: Any) -> Callable[[str, Any], Array]:
    """Choose what makes arrays of a type plain, or refuse the type."""
    kind = _library(x)
    if kind == "numpy":
        return _numpy_converter(name, x)
    if kind == "torch":
        return _torch_converter(name, x)
    if kind == "jax":
        raise _traced_by_jax(name, type(x).__name__)
    if kind == "dask":
        raise TypeError(
            f"{name} is a Dask array, {_NO_VALUES}: sketch it by subgen.dask.sketch, chunk by chunk, or pass "
            f"{name}.compute()"
        )
    library = library_name(namespace_of(name, x))
    if library == "sparse":
        raise TypeError(f"{name} is a sparse array, and attention is dense: pass {name}.todense()")
    if library == "ndonnx":
        raise TypeError(f"{name} is an array of ndonnx, {_NO_VALUES}: pass arrays of NumPy")
    return _plain_jax if library == "jax" else _as_is


def _as_is(name: str, x: Array) -> Array:
    return x


def _numpy_converter(name: str, x: np.ndarray[Any, Any]) -> Callable[[str, Any], Array]:
    kind = type(x)
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, {_ALL_VALUES}, for example by numpy.ma.filled({name}, 0.0)")
    if kind not in (np.ndarray, np.memmap):
        raise TypeError(
            f"{name} is a {kind.__module__}.{kind.__qualname__}, a subclass of numpy.ndarray whose own rules subgen "
            f"does not follow: pass numpy.asarray({name})"
        )
    return _plain_numpy


def _plain_numpy(name: str, x: np.ndarray[Any, Any]) -> Array:
    if type(x) is not np.ndarray:
        x = x.view(np.ndarray)
    if not x.dtype.isnative:
        x = x.astype(x.dtype.newbyteorder("="))
    # Compiled loops read words at their addresses.
    return x if x.flags.aligned else x.copy()


def _torch_converter(name: str, x: Any) -> Callable[[str, Any], Array]:
    kind, torch = type(x), sys.modules["torch"]
    if kind in (torch.Tensor, torch.nn.Parameter):
        return partial(_plain_torch, torch.strided)
    words = {
        "DTensor": f"sharded over ranks: pass {name}.full_tensor(), or keep a sketch of {name}.to_local() on each rank "
        "and answer by subgen_torch.distributed.attend",
        "NestedTensor": f"nested: {_UNNEST.format(name=name)}",
        "FakeTensor": f"of FakeTensorMode or torch.export, {_NO_VALUES}: call subgen outside",
        "FunctionalTensor": f"of torch.export, {_NO_VALUES}: call subgen outside",
        "AsyncCollectiveTensor": f"not received yet: pass {name}.wait()",
        "MaskedTensor": f"masked, {_ALL_VALUES}, by {name}.to_tensor(0.0)",
    }
    raise TypeError(
        f"{name} is a {kind.__module__}.{kind.__qualname__}, "
        + words.get(
            kind.__name__,
            f"a subclass of torch.Tensor whose own rules subgen does not follow: pass a plain tensor, for example "
            f"{name}.as_subclass(torch.Tensor)",
        )
    )


def _plain_torch(strided: object, name: str, x: Any) -> Array:
    strange = x.layout is not strided or x.is_nested or x.is_meta
    try:
        x.data_ptr()
    except RuntimeError:  # what stands for a tensor inside torch.func has no memory, nor have tensors of some devices
        strange = strange or x.device.type in ("cpu", "cuda")
    if strange:
        raise TypeError(f"{name} {_torch_words(name, x)}")
    if x.requires_grad:
        x = x.detach()
    return x.resolve_neg() if x.is_neg() else x


def _torch_words(name: str, x: Any) -> str:
    if x.is_nested:
        return f"is a nested tensor: {_UNNEST.format(name=name)}"
    if x.is_meta:
        return "is a tensor of the meta device, which holds no values: make it on a device, such as cpu or cuda"
    if str(x.layout) != "torch.strided":
        return f"has layout {x.layout}, and attention is dense: pass {name}.to_dense()"
    return (
        f"is traced by torch.func (vmap, grad, jvp) or torch.compile, {_NO_VALUES}: call subgen outside of the "
        f"transformation, with a batch as a leading axis"
    )


def _traced_by_jax(name: str, what: str) -> TypeError:
    return TypeError(
        f"{name} is traced by JAX ({what}: inside jax.jit, grad, vmap or scan), {_NO_VALUES}: call subgen outside of "
        f"the transformation, with a batch as a leading axis"
    )


def _plain_jax(name: str, x: Any) -> Array:
    # Inside jax.jit whatever is computed is traced, of arrays with values too, and a sketch would keep the traces.
    clean = getattr(sys.modules["jax"]._src.core, "trace_state_clean", None)  # only saves the operation below
    if (clean is None or not clean()) and _library(x.T) == "jax":
        raise _traced_by_jax(name, "a constant")
    if not x.is_fully_replicated:
        raise TypeError(
            f"{name} is sharded over {len(x.sharding.device_set)} devices: pass jax.device_put({name}, one_device), or "
            f"keep a sketch of each shard and join them by subgen.merge"
        )
    return x


def autocast_off(x: Any) -> AbstractContextManager[object]:
    """Return a context in which torch computes in the dtypes that tensors have, on the device of one of them.

    A sketch casts where it must and returns the dtype of its input. What `torch.autocast` rounds in between would be
    lost for the rest of the stream.
    """
    if _library(x) != "torch":
        return _NO_CONTEXT
    torch = sys.modules["torch"]
    device = "cpu" if x.is_cpu else x.device.type  # a device takes ten times as long to make
    if device != "cpu" and not torch.amp.is_autocast_available(device):
        return _NO_CONTEXT
    if not torch.is_autocast_enabled(device):
        return _NO_CONTEXT
    context: AbstractContextManager[object] = torch.autocast(device, enabled=False)
    return context


def outside_modes(function: Callable[P, T]) -> Callable[P, T]:
    """Keep modes that the caller set out of a function of the library: autocast, torch.compile, underflow in NumPy.

    See `autocast_off`. torch.compile runs it as it is, with a graph break: to trace loops that end by values takes it
    minutes.
    """
    untraced: list[Callable[P, T]] = []  # the function as torch.compile leaves it and all that it calls alone

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        run = function
        if "torch._dynamo" in sys.modules:  # only where it is loaded, as loading takes seconds
            if not untraced:
                untraced.append(sys.modules["torch"].compiler.disable(function))
            run = untraced[0]
        context = _NO_CONTEXT
        for x in (*args, *kwargs.values()):
            if _library(x) == "torch":
                context = autocast_off(x)
                break
        # NumPy may be set to raise where a weight of attention underflows to zero, as it should.
        with np.errstate(under="ignore"), context:
            return run(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined] # as torch.compiler.disable marks it
    return call
