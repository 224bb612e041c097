"""Streams shared out over threads, for work that leaves the interpreter's lock alone: compiled loops, and BLAS."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, Token
from functools import cache
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from subgen._checks import check_integer
from subgen._loading import LOADING

__all__ = ["by_streams", "parallel_for", "thread_limit", "threads"]

# More than there are streams.
_ALL = 2**62
# Seconds between looks at work that takes long.
_PAUSE = 5e-5

_limit: ContextVar[int | None] = ContextVar("threads", default=None)


class thread_limit:  # noqa: N801  # a context: as a class it takes a third of the time, and each token takes one
    """Let the NumPy backend use so many threads, itself included, instead of its default; in this thread and context.

    Parameters
    ----------
    n : int
        At least 1. The default is ``OMP_NUM_THREADS``, read at the first use, or else the processors that this
        process may run on.

    Raises
    ------
    TypeError, ValueError
        If it is not an integer of at least 1.

    Examples
    --------
    >>> import subgen_numpy
    >>> with subgen_numpy.thread_limit(1):
    ...     pass  # whatever a sketch does here takes one thread
    """

    def __init__(self, n: int) -> None:
        self._n = check_integer("threads", n)
        self._before: list[Token[int | None]] = []

    def __enter__(self) -> None:
        self._before.append(_limit.set(self._n))

    def __exit__(self, *_: object) -> None:
        _limit.reset(self._before.pop())


def threads() -> int:
    """Return how many threads may be used here."""
    limit = _limit.get()
    return _default() if limit is None else limit


@cache
def _default() -> int:
    n = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if n.isdecimal() and int(n) > 0:
        return int(n)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_for(work: Callable[[NDArray[np.int64], bool], Any], most: int, *, blas: bool = False) -> None:
    """Call a function that several threads may call at once to share the same work, in several of them.

    Parameters
    ----------
    work : callable
        Takes the tickets that the threads share, see `subgen_numpy._numba_streams`, and whether it is the caller's,
        which comes back when all is done. The others may come later, and find nothing left to do.
    most : int
        Most threads that are worth it; see `threads` for the other limit.
    blas : bool
        Whether the work calls BLAS; see `by_streams`.
    """
    tickets, errors = np.zeros(3, np.int64), []

    def help_out() -> None:
        if tickets[0] >= _ALL:  # all was done before this thread was free
            return
        try:
            work(tickets, False)
        except BaseException as error:
            errors.append(error)
            tickets[1] = _ALL  # no thread waits for the streams of this one

    def run(helpers: int) -> None:
        _helpers.submit(help_out, helpers)
        work(tickets, True)
        while tickets[1] < tickets[2]:  # see `subgen_numpy._numba_streams.wait`
            time.sleep(_PAUSE)

    try:
        if blas:
            with _as_many(most, blas) as n:
                run(n - 1)
        else:  # a token's, where a context takes as long as all else here
            run(min(threads(), most) - 1)
    finally:  # interrupted or not
        tickets[0] = _ALL
    if errors:
        raise errors[0]


@contextmanager
def _as_many(most: int, blas: bool) -> Iterator[int]:
    """How many threads to use; if several call BLAS, it is kept to one thread meanwhile."""
    n = min(threads(), most)
    with ExitStack() as stack:
        if n > 1 and blas and not stack.enter_context(_blas_kept_to_one_thread()):
            n = 1
        yield n


def by_streams(work: Callable[[int], Any], streams: int, most: int, *, blas: bool = False) -> None:
    """Call a function for each stream, in several threads.

    Each thread, the caller's among them, takes the next stream when it is done with one: who is held up, by other work
    on its processor, takes fewer.

    Parameters
    ----------
    work : callable
        Takes the number of a stream. Worth a thread where it leaves the interpreter's lock alone for most of its time.
    streams : int
    most : int
        Most threads that are worth it; see `threads` for the other limit.
    blas : bool
        Whether the work calls BLAS, which is then kept to one thread: its own would wait for these, and these for them.
        Without threadpoolctl, which does that, all is done by the caller.
    """
    todo = deque(range(streams))

    def take() -> None:
        while True:
            try:
                stream = todo.popleft()
            except IndexError:
                return
            work(stream)

    def noted(future: Future[None]) -> None:
        if future.set_running_or_notify_cancel():
            try:
                take()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

    with _as_many(min(streams, most), blas) as n:
        futures: list[Future[None]] = [Future() for _ in range(n - 1)]
        waiting = deque(futures)
        _helpers.submit(lambda: noted(waiting.popleft()), len(futures))
        try:
            take()
        finally:
            todo.clear()
            for future in futures:
                if not future.cancel():  # it has begun
                    future.result()


class _Helpers:
    """Threads that wait for work; not those of an executor, which has much to note down when a call is over."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._parallel: list[threading.Thread] = []
        self._over = False

    def submit(self, work: Callable[[], Any], times: int) -> None:
        """Let so many threads call a function when they are free; none does where no thread can be started."""
        if times > len(self._parallel):
            self._start(times)
        if self._parallel:
            for _ in range(times):
                self._work.put(work)

    def stop(self) -> None:
        """Wait for all to end: one that comes back from compiled code after the interpreter has gone ends it badly."""
        with self._lock:
            threads, self._parallel, self._over = self._parallel, [], True
        for _ in threads:
            self._work.put(None)
        for thread in threads:
            thread.join()

    def _start(self, wanted: int) -> None:
        with self._lock:
            while len(self._parallel) < wanted and not self._over:
                thread = threading.Thread(target=self._serve, name=f"subgen-{len(self._parallel)}", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the interpreter is on its way out, or the system has no more threads
                    return
                self._parallel.append(thread)

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work  # and what it holds


@contextmanager
def _blas_kept_to_one_thread() -> Iterator[bool]:
    """Whether it is.

    Of threads that enter at the same time, the first sets the limit and resets it when it leaves: the number is one for
    the whole process, and each would give back what it found. The others may then find more threads.
    """
    controller = _controller()
    if controller is None:
        yield False
    elif _blas.acquire(blocking=False):
        try:
            with controller.limit(limits=1, user_api="blas"):
                yield True
        finally:
            _blas.release()
    else:
        yield True


@cache
def _controller() -> Any:
    with LOADING:
        try:
            from threadpoolctl import ThreadpoolController
        except ImportError:
            return None
        return ThreadpoolController()


_helpers = _Helpers()
_blas = threading.Lock()


def _forget() -> None:
    """A child process has no threads of its parent, and perhaps a lock that one of them held."""
    global _helpers, _blas
    _helpers, _blas = _Helpers(), threading.Lock()


atexit.register(lambda: _helpers.stop())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
