"""The CuPy backend on a GPU, as the library uses it. The other tests here run the kernels one by one."""

from __future__ import annotations

from typing import Any

import cuda_targets
import numpy as np
import pytest
from cuda_cases import cached_neighbours, make_clusters, make_state, random_vectors, written
from cuda_targets import DTYPES, Target
from cuda_variants import VARIANTS
from subgen_cupy import BACKEND, capture
from subgen_cupy.device_cupy import CupyDevice, _function
from subgen_cupy.merging import shrink

import subgen
from subgen import backends
from subgen._tree import leaves
from subgen.default.state import Quantized
from subgen.softmax import weighted_attention

pytestmark = pytest.mark.gpu


@pytest.fixture
def target() -> Target:
    return cuda_targets.gpu()


def test_every_kernel_compiles_with_the_compiler_of_the_driver(target: Target) -> None:
    for module, kernels in VARIANTS.values():
        for kernel in kernels:
            assert _function(0, module, kernel).num_regs > 0
            assert _function(0, module, kernel).local_size_bytes == 0


def test_the_paper_sketch_keeps_what_it_keeps_on_numpy(target: Target) -> None:
    assert backends.get("cupy") is BACKEND
    rng = np.random.default_rng(0)
    keys = rng.integers(-5, 6, size=(3, 300, 2)).astype(np.float32)
    values = rng.integers(-2, 3, size=(3, 300, 4)).astype(np.float32)
    queries = rng.normal(size=(3, 300, 2)).astype(np.float32) / 4
    results = []
    for put, get in ((np.asarray, np.asarray), (target.put, target.get)):
        sketch = subgen.AttentionSketch.paper(delta=2.0, samples_per_cluster=3, value_samples=9)
        outputs = sketch.step(*map(put, (queries, keys, values)))
        state: Any = sketch.state
        results.append([get(x) for x in (outputs, state.clusters.samples, state.clusters.counts, state.reservoir.keys)])
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    for mine, numpys in zip(results[1][1:], results[0][1:], strict=True):
        np.testing.assert_array_equal(mine, numpys)


def test_a_decoding_step_is_captured_in_a_graph_and_replayed_on_new_input(target: Target) -> None:
    import cupy

    rng = np.random.default_rng(2)
    means, exact = ([random_vectors(rng, "bfloat16", 4, n, 128) for _ in range(2)] for n in (90, 60))
    variance = abs(random_vectors(rng, "bfloat16", 4, 90, 4))
    clusters = make_clusters(*means, np.full((4, 90), 3, np.int64), variance)
    codes = Quantized(np.zeros((4, 60, 128), np.int8), np.zeros((4, 60), np.float32))
    state = target.put(make_state(clusters, *exact, codes, 50, 320))
    queries = target.put(random_vectors(rng, "float32", 4, 4, 128))
    attend = BACKEND.operations["attend"]
    replay, result = capture(lambda: attend(state, queries))
    for _ in range(3):
        queries[...] = target.put(random_vectors(rng, "float32", 4, 4, 128))
        replay()
        cupy.cuda.Device().synchronize()
        for mine, eager in zip(result, attend(state, queries, 1), strict=True):
            np.testing.assert_array_equal(target.get(mine), target.get(eager))


@pytest.mark.parametrize("storage", ["input", "int8"])
def test_a_token_needs_no_host_synchronisation(target: Target, storage: Any) -> None:
    import cupy

    queries, keys, values = (cupy.random.standard_normal((heads, 300, 64), dtype=cupy.float32) for heads in (8, 2, 2))
    sketch = subgen.AttentionSketch(max_clusters=64, window=64, storage=storage, check_finite=False)
    half = [x.astype(cupy.float16) for x in (queries, keys, values)]
    sketch.update(half[1][:, :260], half[2][:, :260], queries=half[0][:, :260])
    token = [x[:, 260:261] for x in half]
    # To wait for the device while a graph is recorded is an error; two tokens, with space for both.
    replay, _ = capture(lambda: sketch.step(*token))
    replay()
    cupy.cuda.Device().synchronize()
    assert sketch.n_seen == 262


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("left", [1024, 500])
def test_merging_needs_no_host_synchronisation(target: Target, left: int, cached: bool) -> None:
    import cupy

    rng = np.random.default_rng(3)
    keys, values = rng.normal(size=(2, 2, 1536, 128)).astype(np.float32)
    counts, importance = rng.integers(1, 10, size=(2, 1536)), rng.random((2, 1536), dtype=np.float32)
    variance, leaders = rng.random((2, 1536, 4), dtype=np.float32), keys.astype(np.float16)
    nearest = None
    if cached:
        nearest = (np.arange(1536, dtype=np.int32) + rng.integers(1, 500, size=(2, 1536)).astype(np.int32)) % 500
        nearest[:, 500:] = -1  # so many are new that 512 can merge without those that cache a neighbour
    more = {"importance": importance, "leaders": leaders, "nearest": nearest}
    clusters = target.put(make_clusters(keys, values, counts, variance, **more))
    scale = target.put(np.ones(2, np.float32))
    metric = target.put(np.tile(np.eye(128, dtype=np.float32), (2, 1, 1)))
    # To wait for the device while a graph is recorded is an error.
    replay, result = capture(lambda: BACKEND.operations["merge_closest"](clusters, metric, scale, left, left))
    replay()
    cupy.cuda.Device().synchronize()
    merged, assignment = target.get(result)
    assert (merged.counts > 0).sum(axis=1).tolist() == [left, left]
    members = np.zeros((2, left), dtype=np.int64)
    for s in range(2):
        np.add.at(members[s], assignment[s], counts[s])
    np.testing.assert_array_equal(merged.counts, members)
    if not cached:
        assert merged.nearest is None
        return
    # Cached neighbours are data: a replay that is to compare all clusters finds -1 there.
    clusters.nearest.fill(-1)
    replay()
    cupy.cuda.Device().synchronize()
    eager = BACKEND.operations["merge_closest"](clusters, metric, scale, left, left)
    assert_same(target, result, eager)
    if left == 1024:
        assert (target.get(eager[1]) != assignment).any()


def assert_same(target: Target, mine: Any, theirs: Any) -> None:
    """Compare merged clusters and assignments to the last bit."""
    assert dict(leaves(mine[0])).keys() == dict(leaves(theirs[0])).keys()
    for (name, x), (_, y) in zip(leaves(mine[0]), leaves(theirs[0]), strict=True):
        np.testing.assert_array_equal(target.get(x), target.get(y), err_msg=name)
    np.testing.assert_array_equal(target.get(mine[1]), target.get(theirs[1]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("with_queries", [False, True])
@pytest.mark.parametrize("storage", ["input", "int8"])
# In the second block, which is recorded: only new clusters are compared with all, or all are, as every eighth time.
@pytest.mark.parametrize("before", [300, 268])
def test_a_block_is_absorbed_without_host_synchronisation(
    target: Target, dtype: str, with_queries: bool, storage: Any, before: int
) -> None:
    import cupy

    rng = np.random.default_rng(5)
    queries, keys, values = (target.put(rng.normal(size=(heads, 300, 64)).astype(DTYPES[dtype])) for heads in (8, 2, 2))
    sketch = subgen.AttentionSketch(max_clusters=64, window=64, storage=storage, check_finite=False)
    sketch.update(keys[:, :before], values[:, :before], queries=queries[:, :before] if with_queries else None)
    block = queries[:, :32] if with_queries else None
    # To wait for the device while a graph is recorded is an error; each time half a window leaves.
    replay, _ = capture(lambda: sketch.update(keys[:, :32], values[:, :32], queries=block))
    replay()
    cupy.cuda.Device().synchronize()
    state: Any = sketch.state
    assert sketch.n_seen == before + 64
    assert target.get(state.clusters.counts).sum(axis=1).tolist() == [before + 64 - state.exact.n] * 2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_long_streams_are_answered_as_well_as_on_numpy(target: Target, dtype: str) -> None:
    rng = np.random.default_rng(1)
    keys, values = rng.normal(size=(2, 4, 600, 64)).astype(DTYPES[dtype])
    queries = rng.normal(size=(8, 600, 64)).astype(DTYPES[dtype])
    exact = subgen.attention(*(x.astype(np.float32) for x in (queries[:, -4:], keys, values)))
    errors = []
    # NumPy computes with no bfloat16.
    for put, get in (
        (lambda x: x.astype(np.float32) if dtype == "bfloat16" else x, np.asarray),
        (target.put, target.get),
    ):
        sketch = subgen.AttentionSketch(max_clusters=64, window=32, sink=2)
        sketch.update(*map(put, (keys, values)), queries=put(queries))
        outputs = get(sketch.attend(put(queries[:, -4:])))
        errors.append(np.linalg.norm(outputs.astype(np.float32) - exact) / np.linalg.norm(exact))
    assert errors[1] < 1.1 * errors[0]


def test_a_long_block_is_replayed_and_waits_for_nothing(target: Target) -> None:
    rng = np.random.default_rng(6)
    queries, keys, values = (target.put(rng.normal(size=(heads, 1500, 64)).astype(np.float16)) for heads in (8, 2, 2))
    states: list[Any] = []
    for size in (1500, 30):
        sketch = subgen.AttentionSketch(max_clusters=64, window=64, check_finite=False)
        for i in range(0, 1500, size):
            q, k, v = (x[:, i : i + size] for x in (queries, keys, values))
            sketch.update(k, v, queries=q)
        states.append(sketch.state)
    whole, pieces = map(written, states)
    assert whole.keys() == pieces.keys()
    for name, x in pieces.items():
        np.testing.assert_array_equal(target.get(whole[name]), target.get(x), err_msg=name)


@pytest.mark.parametrize("new", [None, 1.0, 0.5, 0.1])
@pytest.mark.parametrize(("n", "left"), [(1280, 1024), (2048, 1024), (700, 699)])
def test_blocks_that_match_a_stream_together_decide_as_one_does(
    target: Target, n: int, left: int, new: float | None
) -> None:
    if not target.device.clusters:
        pytest.skip("this device has no clusters of blocks")

    class WithoutClusters(CupyDevice):
        clusters = False  # type: ignore[assignment]

    rng = np.random.default_rng(7)
    keys, values = rng.normal(size=(2, 3, n, 64)).astype(np.float32)
    counts, importance = (rng.random((3, n)) < 0.95).astype(np.int64), rng.random((3, n), dtype=np.float32) ** 4
    nearest = None if new is None else cached_neighbours(rng, counts, new)
    variance = np.zeros((3, n, 4), np.float32)
    clusters = target.put(make_clusters(keys, values, counts, variance, importance=importance, nearest=nearest))
    scale = target.put(np.ones(3, np.float32))
    together, alone = (shrink(d, clusters, None, scale, left, left) for d in (target.device, WithoutClusters(0)))
    assert_same(target, together, alone)


def test_the_kernels_are_the_default_for_tensors_of_torch(target: Target) -> None:
    torch = cuda_targets.gpu_for_torch() and pytest.importorskip("torch")
    import subgen_torch

    assert backends.get("torch") is subgen_torch.BACKEND
    assert subgen_torch.BACKEND is not subgen_torch.WITHOUT_CUPY
    x = torch.randn(2, 400, 64, device="cuda", dtype=torch.bfloat16)
    sketch = subgen.AttentionSketch(max_clusters=64, window=64)
    sketch.update(x, x, queries=x)
    assert sketch.attend(x[:, -1:]).isfinite().all()


def test_rows_too_many_or_too_wide_go_to_matrix_products(target: Target) -> None:
    rng = np.random.default_rng(4)
    for rows, dim, dtype in [(40, 64, "float32"), (2, 600, "float32"), (2, 64, "float64")]:
        queries, keys, values = (rng.normal(size=(2, n, dim)).astype(dtype) for n in (rows, 30, 30))
        weights = np.zeros((1, 1, 30), dtype=dtype)
        given = [target.put(x) for x in (queries, keys, values, weights)]
        assert BACKEND.operations["weighted_attention"](*given) is NotImplemented
        got = weighted_attention(*given)
        expected = backends.PORTABLE["weighted_attention"](queries, keys, values, weights)
        for mine, portable in zip(got, expected, strict=True):
            np.testing.assert_allclose(target.get(mine), portable, rtol=1e-4, atol=1e-4)
