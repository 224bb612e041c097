"""Streams shared out over threads: the same results, errors that come back, and limits."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading

import numpy as np
import pytest
import subgen_numpy
from numpy.typing import NDArray
from states import SEED
from subgen_numpy import _parallel
from switches import threads_for_all, without_loops

import subgen
from subgen._tree import leaves


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("max_clusters", [30, 800])
def test_threads_change_nothing(loops: bool, max_clusters: int) -> None:
    keys, values, queries = np.random.default_rng(SEED).normal(size=(3, 5, 1000, 8)).astype(np.float32)
    found = []
    with threads_for_all(), contextlib.nullcontext() if loops else without_loops():
        for n in (1, 2, 7):
            with subgen_numpy.thread_limit(n):
                sketch = subgen.AttentionSketch(max_clusters, window=16)
                sketch.update(keys, values, queries=queries)
                found.append((*(x for _, x in leaves(sketch.state)), sketch.attend(queries[:, -3:])))
    for other in found[1:]:
        for x, y in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(x, y)


def test_how_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    _parallel._default.cache_clear()
    assert _parallel.threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    _parallel._default.cache_clear()
    assert _parallel.threads() >= 1
    with subgen_numpy.thread_limit(5):
        assert _parallel.threads() == 5
        seen: list[int] = []
        other = threading.Thread(target=lambda: seen.append(_parallel.threads()))
        other.start()
        other.join()
        assert seen == [_parallel._default()], "another thread was limited too"
    with pytest.raises(ValueError, match="threads must be an integer of at least 1, got 0"):
        subgen_numpy.thread_limit(0)
    _parallel._default.cache_clear()


def test_streams_are_shared_out_and_errors_come_back() -> None:
    met = threading.Barrier(2, timeout=30)
    done: list[tuple[int, int]] = []

    def work(stream: int) -> None:
        if stream < 2:
            met.wait()  # both threads are at it
        done.append((stream, threading.get_ident()))

    with subgen_numpy.thread_limit(2):
        _parallel.by_streams(work, 9, 9)
        assert sorted(stream for stream, _ in done) == list(range(9))
        assert len({thread for _, thread in done}) == 2

        def fail(stream: int) -> None:
            met.wait()
            if threading.current_thread() is not threading.main_thread():
                raise RuntimeError("a helper's")
            raise ValueError("the caller's")

        with pytest.raises((RuntimeError, ValueError)):
            _parallel.by_streams(fail, 2, 2)

        def fail_to_help(tickets: NDArray[np.int64], waits: bool) -> None:
            met.wait()
            if not waits:
                raise RuntimeError("a helper's")
            while tickets[1] < 1:
                pass

        with pytest.raises(RuntimeError, match="a helper's"):
            _parallel.parallel_for(fail_to_help, 2)
        done.clear()
        _parallel.by_streams(work, 3, 3)  # as before
        assert len(done) == 3

    together = threading.Barrier(3, timeout=30)
    with subgen_numpy.thread_limit(3):
        _parallel.by_streams(lambda stream: together.wait(), 3, 3)
        _parallel.by_streams(lambda stream: None, 3, 1)


def test_blas_has_its_threads_back_whoever_comes_last() -> None:
    controlled = pytest.importorskip("threadpoolctl").ThreadpoolController().select(user_api="blas")

    def threads() -> set[int]:
        return {one["num_threads"] for one in controlled.info()}

    with controlled.limit(limits=2):
        assert threads() == {2}
        inside, leave = threading.Event(), threading.Event()

        def other() -> None:
            with _parallel._blas_kept_to_one_thread():
                inside.set()
                leave.wait(30)

        thread = threading.Thread(target=other)
        with _parallel._blas_kept_to_one_thread() as told:
            assert told
            thread.start()
            assert inside.wait(30)
            assert threads() == {1}
        assert threads() == {2}
        leave.set()
        thread.join()
        assert threads() == {2}
        with _parallel._blas_kept_to_one_thread():
            assert threads() == {1}


SCRIPT = """
import importlib, os, signal, sys, warnings
import numpy as np, subgen, subgen_numpy
warnings.simplefilter("ignore")  # newer releases of Python warn of forks beside threads, as is meant here
for module, limit in {"attend": "_WORTH_A_THREAD", "absorb": "WORTH_A_THREAD"}.items():
    module = importlib.import_module("subgen_numpy." + module)
    assert hasattr(module, limit)
    setattr(module, limit, 1)
keys, values, queries = np.random.default_rng(0).normal(size=(3, 4, 300, 8)).astype(np.float32)
def answer():
    with subgen_numpy.thread_limit(3):
        sketch = subgen.AttentionSketch(20, window=16)
        sketch.update(keys, values, queries=queries)
        return sketch.attend(queries[:, -2:])
expected = answer()
child = os.fork() if hasattr(os, "fork") else 0
if child == 0:
    signal.alarm(60)
    assert np.array_equal(answer(), expected)
    print("the same", flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
# Ends right behind work of threads.
answer()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_forked_process_has_threads_of_its_own_and_all_end_well() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the same\n", "")
