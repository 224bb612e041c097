"""The registry of backends: an operation is a portable function, and any library may have a faster one.

The algorithm is written once, against the Python array API standard, and runs on any array that follows it. Ten of
its functions are *operations* (`PORTABLE` lists them). Calling one runs the version of the library whose arrays it is
given, where a backend has one, and the portable function otherwise. No backend is ever needed: arrays of JAX or
array-api-strict run on the portable code.

To write one for a library ``mylib``:

1. In a package of your own, write the operations you want to speed up, with the signatures, shapes and results of
   the portable functions (each has a docstring)::

       # subgen_mylib/__init__.py
       from subgen.backends import Backend
       from ._kernels import weighted_attention
       BACKEND = Backend("mylib", {"weighted_attention": weighted_attention})

   An operation that cannot take some input returns ``NotImplemented``; the portable function then runs.

2. Announce it in your ``pyproject.toml``; the name is the root module of the arrays' namespace::

       [project.entry-points."subgen.backends"]
       mylib = "subgen_mylib:BACKEND"

That is all. The backend is found when the first array of that library arrives, and is not imported before. ``subgen
backends`` on the command line shows it, and ``tests/core/test_backends.py`` shows the contracts: the same signature,
discrete results (assignments, counts) equal to the last bit on small-integer input, numbers equal within the rounding
of float32. To try one without packaging it, call `register`.

An operation gets arrays of your library only, already checked, and gives new arrays. ``append`` and ``decode`` may
write in place behind the last token, after `subgen.default.state.reserve`. There is no global "current backend" and no
environment variable: the array decides.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar, cast

from ._array import Array, array_namespace, library_name
from ._loading import LOADING
from ._tree import example

__all__ = ["PORTABLE", "Backend", "BackendError", "get", "names", "operation", "register"]

_GROUP = "subgen.backends"

Given = ParamSpec("Given")
Result = TypeVar("Result")

_portable: dict[str, Callable[..., Any]] = {}

#: The portable function behind each operation.
PORTABLE: Mapping[str, Callable[..., Any]] = MappingProxyType(_portable)


class BackendError(RuntimeError):
    """A backend is unknown, broken, or offers an operation that does not exist."""


@dataclass(frozen=True)
class Backend:
    """Replacements of operations for the arrays of one library.

    Parameters
    ----------
    name : str
        Root module of the library's array namespace: ``"numpy"``, ``"torch"``, ``"cupy"``.
    operations : mapping of str to callable
        Keys from `PORTABLE`; what is missing stays portable.

    Raises
    ------
    BackendError
        If the mapping names an operation that does not exist.
    """

    name: str
    operations: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.operations) - set(PORTABLE))
        if unknown:
            raise BackendError(
                f"backend {self.name!r} offers unknown operations {unknown}; the operations are {sorted(PORTABLE)}"
            )
        object.__setattr__(self, "operations", MappingProxyType(dict(self.operations)))


def operation(portable: Callable[Given, Result]) -> Callable[Given, Result]:
    """Turn a portable function into an operation, dispatched by the library of its first argument.

    Parameters
    ----------
    portable : callable
        Its first argument is an array, or a dataclass of arrays such as `subgen.default.state.State`.

    Returns
    -------
    callable
        The same signature and docstring. ``PORTABLE[name]`` is the function given.
    """
    name = portable.__name__
    _portable[name] = portable

    @wraps(portable)
    def dispatched(*given: Given.args, **named: Given.kwargs) -> Result:
        faster = _operations_of(example(given[0])).get(name)
        if faster is not None:
            result = faster(*given, **named)
            if result is not NotImplemented:
                return cast("Result", result)
        return portable(*given, **named)

    return dispatched


_registered: dict[str, Backend] = {}
_resolved: dict[str, Mapping[str, Callable[..., Any]]] = {}


def _operations_of(x: Array) -> Mapping[str, Callable[..., Any]]:
    """Return what the backend of an array's library replaces."""
    name = library_name(array_namespace(x))
    operations = _resolved.get(name)
    if operations is None:
        with LOADING:
            known = name in _registered or name in _entry_points()
            operations = _resolved[name] = get(name).operations if known else {}
    return operations


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=_GROUP)}


def names() -> list[str]:
    """List the backends that are installed or registered, without importing any.

    Returns
    -------
    list of str

    Examples
    --------
    >>> import subgen
    >>> "numpy" in subgen.backends.names()
    True
    """
    return sorted({*_registered, *_entry_points()})


def get(name: str) -> Backend:
    """Return a backend by name, importing it if need be.

    Parameters
    ----------
    name : str
        Root module of the arrays' namespace.

    Returns
    -------
    Backend

    Raises
    ------
    BackendError
        If no backend has that name (the message lists the installed ones), or its package does not import.

    Examples
    --------
    >>> import subgen
    >>> subgen.backends.get("numpy").name
    'numpy'
    """
    if name in _registered:
        return _registered[name]
    points = _entry_points()
    if name not in points:
        raise BackendError(
            f"no backend named {name!r}; installed: {', '.join(names()) or 'none'}. Arrays without a backend run "
            f"on the portable code; see subgen.backends on how to write one"
        )
    try:
        backend = points[name].load()
    except Exception as error:
        raise BackendError(
            f"backend {name!r} ({points[name].value}) is installed but does not load: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(backend, Backend):
        raise BackendError(
            f"the entry point of backend {name!r} must give a subgen.backends.Backend, got {type(backend).__name__}"
        )
    _registered[name] = backend
    return backend


def register(backend: Backend, *, replace: bool = False) -> None:
    """Add a backend for this process; packages use the entry-point group ``subgen.backends`` instead.

    Parameters
    ----------
    backend : Backend
        The next operation on an array of its library uses it, in sketches made before too.
    replace : bool
        Whether to take the place of a backend of that name.

    Raises
    ------
    TypeError
        If it is not a `Backend`.
    BackendError
        If the name is taken and ``replace`` is false.
    """
    if not isinstance(backend, Backend):
        raise TypeError(f"register takes a subgen.backends.Backend, got {type(backend).__name__}")
    if backend.name in names() and not replace:
        raise BackendError(f"backend {backend.name!r} exists already; pass replace=True to take its place")
    _registered[backend.name] = backend
    _resolved.pop(backend.name, None)
