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
from cuda_cases import absorb_options, make_clusters, make_state, upcast, written
from cuda_targets import using_portable
from subgen_cupy import device_cupy, device_torch
from subgen_cupy.launch import Launch, Module

from subgen import backends
from subgen._array import FloatInfo, finfo, is_floating, itemsize
from subgen._tree import leaves, tree_map
from subgen.backends import PORTABLE
from subgen.default.state import Clusters, Quantized, State

OPERATIONS = subgen_cupy.BACKEND.operations

pytestmark = pytest.mark.skipif(cuda_emulation.compiler() is None, reason="g++ is not installed")


class DeviceArray(np.ndarray):
    """An array with the attributes of CuPy's that the package uses: a pointer and a device."""

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
    """Compiles with g++ the source that CuPy would compile for the device."""

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
        reshape=lambda x, shape: on_device(np.reshape(x, shape)),
        ascontiguousarray=lambda x: on_device(np.ascontiguousarray(x)),
        RawModule=RawModule,
        ndarray=type("ndarray", (), {}),  # array_api_compat asks whether others are of it
        entered=entered,
        cuda=types.SimpleNamespace(Device=device, compiler=types.SimpleNamespace(CompileException=CompileError)),
        # Nothing of linear algebra: CuPy refuses cuBLAS while a graph is recorded.
        broadcast_arrays=lambda *x: np.broadcast_arrays(*x, subok=True),
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    names = ("_function", "_module", "multiprocessors_of", "has_clusters", "stream_at")
    caches = [getattr(device_cupy, name) for name in names]
    for cached in caches:
        cached.cache_clear()
    yield module
    for cached in caches:
        cached.cache_clear()


def state_case(
    rng: np.random.Generator,
    n_clusters: int,
    *,
    n: int = 14,
    free: int = 4,
    dim: int = 8,
    dtype: str = "float32",
    nearest: Any = None,
) -> State:
    """Make a state of two streams: 2 sinks, a window, and free space behind the exact tokens."""
    means, exact = rng.normal(size=(2, 2, n_clusters, dim)), rng.normal(size=(2, 2, n + free, dim))
    variance = rng.random((2, n_clusters, 4))
    counts = rng.integers(1 if nearest is not None else 0, 4, size=(2, n_clusters))
    arrays = (x.astype(dtype) for x in (*means, variance, np.ones((2, n_clusters))))
    keys, values, variance, importance = arrays
    clusters = make_clusters(keys, values, counts, variance, importance=importance, nearest=nearest)
    codes = rng.integers(-127, 128, size=(2, n + free, dim)).astype(np.int8)
    queries = Quantized(codes, rng.random((2, n + free)).astype("float64" if dtype == "float64" else "float32"))
    return make_state(clusters, *exact.astype(dtype), queries, n, 100)


def test_the_operations_of_the_backend_give_what_the_portable_ones_give(cupy: Any) -> None:
    rng = np.random.default_rng(0)
    keys, centres = (rng.integers(-4, 5, size=(2, n, 3)).astype(np.float32) for n in (20, 8))
    clusters = np.array([0, 5])
    got = OPERATIONS["assign_leaders"](*map(on_device, (keys, centres, clusters)), 2.0)
    for mine, portable in zip(got, PORTABLE["assign_leaders"](keys, centres, clusters, 2.0), strict=True):
        np.testing.assert_array_equal(mine, portable)

    for rows in (3, 40):  # kernels, and matrix products
        queries, keys, values = (rng.normal(size=(2, n, 64)).astype(np.float32) for n in (rows, 9, 9))
        weights = np.zeros((1, 1, 9), dtype=np.float32)
        got = OPERATIONS["weighted_attention"](*map(on_device, (queries, keys, values, weights)))
        assert (got is NotImplemented) == (rows == 40)
        if rows == 3:
            expected = PORTABLE["weighted_attention"](queries, keys, values, weights)
            for mine, portable in zip(got, expected, strict=True):
                np.testing.assert_allclose(mine, portable, rtol=1e-5, atol=1e-5)

    keys, values, rows = rng.normal(size=(3, 2, 3, 8)).astype(np.float32)
    codes = OPERATIONS["quantize_queries"](on_device(rows[:, None]), 0.3, 100, np.dtype("float32"))
    for queries in (codes, None):
        state = state_case(rng, 5)
        given = tree_map(on_device, state)
        after = OPERATIONS["append"](given, on_device(keys), on_device(values), queries)
        assert after.exact.keys is given.exact.keys  # in place
        expected = PORTABLE["append"](state, keys, values, None if queries is None else tree_map(np.asarray, queries))
        assert_equal(after, expected)
    assert_equal(codes, PORTABLE["quantize_queries"](rows[:, None], 0.3, 100, np.dtype("float32")))
    assert set(cupy.entered) == {1}


def assert_equal(mine: Any, portable: Any) -> None:
    """Compare the arrays of two trees to the last bit; of states, those that are written."""
    if isinstance(mine, State):
        assert (mine.n_seen, mine.exact.n) == (portable.n_seen, portable.exact.n)
        mine, portable = written(mine), written(portable)
    else:
        mine, portable = dict(leaves(mine)), dict(leaves(portable))
    assert mine.keys() == portable.keys()
    for name, x in portable.items():
        assert mine[name].dtype == x.dtype, name
        np.testing.assert_array_equal(mine[name], x, err_msg=name)


def test_modules_are_compiled_once(cupy: Any) -> None:
    x = on_device(np.ones((1, 1, 5, 8), np.float32))
    before = RawModule.made
    for n_seen in range(3):
        OPERATIONS["quantize_queries"](x, 1.0, n_seen, np.dtype("float32"))
    assert RawModule.made == before + 1


def test_views_are_packed(cupy: Any) -> None:
    wide = on_device(np.arange(24, dtype=np.float32).reshape(4, 6))
    device = device_cupy.device_of(wide)
    for view in (wide, wide[:, 1:], wide.T, wide.ravel()[1:9]):
        packed = device.packed(view)
        assert packed.flags.c_contiguous
        assert device.pointer(packed) % 16 == 0
        np.testing.assert_array_equal(packed, view)
    assert device.packed(wide, "float16").dtype == np.float16


@pytest.mark.usefixtures("cupy")
@pytest.mark.parametrize(("causal", "rows", "dim", "n_clusters", "kernel"), [
    (0, 4, 64, 5, True),
    (1, 4, 64, 5, True),
    (0, 4, 64, 0, True),
    (2, 4, 64, 5, False),
    (0, 40, 64, 5, False),
    (1, 2, 600, 5, False),
])  # fmt: skip
def test_the_kernel_attends_where_every_row_sees_every_token(
    causal: int, rows: int, dim: int, n_clusters: int, kernel: bool
) -> None:
    rng = np.random.default_rng(2)
    state = state_case(rng, n_clusters, dim=dim)
    queries = rng.normal(size=(2, rows, dim)).astype(np.float32) / 4
    got = OPERATIONS["attend"](tree_map(on_device, state), on_device(queries), causal)
    assert (got is not NotImplemented) == kernel
    if kernel:
        for mine, portable in zip(got, PORTABLE["attend"](state, queries, causal), strict=True):
            np.testing.assert_allclose(mine, portable, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("cupy")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_kernels_merge_in_float32_alone(dtype: str, cached: bool) -> None:
    rng = np.random.default_rng(1)
    half = rng.integers(-3, 4, size=(1, 16, 8))
    keys = np.concatenate([half, -half], axis=1).astype(dtype)
    zero, counts = np.zeros((1, 32, 4), dtype=dtype), np.ones((1, 32), dtype=np.int64)
    leaders = keys.astype(np.float16)
    clusters = Clusters(keys, np.zeros_like(keys), counts, zero, np.ones((1, 32), dtype=dtype), leaders)
    if cached:  # another, but for the last, which are new and as many as twice those that go
        nearest = (np.arange(32) * 5 + 4) % 9
        nearest[8:] = -1
        clusters = replace(clusters, nearest=nearest[None].astype(np.int32))
    scale = np.ones(1, dtype=dtype)
    before = RawModule.made
    given = tree_map(on_device, clusters)
    result = OPERATIONS["merge_closest"](given, None, on_device(scale), 20, 20)
    if dtype == "float64":  # the portable code follows
        assert result is NotImplemented
        assert RawModule.made == before
        return
    assert RawModule.made == before + 2
    got, assignment = result
    expected, expected_assignment = PORTABLE["merge_closest"](clusters, None, scale, 20, 20)
    assert assignment.dtype == expected_assignment.dtype
    np.testing.assert_array_equal(assignment, expected_assignment)
    assert_equal(got, expected)
    assert_equal(given, clusters)  # nothing was written into


@pytest.mark.usefixtures("cupy")
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("cached", [False, True])
def test_kernels_absorb_tokens_of_up_to_32_bits(dtype: str, cached: bool) -> None:
    rng = np.random.default_rng(3)
    nearest = np.array([[1, -1, 4, 0, 2]] * 2, np.int32) if cached else None
    state = state_case(rng, 5, free=0, dtype=dtype, nearest=nearest)
    options = absorb_options(6, 2, weight=0.5, max_clusters=8)
    before, given = RawModule.made, tree_map(on_device, state)
    got = OPERATIONS["absorb"](given, options)
    if dtype == "float64":  # the portable code follows
        assert got is NotImplemented
        assert RawModule.made == before
        return
    assert RawModule.made == before + 3  # absorb.cu, merge.cu, match.cu
    with using_portable():
        expected = PORTABLE["absorb"](state, options)
    mine, portable = upcast(written(got)), upcast(written(expected))
    assert (got.n_seen, got.exact.n) == (expected.n_seen, expected.exact.n) == (100, 8)
    assert mine.keys() == portable.keys()
    assert ("clusters.nearest" in mine) == cached
    for name, x in portable.items():
        assert getattr(mine[name], "dtype", None) == x.dtype, name
        # Of the importance: the fourth power of a sum in another order. In 16 bits the last may differ.
        np.testing.assert_allclose(mine[name], x, rtol=2e-3 if dtype == "float16" else 2e-4, err_msg=name)
    assert_equal(given, state)  # nothing was written into


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
    device = device_torch.TorchDevice(1)
    assert device.multiprocessors == 4
    monkeypatch.setattr(device_torch.TorchDevice, "where", "cpu")
    monkeypatch.setattr(device_torch, "on_cuda", lambda x: True)
    monkeypatch.setattr(device_torch, "device_of", lambda x: device)
    operations = subgen_cupy.torch_backend().operations
    rng = np.random.default_rng(4)
    keys, centres = (torch.from_numpy(rng.integers(-4, 5, size=(2, n, 3)).astype(np.float32)) for n in (20, 8))
    leaders = keys, centres, torch.tensor([0, 5]), 2.0
    for mine, portable in zip(
        operations["assign_leaders"](*leaders), PORTABLE["assign_leaders"](*leaders), strict=True
    ):
        assert torch.equal(mine, portable)
    streams.clear()  # as many as launches

    def quantized(x: Any, dtype: Any) -> Any:
        return operations["quantize_queries"](x, 0.3, 7, dtype)

    x = torch.from_numpy(rng.normal(size=(2, 3, 9, 37)).astype(np.float32)).requires_grad_()
    got, expected = quantized(x, x.dtype), PORTABLE["quantize_queries"](x.detach(), 0.3, 7, x.dtype)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(got.scales, expected.scales)
    assert streams == [(8, 1) if release == 13 else (0, 8)]
    assert set(cupy.entered) == {1}
    # Where no kernel serves, torch's own backend does; and tensors on a CPU it serves as before.
    wide = x.double().detach()
    portable = PORTABLE["quantize_queries"](wide, 0.3, 7, wide.dtype)
    assert torch.equal(quantized(wide, wide.dtype).codes, portable.codes)
    monkeypatch.setattr(device_torch, "on_cuda", lambda x: False)
    assert torch.equal(quantized(x, x.dtype).codes, expected.codes)
    assert operations["append"] is backends.get("torch").operations["append"]
    assert len(streams) == 1


def test_cuda_tensors_are_served_by_kernels_where_there_is_cupy(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    import subgen_torch
    from subgen_torch.backend import with_kernels

    own = subgen_torch.WITHOUT_CUPY
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert with_kernels(own) is own
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm
    assert with_kernels(own) is own
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    chosen = with_kernels(own).operations
    assert chosen["decode"] is not own.operations["decode"]
    assert chosen["absorb_blocks"].__doc__ == OPERATIONS["absorb_blocks"].__doc__
    assert chosen["append"] is own.operations["append"]
    x = torch.zeros(1, 1, 2, 8)  # on a CPU nothing changes
    mine, theirs = (each["quantize_queries"](x, 1.0, 0, x.dtype) for each in (chosen, own.operations))
    assert torch.equal(mine.codes, theirs.codes)


def test_a_cupy_that_does_not_import_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    import subgen_torch
    from subgen_torch.backend import with_kernels

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.warns(RuntimeWarning, match="CuPy is installed but does not import"):
        assert with_kernels(subgen_torch.WITHOUT_CUPY) is subgen_torch.WITHOUT_CUPY


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
    monkeypatch.setattr(device_cupy, "launch_on", launch_on)
    module = Module("leaders.cu")

    def launch(kernel: str, **which: bool) -> Launch:
        return Launch(module, kernel, 1, 1, [], **which)

    launches = [launch("first"), launch("metric", aside=True), launch("second"), launch("third", joins=True)]
    replay = device_cupy.CupyDevice(1).replayed([*launches, launch("fourth", joins=True), launch("last", aside=True)])
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
    device, wide = device_torch.TorchDevice(0), torch.arange(24, dtype=torch.float32).reshape(4, 6)
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
    module = Module("leaders.cu", types=(("ELEMENT", "no such type"),))
    with pytest.raises(device_cupy.KernelError, match=r"leaders.cu does not compile for device 1 .*no such type"):
        device_cupy._function(1, module, "open_leaders")


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
