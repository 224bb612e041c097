"""Threads: any number may read a sketch, each of its copies may have a writer, and none of them notices the others.

The interpreter is told to switch threads as often as it can.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from libraries import LIBRARIES, Library, to_numpy
from safetensors import safe_open
from sketches import assert_same, feed, make, stream

import subgen
from subgen import AttentionSketch, _loading
from subgen._loading import LOADING, call_uninterrupted
from subgen.default.state import BufferOwner

THREADS = 8


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(params=["numpy", "torch"])
def library(request: pytest.FixtureRequest) -> Library:
    pytest.importorskip(request.param)
    return LIBRARIES[request.param]


def at_once(*tasks: Callable[[], Any]) -> list[Any]:
    """Run each in a thread of its own, all of them started at the same moment."""
    barrier = threading.Barrier(len(tasks))

    def run(task: Callable[[], Any]) -> Any:
        barrier.wait()
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return list(pool.map(run, tasks))


def test_free_space_is_given_to_one() -> None:
    for _ in range(200):
        owner = BufferOwner(3)
        assert sum(at_once(*[lambda owner=owner: owner.claim(3, 5)] * THREADS)) == 1
        assert not owner.claim(3, 4)
        assert owner.claim(5, 6)
    assert not BufferOwner(None).claim(0, 1)


def test_copies_that_append_at_once_go_on_apart(library: Library) -> None:
    """Copies share the free space behind their last token, and each writes another token there."""
    q, k, v = stream(0, (2,), 200)
    mine = [library.array(x) for x in (k, v, q)]
    base = AttentionSketch(9, window=24, sink=2)
    feed(base, *(x[:, :43] for x in mine))

    def go_on(sketch: AttentionSketch, order: np.ndarray) -> AttentionSketch:
        for i in order:
            feed(sketch, *(x[:, i : i + 1] for x in mine))
        return sketch

    expected: dict[int, AttentionSketch] = {}
    for turn in range(40):
        start = copy.copy(base)
        feed(start, *(x[:, 43 : 44 + turn % 5] for x in mine))  # free space of its own, which its copies share
        copies = [copy.copy(start) for _ in range(THREADS)]
        orders = [np.arange(60 + 10 * i, 66 + 10 * i) for i in range(THREADS)]
        done = at_once(*[lambda s=s, o=o: go_on(s, o) for s, o in zip(copies, orders, strict=True)])
        for i, (sketch, order) in enumerate(zip(done, orders, strict=True)):
            key = 10 * (turn % 5) + i
            if key not in expected:
                alone = AttentionSketch(9, window=24, sink=2)
                kept = [*range(44 + turn % 5), *order]
                feed(alone, *(library.array(to_numpy(x)[:, kept]) for x in mine))
                expected[key] = alone
            assert_same(sketch.state, expected[key].state)


@pytest.mark.parametrize("variant", ["default", "int8", "corrected", "paper"])
def test_many_readers_get_what_one_gets(library: Library, variant: str) -> None:
    q, k, v = (library.array(x) for x in stream(1, (2,), 120))
    sketch = make(variant)
    feed(sketch, k, v, q)
    asked = [q[:, 7 * i : 7 * i + 5 + 6 * i] for i in range(THREADS)]
    expected = [to_numpy(sketch.attend(x)) for x in asked]

    def read(i: int) -> list[np.ndarray]:
        return [to_numpy(sketch.attend(asked[i])) for _ in range(10)]

    for i, answers in enumerate(at_once(*[lambda i=i: read(i) for i in range(THREADS)])):
        for answer in answers:
            np.testing.assert_array_equal(answer, expected[i])


def test_readers_beside_a_writer(library: Library) -> None:
    """Of a copy they always get the same; of the sketch itself what it held at some moment, never less than before."""
    q, k, v = (library.array(x) for x in stream(2, (2,), 160))
    start, n = 50, 160
    sketch = make("default")
    feed(sketch, k[:, :start], v[:, :start], q[:, :start])
    frozen, twin = copy.copy(sketch), copy.copy(sketch)
    moments = [to_numpy(twin.attend(q[:, :3]))]
    for i in range(start, n):
        feed(twin, k[:, i : i + 1], v[:, i : i + 1], q[:, i : i + 1])
        moments.append(to_numpy(twin.attend(q[:, :3])))

    def write() -> None:
        for i in range(start, n):
            feed(sketch, k[:, i : i + 1], v[:, i : i + 1], q[:, i : i + 1])

    def read(of: AttentionSketch) -> list[int]:
        """The moments of the answers."""
        seen = []
        for _ in range(40):
            answer = to_numpy(of.attend(q[:, :3]))
            seen.append(next(i for i, moment in enumerate(moments) if np.array_equal(answer, moment)))
        return seen

    _, *seen = at_once(write, *[lambda: read(frozen)] * 3, *[lambda: read(sketch)] * 3)
    assert all(set(of_frozen) == {0} for of_frozen in seen[:3])
    assert all(of_sketch == sorted(of_sketch) for of_sketch in seen[3:])
    np.testing.assert_array_equal(to_numpy(sketch.attend(q[:, :3])), moments[-1])


@pytest.mark.parametrize("keep", [copy.copy, copy.deepcopy, lambda sketch: pickle.loads(pickle.dumps(sketch))])
def test_a_copy_is_saved_while_the_sketch_goes_on(tmp_path: Path, keep: Callable[[Any], Any]) -> None:
    q, k, v = stream(3, (2,), 2000, d=32, e=32)
    sketch = AttentionSketch(20, window=600, sink=2)
    feed(sketch, k[:, :500], v[:, :500], q[:, :500])
    expected = copy.deepcopy(sketch)
    for turn in range(4):
        path = tmp_path / f"{turn}.safetensors"

        def write(first: int = 500 + 100 * turn) -> None:
            for i in range(first, first + 100):
                feed(sketch, k[:, i : i + 1], v[:, i : i + 1], q[:, i : i + 1])

        def save(path: Path = path) -> AttentionSketch:
            kept = keep(sketch)
            kept.save(path)
            return kept

        kept = at_once(write, save)[1]
        loaded = subgen.load(path)
        assert_same(loaded.state, kept.state)
        more = slice(expected.n_seen, kept.n_seen)
        if more.stop > more.start:
            feed(expected, k[:, more], v[:, more], q[:, more])
        assert_same(loaded.state, expected.state)


def test_equal_sketches_are_equal_files(tmp_path: Path) -> None:
    """What a copy has written behind the last token is not in the file: the order of the header is all that varies."""
    q, k, v = stream(4, (2,), 60)
    sketch = make("default")
    feed(sketch, k[:, :43], v[:, :43], q[:, :43])
    sketch.save(tmp_path / "a.safetensors")
    feed(copy.copy(sketch), k[:, 43:45], v[:, 43:45], q[:, 43:45])
    sketch.save(tmp_path / "b.safetensors")
    # Nor the query of its token, in the place of one of ours that came without.
    feed(sketch, k[:, 43:44], v[:, 43:44])
    alone = make("default")
    feed(alone, k[:, :43], v[:, :43], q[:, :43])
    feed(alone, k[:, 43:44], v[:, 43:44])
    sketch.save(tmp_path / "c.safetensors")
    alone.save(tmp_path / "d.safetensors")
    found = {}
    for name in "abcd":
        with safe_open(tmp_path / f"{name}.safetensors", framework="numpy") as archive:
            found[name] = archive.metadata()["sha256"]
    assert found["a"] == found["b"]
    assert found["c"] == found["d"]


@pytest.mark.parametrize("frozen", [True, False])
def test_pickled_without_copying_the_arrays(frozen: bool) -> None:
    """Buffers beside a pickle may be read-only, as between processes, or still be those of the sketch itself."""
    q, k, v = stream(5, (2,), 60)
    sketch = make("default")
    feed(sketch, k[:, :43], v[:, :43], q[:, :43])
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(sketch, protocol=5, buffer_callback=buffers.append)
    assert buffers
    other = pickle.loads(data, buffers=[bytes(x.raw()) for x in buffers] if frozen else buffers)
    for first, last in ((0, 1), (1, 10)):  # a token each, into what may be the same free space
        feed(other, *(x[:, 50 + first : 50 + last] for x in (k, v, q)))
        feed(sketch, *(x[:, 43 + first : 43 + last] for x in (k, v, q)))
    feed(sketch, k[:, 53:], v[:, 53:], q[:, 53:])
    for each, kept in ((sketch, range(60)), (other, [*range(43), *range(50, 60)])):
        alone = make("default")
        feed(alone, *(x[:, kept] for x in (k, v, q)))
        assert_same(each.state, alone.state)


needs_numba = pytest.mark.skipif(
    sys.platform == "win32" or importlib.util.find_spec("numba") is None, reason="forks, and numba compiles"
)

# A loop that is compiled in the place of all: of a row with itself, the sum of squares.
COMPILES = """
import os, signal, sys, threading, time, warnings
import numpy as np
from subgen_numpy import compiled
warnings.simplefilter("ignore")  # newer releases of Python warn of forks beside threads, as is meant here
loops, x = compiled("merge"), np.arange(8.0, dtype=np.float32)[None]

def square():
    return float(loops.product(x, 0, x, 0, 8))

def wait_until_it_is_compiled():
    lock = sys.modules["numba.core.compiler_lock"].global_compiler_lock._lock
    while lock.acquire(blocking=False):
        lock.release()
        time.sleep(0.001)
"""

FORKS = """
thread = threading.Thread(target=square)
thread.start()
wait_until_it_is_compiled()
child = os.fork()
if child == 0:
    signal.alarm(60)
    assert square() == 140
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0, "the child hangs"
thread.join()
assert square() == 140
"""

INTERRUPTED = """
from numba.core import event
compiled_in = []

class Listener(event.Listener):
    def on_start(self, event):
        compiled_in.append(threading.current_thread())
        if len(compiled_in) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    def on_end(self, event):
        pass

event.register("numba:compile", Listener())
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

try:
    square()
except KeyboardInterrupt:
    print("interrupted")
assert square() == 140
assert compiled_in and threading.main_thread() not in compiled_in  # an interrupt is raised in that one
"""


def compiling(tmp_path: Path, script: str) -> str:
    """Run a script with nothing compiled before, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILES + script],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@needs_numba
def test_a_fork_waits_for_what_another_thread_compiles(tmp_path: Path) -> None:
    """Else the child waits for locks of numba and LLVM that no thread of its own holds."""
    compiling(tmp_path, FORKS)


@needs_numba
def test_an_interrupt_while_loops_are_compiled_is_an_interrupt(tmp_path: Path) -> None:
    """Not an error of the compiler, and they are compiled all the same."""
    assert compiling(tmp_path, INTERRUPTED) == "interrupted\n"


def test_a_line_says_why_a_first_call_takes_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_loading, "_PATIENCE", 0.001)
    _loading._say_once.cache_clear()
    for _ in range(2):
        call_uninterrupted(time.sleep, 0.05)
    assert len(caplog.messages) == 1
    assert "compiling loops for this processor" in caplog.text


def test_results_of_uninterrupted_calls_come_back() -> None:
    """Its result or its error, whatever the thread; in this one if it holds what the other might wait for."""
    assert call_uninterrupted(threading.current_thread) is not threading.current_thread()
    with LOADING:
        assert call_uninterrupted(threading.current_thread) is threading.current_thread()
    with pytest.raises(ZeroDivisionError):
        call_uninterrupted(divmod, 1, 0)

    def threads() -> tuple[threading.Thread, threading.Thread]:
        return threading.current_thread(), call_uninterrupted(threading.current_thread)

    for thread, done in at_once(threads, threads):
        assert thread is done
