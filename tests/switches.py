"""Choose what runs within a block: a backend, the portable code, NumPy without compiled loops, or threads for all."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
from subgen_numpy import compiled

from subgen import backends
from subgen.backends import PORTABLE, Backend

LOOPS = ("absorb", "attend", "float16", "merge", "round", "streams")

needs_loops = pytest.mark.skipif(compiled("absorb") is None, reason="numba or SciPy is not installed")


@contextmanager
def using_backend(backend: str | Backend) -> Iterator[None]:
    """Run operations by a backend within the block.

    Parameters
    ----------
    backend : str or Backend
        ``"portable"``: all libraries run the portable functions. Any other name: the installed backend of that name. A
        `Backend`: the arrays of its library run its operations, and those it lacks are portable.
    """
    with patch.dict(backends._resolved):
        if backend == "portable":
            backends._resolved.update({name: {} for name in backends.names()})
        else:
            chosen = backends.get(backend) if isinstance(backend, str) else backend
            backends._resolved[chosen.name] = chosen.operations
        yield


@contextmanager
def empty_registry() -> Iterator[None]:
    """Forget the backends that were registered or imported, and within the block keep what is registered."""
    with patch.dict(backends._registered, clear=True), patch.dict(backends._resolved, clear=True):
        yield


def counting(name: str, calls: list[str], result: Any = None) -> Callable[..., Any]:
    """Make an operation that notes its calls, and returns a result, or that of the portable function if it is None."""

    def operation(*given: Any, **named: Any) -> Any:
        calls.append(name)
        return PORTABLE[name](*given, **named) if result is None else result

    return operation


@contextmanager
def without_loops() -> Iterator[None]:
    """Run as if numba was not installed: no compiled loops are found within the block."""
    missing = dict.fromkeys([f"subgen_numpy._numba_{what}" for what in LOOPS])
    with patch.dict(sys.modules, missing):
        compiled.cache_clear()
        try:
            yield
        finally:
            compiled.cache_clear()


@contextmanager
def threads_for_all() -> Iterator[None]:
    """Let the NumPy backend share out any work over threads, however little it is."""
    limits = {"absorb": "WORTH_A_THREAD", "attend": "_WORTH_A_THREAD", "merging": "WORTH_A_THREAD"}
    limits["rounding"] = "_WORTH_A_THREAD"
    with pytest.MonkeyPatch.context() as patches:
        for module, limit in limits.items():
            # Not an import: in the package the operations hide the modules of their name.
            patches.setattr(importlib.import_module(f"subgen_numpy.{module}"), limit, 1)
        yield
