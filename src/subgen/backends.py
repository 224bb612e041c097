"""The registry of backends: faster versions of a few hot operations, one array library each.

The algorithm is written once, against the Python array API standard, and runs on any array that follows it. A
backend replaces some of the operations below for the arrays of one library; what it leaves out falls to the
portable function. No backend is ever needed: arrays of JAX or array-api-strict run on the portable code.

To write one for a library ``mylib``:

1. In a package of your own, write the operations you want to speed up, with the signatures, shapes and results of
   the portable functions (`PORTABLE` lists them; each has a docstring)::

       # subgen_mylib/__init__.py
       from subgen.backends import Backend
       from ._kernels import weighted_attention
       BACKEND = Backend("mylib", {"weighted_attention": weighted_attention})

2. Announce it in your ``pyproject.toml``; the name is the root module of the arrays' namespace::

       [project.entry-points."subgen.backends"]
       mylib = "subgen_mylib:BACKEND"

That is all: it is found when the first array of that library arrives, and not imported before. ``subgen backends``
on the command line shows it, and the tests in ``tests/test_backends.py`` show the contracts to hold it to: the
same signature, discrete results (assignments, counts, random bits) equal to the last bit on small-integer input,
numbers equal within the rounding of float32. To try one without packaging it, call `register`.

An operation gets arrays of your library only, already checked, and gives new arrays; it must not write into its
arguments, ``write`` and ``decode`` excepted. There is no global "current backend" and no environment variable: the
array decides.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ._array import Array, array_namespace, library_name
from ._loading import LOADING
from .absorbing import Absorbed, Settled, absorb, collect, settle
from .blocks import Turned, absorb_blocks
from .clustering import assign_leaders
from .counter import threefry2x32
from .decoding import Decoded, decode
from .mass import coded_attention, sketch_attention
from .merging import merge_closest
from .metric import query_moment
from .queries import query_codes
from .rounding import Codes, quantize
from .tail import write
from .weighted import weighted_attention

__all__ = ["PORTABLE", "Backend", "BackendError", "Operations", "get", "names", "operations_for", "register"]

_GROUP = "subgen.backends"


@dataclass(frozen=True)
class Operations:
    """The hot operations as one object: the portable functions, or a backend's in their place."""

    threefry2x32: Callable[..., tuple[Array, Array]] = threefry2x32
    assign_leaders: Callable[..., Any] = assign_leaders
    weighted_attention: Callable[..., tuple[Array, Array]] = weighted_attention
    sketch_attention: Callable[..., tuple[Array, Array]] = sketch_attention
    coded_attention: Callable[..., tuple[Array, Array]] = coded_attention
    merge_closest: Callable[..., tuple[Any, Array]] = merge_closest
    write: Callable[..., Array] = write
    quantize: Callable[..., Codes] = quantize
    collect: Callable[..., tuple[Any, Array]] = collect
    query_moment: Callable[..., Array] = query_moment
    settle: Callable[..., Settled] = settle
    query_codes: Callable[..., Codes] = query_codes
    absorb: Callable[..., Absorbed] = absorb
    absorb_blocks: Callable[..., Turned] = absorb_blocks
    decode: Callable[..., Decoded] = decode


#: The operations a backend may replace, and the portable function behind each.
PORTABLE: Mapping[str, Callable[..., Any]] = MappingProxyType(dict(vars(Operations())))


class BackendError(RuntimeError):
    """A backend is unknown, broken, or offers an operation that does not exist."""


@dataclass(frozen=True)
class Backend:
    """Replacements of hot operations for the arrays of one library.

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


_registered: dict[str, Backend] = {}
_resolved: dict[str, Operations] = {}


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
    """Look a backend up by name, importing it if need be.

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
        If no backend has that name (the message lists those there are), or its package does not import.

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
        Sketches made before keep working; the next operation on such an array uses it.
    replace : bool
        Whether to take the place of a backend of that name.

    Raises
    ------
    TypeError
        If it is no `Backend`.
    BackendError
        If the name is taken and ``replace`` is false.
    """
    if not isinstance(backend, Backend):
        raise TypeError(f"register takes a subgen.backends.Backend, got {type(backend).__name__}")
    if backend.name in names() and not replace:
        raise BackendError(f"backend {backend.name!r} exists already; pass replace=True to take its place")
    _registered[backend.name] = backend
    _resolved.pop(backend.name, None)


def operations_for(x: Array) -> Operations:
    """Return the operations for an array: those of its library's backend, portable where it has none.

    Parameters
    ----------
    x : array

    Returns
    -------
    Operations

    Raises
    ------
    BackendError
        If the library has a backend and it does not load.
    """
    name = library_name(array_namespace(x))
    operations = _resolved.get(name)
    if operations is None:
        with LOADING:
            known = name in _registered or name in _entry_points()
            operations = Operations(**get(name).operations) if known else Operations()
        _resolved[name] = operations
    return operations
