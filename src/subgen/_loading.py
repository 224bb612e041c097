"""Load and compile at a first call, so that a fork in another thread, or Ctrl-C, leaves nothing half done.

- A fork waits until it is done. In the child no thread is left to release the locks of imports, of numba and of LLVM
  that other threads held.
- Another thread does it, and Ctrl-C interrupts the main thread while it waits. Raised inside numba, an interrupt would
  be reported as an error of the compiler, and might leave it in a state in which nothing compiles any more.
"""

from __future__ import annotations

# Loaded for their own hooks of a fork, which take locks that a compiler may wait for: hooks that are registered later
# run before them.
import concurrent.futures.thread  # noqa: F401
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

__all__ = ["LOADING", "call_uninterrupted"]

# Seconds that a fork waits for a lock: several times as long as it takes to compile.
_TIMEOUT = 300.0
# Seconds after which a line says why a first call takes so long.
_PATIENCE = 3.0
_log = logging.getLogger("subgen")

Result = TypeVar("Result")

#: Held while modules are imported at a first call.
LOADING = threading.RLock()


def call_uninterrupted(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function; from the main thread, in which signals interrupt, in a thread of its own.

    An interrupted call goes on there to its end, and the interpreter waits for it. Where the main thread holds
    `LOADING`, which the function may take, it calls the function itself. The logger ``subgen`` says so if it takes
    several seconds.

    Parameters
    ----------
    function : callable
    *arguments
    """
    if threading.current_thread() is not threading.main_thread() or LOADING._is_owned():  # type: ignore[attr-defined]
        return function(*arguments)
    results: list[Result] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function(*arguments))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, name="subgen-loading", daemon=False)
    try:
        thread.start()
    except RuntimeError:  # the interpreter is on its way out, or the system has no more threads
        return function(*arguments)
    thread.join(_PATIENCE)
    if thread.is_alive():
        _say_once()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@cache
def _say_once() -> None:
    _log.warning(
        "compiling loops for this processor: up to a minute, once; numba keeps the result in its cache for the next run"
    )


def _locks() -> Iterator[Any]:
    """Iterate over the locks that a fork waits for, in the order in which a thread takes them: ours first."""
    yield LOADING
    compiler, llvm = (sys.modules.get(name) for name in ("numba.core.compiler_lock", "llvmlite.binding.ffi"))
    yield getattr(getattr(compiler, "global_compiler_lock", None), "_lock", None)
    yield getattr(getattr(getattr(llvm, "lib", None), "_lock", None), "_lock", None)


# Locks that the forking thread holds.
_forking = threading.local()


def _hold() -> None:
    _forking.locks = []
    for lock in _locks():
        if lock is not None and lock.acquire(timeout=_TIMEOUT):
            _forking.locks.append(lock)


def _release() -> None:
    while _forking.locks:
        _forking.locks.pop().release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_release)
