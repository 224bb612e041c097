"""The thin layer between launches and CuPy, with a stand-in for CuPy whose kernels the emulation executes."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import cuda_emulation
import ml_dtypes
import numpy as np
import pytest
import subgen_cupy
from subgen_cupy import _cupy, _merging, _torch
from subgen_cupy._launch import Launch, Module

from subgen import backends
from subgen._array import FloatInfo, finfo, is_floating, itemsize
from subgen.backends import PORTABLE
from subgen.merging import Means

pytestmark = pytest.mark.skipif(cuda_emulation.compiler() is None, reason="g++ is not installed")


class DeviceArray(np.ndarray):
    """What the layer asks of a CuPy array: a pointer and a device."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(ptr=self.ctypes.data)

    @property
    def device(self) -> Any:
        return types.SimpleNamespace(id=1)


def on_device(x: Any) -> Any:
    return np.array(x).view(DeviceArray)


class CompileError(Exception):
    """CuPy's."""


class RawModule:
    """Compiles with g++ what CuPy would hand to the driver."""

    made = 0

    def __init__(self, code: str, options: tuple[str, ...]) -> None:
        assert options == ("--std=c++17",)
        type(self).made += 1
        self.code = code

    def get_function(self, name: str) -> Any:
        if "no such type" in self.code:
            raise CompileError("identifier is undefined")
        kernel = getattr(cuda_emulation.library(self.code), f"emulated_{name}")
        kernel.restype = ctypes.c_char_p

        def launch(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...], shared_mem: int) -> None:
            # Whatever is no NumPy scalar CuPy passes in 8 bytes.
            assert all(isinstance(argument, np.generic) for argument in arguments)
            assert 0 < grid[0] < 1 << 31
            assert 0 < block[0] <= 1024
            assert shared_mem <= 48 << 10
            cells = [np.array(argument).reshape(1) for argument in arguments]
            pointers = (ctypes.c_void_p * len(cells))(*(cell.ctypes.data for cell in cells))
            sizes = (ctypes.c_uint * len(cells))(*(cell.itemsize for cell in cells))
            dims = (ctypes.c_uint * 7)(*grid, 1, 1, *block, 1, 1, 1)
            count, seed = ctypes.c_uint(len(cells)), ctypes.c_uint64(1)
            error = kernel(dims, ctypes.c_size_t(shared_mem), pointers, sizes, count, seed, ctypes.c_int(-1))
            assert error is None, error

        return launch


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in for CuPy; on its device 1."""
    module = types.ModuleType("cupy")
    entered: list[int] = []

    @contextlib.contextmanager
    def current(number: int) -> Iterator[None]:
        entered.append(number)
        yield

    def device(number: int) -> Any:
        context = current(number)
        return type("D", (), {
            "attributes": {"MultiProcessorCount": 4},
            "compute_capability": "75",
            "__enter__": lambda _: context.__enter__(),
            "__exit__": lambda _, *error: context.__exit__(*error),
        })()  # fmt: skip

    module.__dict__.update(
        empty=lambda shape, dtype: on_device(np.empty(shape, dtype)),
        ascontiguousarray=lambda x: on_device(np.ascontiguousarray(x)),
        RawModule=RawModule,
        ndarray=type("ndarray", (), {}),  # array_api_compat asks whether others are of it
        entered=entered,
        cuda=types.SimpleNamespace(Device=device, compiler=types.SimpleNamespace(CompileException=CompileError)),
        # Nothing of linear algebra: CuPy refuses cuBLAS while a graph is recorded.
        broadcast_arrays=lambda *x: np.broadcast_arrays(*x, subok=True),
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    caches = (_cupy._function, _cupy._module, _cupy.multiprocessors_of, _cupy.has_clusters, _cupy.stream_at)
    for cached in caches:
        cached.cache_clear()
    yield module
    for cached in caches:
        cached.cache_clear()


def test_the_operations_of_the_backend_give_what_the_portable_ones_give(cupy: Any) -> None:
    operations = subgen_cupy.BACKEND.operations
    rng = np.random.default_rng(0)
    key, counters = rng.integers(0, 1 << 32, size=(2, 3, 1)), rng.integers(0, 1 << 32, size=(2, 1, 5))
    words = operations["threefry2x32"](*map(on_device, (*key, *counters)))
    for mine, portable in zip(words, PORTABLE["threefry2x32"](*key, *counters), strict=True):
        np.testing.assert_array_equal(mine, portable)

    keys, centres = (rng.integers(-4, 5, size=(2, n, 3)).astype(np.float32) for n in (20, 8))
    clusters = np.array([0, 5])
    got = operations["assign_leaders"](*map(on_device, (keys, centres, clusters)), 2.0)
    for mine, portable in zip(got, PORTABLE["assign_leaders"](keys, centres, clusters, 2.0), strict=True):
        np.testing.assert_array_equal(mine, portable)

    for rows in (3, 40):  # kernels, and matrix products
        queries, keys, values = (rng.normal(size=(2, n, 64)).astype(np.float32) for n in (rows, 9, 9))
        weights = np.zeros((1, 1, 9), dtype=np.float32)
        expected = PORTABLE["weighted_attention"](queries, keys, values, weights)
        put = on_device if rows == 3 else np.array
        got = operations["weighted_attention"](*map(put, (queries, keys, values, weights)))
        for mine, portable in zip(got, expected, strict=True):
            np.testing.assert_allclose(mine, portable, rtol=1e-5, atol=1e-5)

    x = on_device(np.zeros((2, 6, 3)))
    assert operations["write"](x, 2, on_device(np.ones((2, 3, 3)))) is x
    np.testing.assert_array_equal(x, PORTABLE["write"](np.zeros((2, 6, 3)), 2, np.ones((2, 3, 3))))
    assert set(cupy.entered) == {1}


def test_modules_are_compiled_once(cupy: Any) -> None:
    x = on_device(np.arange(5))
    before = RawModule.made
    for _ in range(3):
        subgen_cupy.BACKEND.operations["threefry2x32"](x, x, x, x)
    assert RawModule.made == before + 1


def test_views_are_packed(cupy: Any) -> None:
    wide = on_device(np.arange(24, dtype=np.float32).reshape(4, 6))
    device = _cupy.device_of(wide)
    for view in (wide, wide[:, 1:], wide.T, wide.ravel()[1:9]):
        packed = device.packed(view)
        assert packed.flags.c_contiguous
        assert device.pointer(packed) % 16 == 0
        np.testing.assert_array_equal(packed, view)
    assert device.packed(wide, "float16").dtype == np.float16


@pytest.mark.usefixtures("cupy")
@pytest.mark.parametrize(("causal", "rows", "dim", "clusters", "kernel"), [
    (0, 4, 64, 5, True),
    (1, 4, 64, 5, True),
    (0, 4, 64, 0, True),
    (2, 4, 64, 5, False),
    (0, 40, 64, 5, False),
    (1, 2, 600, 5, False),
])  # fmt: skip
def test_the_kernel_attends_where_every_row_sees_every_pair(
    causal: int, rows: int, dim: int, clusters: int, kernel: bool
) -> None:
    rng = np.random.default_rng(2)
    queries, keys, values = (
        rng.normal(size=(2, n, dim)).astype(np.float32) for n in (rows, clusters + 9, clusters + 9)
    )
    counts = rng.integers(0, 4, size=(2, clusters)).astype(np.int64)
    spread = rng.random((2, clusters, 4)).astype(np.float32)
    arrays, calls = (queries, keys, values, counts, spread), []

    def weighted(*args: Any) -> Any:
        calls.append(1)
        return PORTABLE["weighted_attention"](*args)

    got = subgen_cupy.BACKEND.operations["sketch_attention"](
        *map(on_device if kernel else np.array, arrays), causal, weighted
    )
    expected = PORTABLE["sketch_attention"](*arrays, causal)
    assert bool(calls) != kernel
    for mine, portable in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, portable, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("cupy")
@pytest.mark.parametrize("remember", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_merging_by_kernels_and_in_float64_by_the_portable_code(dtype: str, remember: bool) -> None:
    rng = np.random.default_rng(1)
    half = rng.integers(-3, 4, size=(1, 16, 8))
    keys = np.concatenate([half, -half], axis=1).astype(dtype)
    zero, counts = np.zeros((1, 32, 4), dtype=dtype), np.ones((1, 32), dtype=np.int64)
    means = Means(keys, np.zeros_like(keys), counts, zero, np.ones((1, 32), dtype=dtype), keys.astype(np.float16))
    if remember:  # another, but for the last, which are new and as many as twice those that go
        nearest = (np.arange(32) * 5 + 4) % 9
        nearest[8:] = -1
        means = replace(means, nearest=nearest[None].astype(np.int32))
    scale = np.ones(1, dtype=dtype)
    before, operation = RawModule.made, subgen_cupy.BACKEND.operations["merge_closest"]
    put = on_device if dtype == "float32" else np.array
    given = means.each(put)
    got, moved = operation(given, None, put(scale), 20, 20)
    assert RawModule.made == before + 2 * (dtype == "float32")
    expected, expected_moved = PORTABLE["merge_closest"](means, None, scale, 20, 20)
    for mine, portable in [
        (moved, expected_moved),
        (got.counts, expected.counts),
        (got.leaders, expected.leaders),
        (got.keys, expected.keys),
    ]:
        assert mine.dtype == portable.dtype
        np.testing.assert_array_equal(mine, portable)
    assert (got.nearest is None) == (expected.nearest is None) == (not remember)
    if remember:
        assert got.nearest.dtype == np.int32
        np.testing.assert_array_equal(got.nearest, expected.nearest)
    for mine, before in zip(given.arrays(), means.arrays(), strict=True):
        np.testing.assert_array_equal(mine, before)  # nothing was written into


@pytest.mark.usefixtures("cupy")
def test_streams_whose_costs_are_too_many_merge_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    half = rng.integers(-3, 4, size=(3, 16, 8)).astype(np.float32)
    keys = np.concatenate([half, -half], axis=1)
    ones = np.ones((3, 32), dtype=np.float32)
    means = Means(keys, np.zeros_like(keys), ones.astype(np.int32), np.zeros((3, 32, 4), np.float32), ones)
    metric = np.stack([np.eye(8, dtype=np.float32) * s for s in (1, 2, 4)])
    given = means.each(on_device), on_device(metric), on_device(np.float32([1, 2, 1])), 20, 20
    together, moved = subgen_cupy.BACKEND.operations["merge_closest"](*given)
    monkeypatch.setattr(_merging, "_COSTS_AT_ONCE", 2 * 128 * 128)  # two streams, rounded up to whole tiles
    assert _merging.parts(3, 32) == [slice(0, 2), slice(2, 3)]
    in_turns, moved_in_turns = subgen_cupy.BACKEND.operations["merge_closest"](*given)
    np.testing.assert_array_equal(moved_in_turns, moved)
    for name in ("keys", "values", "counts", "spread", "importance"):
        np.testing.assert_array_equal(getattr(in_turns, name), getattr(together, name), err_msg=name)


@pytest.mark.usefixtures("cupy")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("remember", [False, True])
def test_tokens_are_collected_by_kernels_and_in_float64_by_the_portable_code(dtype: str, remember: bool) -> None:
    rng = np.random.default_rng(3)
    keys, values = rng.normal(size=(2, 1, 12, 8)).astype(dtype)
    held = Means(*(rng.normal(size=(2, 1, 5, 8)).astype(dtype)), np.ones((1, 5), np.int64), *(
        np.ones(shape, dtype) for shape in ((1, 5, 4), (1, 5))
    ))  # fmt: skip
    if remember:
        held = replace(held, nearest=np.array([[1, -1, 4, 0, 2]], np.int32))
    before, operation = RawModule.made, subgen_cupy.BACKEND.operations["collect"]
    put = on_device if dtype == "float32" else np.array
    pool, scale = operation(held.each(put), put(keys), put(values), 6, 0.5)
    assert RawModule.made == before + (dtype == "float32")
    expected, expected_scale = PORTABLE["collect"](held, keys, values, 6, 0.5)
    np.testing.assert_allclose(scale, expected_scale, rtol=1e-5)
    for mine, portable in zip(pool.arrays(), expected.arrays(), strict=True):
        assert (mine is None) == (portable is None)
        if mine is not None:
            assert mine.dtype == portable.dtype
            np.testing.assert_allclose(mine, portable, rtol=2e-4)


@pytest.mark.parametrize("release", [13, 14])
def test_tensors_of_torch_are_computed_on_by_the_same_kernels_on_torchs_stream(
    cupy: Any, monkeypatch: pytest.MonkeyPatch, release: int
) -> None:
    torch = pytest.importorskip("torch")
    streams: list[tuple[int, ...]] = []

    class Stream:
        def __init__(self, *which: int) -> None:
            self.which = which

        def __enter__(self) -> None:
            streams.append(self.which)

        def __exit__(self, *error: object) -> None:
            pass

    # CuPy 13 knows streams of others by their address, CuPy 14 by the protocol of CUDA streams.
    cupy.cuda.ExternalStream = Stream if release == 13 else None
    cupy.cuda.Stream = types.SimpleNamespace()
    if release == 14:
        cupy.cuda.Stream.from_external = lambda foreign: Stream(*foreign.__cuda_stream__())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda number: types.SimpleNamespace(cuda_stream=7 + number))
    device = _torch.TorchDevice(1)
    assert device.multiprocessors == 4
    monkeypatch.setattr(_torch.TorchDevice, "where", "cpu")
    monkeypatch.setattr(_torch, "on_cuda", lambda x: True)
    monkeypatch.setattr(_torch, "device_of", lambda x: device)
    operations = subgen_cupy.torch_backend().operations
    rng = np.random.default_rng(4)
    words = [torch.from_numpy(x) for x in (*rng.integers(0, 1 << 32, (2, 3, 1)), *rng.integers(0, 1 << 32, (2, 1, 5)))]
    for mine, portable in zip(operations["threefry2x32"](*words), PORTABLE["threefry2x32"](*words), strict=True):
        assert torch.equal(mine, portable)
    x = torch.from_numpy(rng.normal(size=(2, 9, 37)).astype(np.float32)).requires_grad_()
    got, expected = operations["quantize"](x, x.dtype), PORTABLE["quantize"](x.detach(), x.dtype)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.scales, expected.scales)
    assert streams == [(8, 1) if release == 13 else (0, 8)] * 2
    assert set(cupy.entered) == {1}
    # Where no kernel serves, torch's own backend does; and what is on a CPU it serves as before.
    wide = x.double().detach()
    assert torch.equal(operations["quantize"](wide, wide.dtype).codes, PORTABLE["quantize"](wide, wide.dtype).codes)
    monkeypatch.setattr(_torch, "on_cuda", lambda x: False)
    assert torch.equal(operations["quantize"](x, x.dtype).codes, expected.codes)
    own = backends.get("torch").operations
    assert operations["write"] is own["write"]
    assert operations["absorb"] is own["absorb"]
    assert len(streams) == 2


def test_cuda_tensors_are_served_by_kernels_where_there_is_cupy(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    import subgen_torch
    from subgen_torch._kernels import with_kernels

    own = subgen_torch.OWN
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert with_kernels(own) is own
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm
    assert with_kernels(own) is own
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    chosen = with_kernels(own).operations
    assert chosen["decode"] is not own.operations["decode"]
    assert chosen["absorb_blocks"].__doc__ == subgen_cupy.BACKEND.operations["absorb_blocks"].__doc__
    assert chosen["write"] is own.operations["write"]
    x = torch.zeros(1, 2, 8)  # on a CPU nothing changes
    assert torch.equal(chosen["quantize"](x, x.dtype).codes, own.operations["quantize"](x, x.dtype).codes)


def test_a_cupy_that_does_not_import_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    import subgen_torch
    from subgen_torch._kernels import with_kernels

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.warns(RuntimeWarning, match="CuPy is installed but does not import"):
        assert with_kernels(subgen_torch.OWN) is subgen_torch.OWN


def test_launches_aside_are_a_branch_of_the_graph(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each kernel, those it waits for: by the events that the streams record and wait for."""
    waits: dict[str, frozenset[str]] = {}
    current, replayed = [], []

    class Stream:
        def __init__(self, non_blocking: bool) -> None:
            assert non_blocking
            self.behind: frozenset[str] = frozenset()

        def __enter__(self) -> Any:
            current.append(self)
            return self

        def __exit__(self, *error: object) -> None:
            current.pop()

        def begin_capture(self) -> None:
            pass

        def record(self) -> frozenset[str]:
            return self.behind

        def wait_event(self, event: frozenset[str]) -> None:
            self.behind |= event

        def end_capture(self) -> Any:
            assert self.behind == set(waits)  # nothing is left on its own
            return types.SimpleNamespace(launch=lambda: replayed.append(len(current)))

    def launch_on(device: int, launch: Launch) -> None:
        assert device == 1
        waits[launch.kernel] = current[-1].behind
        current[-1].behind |= {launch.kernel}

    cupy.cuda.Stream = Stream
    monkeypatch.setattr(_cupy, "launch_on", launch_on)
    module = Module("threefry.cu")

    def launch(kernel: str, **which: bool) -> Launch:
        return Launch(module, kernel, 1, 1, [], **which)

    launches = [launch("first"), launch("metric", aside=True), launch("second"), launch("third", joins=True)]
    replay = _cupy.CupyDevice(1).replayed([*launches, launch("fourth", joins=True), launch("last", aside=True)])
    assert waits == {
        "first": set(),
        "metric": {"first"},
        "second": {"first"},
        "third": {"first", "second", "metric"},
        "fourth": {"first", "second", "metric", "third"},
        "last": {"first", "second", "metric", "third", "fourth"},
    }
    replay()
    replay()
    assert replayed == [0, 0]  # on whatever stream is current


def test_views_of_tensors_are_packed() -> None:
    torch = pytest.importorskip("torch")
    device, wide = _torch.TorchDevice(0), torch.arange(24, dtype=torch.float32).reshape(4, 6)
    assert device.packed(wide) is wide
    for view in (wide, wide[:, 1:], wide.T, wide.ravel()[1:9]):
        packed = device.packed(view)
        assert packed.is_contiguous()
        assert device.pointer(packed) % 16 == 0
        assert torch.equal(packed, view)
    assert device.packed(wide, "bfloat16").dtype == torch.bfloat16
    buffer = torch.zeros(3, 20, 8, dtype=torch.float16)
    for view, copied in ((buffer, False), (buffer[:, :7], False), (buffer[1:, :7], False), (buffer[..., :4], True)):
        x, step = device.streams(view)
        assert (device.pointer(x) != device.pointer(view)) == copied
        assert step == (20 * 4 if copied else 20 * 8)


@pytest.mark.usefixtures("cupy")
def test_a_kernel_that_does_not_compile_says_which_and_with_what() -> None:
    module = Module("threefry.cu", types=(("ELEMENT", "no such type"),))
    with pytest.raises(_cupy.KernelError, match=r"threefry.cu does not compile for device 1 .*no such type"):
        _cupy._function(1, module, "threefry2x32")


def test_bfloat16_is_a_floating_dtype_of_cupy_though_cupy_refuses_to_say_so() -> None:
    def refuses(*_: object) -> None:
        raise TypeError("dtype argument must be a NumPy dtype")

    cupy, numpy = (types.ModuleType(name) for name in ("cupy", "numpy"))
    for module in (cupy, numpy):
        module.isdtype = module.finfo = refuses  # type: ignore[attr-defined]
    dtype = np.dtype(ml_dtypes.bfloat16)
    assert is_floating(dtype, cupy)
    assert not is_floating(dtype, numpy)
    known, info = ml_dtypes.finfo(dtype), finfo(dtype, cupy)
    assert info == FloatInfo(known.bits, float(known.eps), float(known.max), float(known.smallest_normal))
    assert itemsize(dtype, cupy) == 2
