"""The CuPy backend on a GPU, as the library uses it. Its kernels one by one: `test_cuda_kernels.py`."""

from __future__ import annotations

from typing import Any

import cuda_labs
import numpy as np
import pytest
from cuda_labs import DTYPES, Lab
from subgen_cupy import BACKEND, _merging, capture
from subgen_cupy._cupy import CupyDevice, _function
from test_cuda_compile import VARIANTS
from test_cuda_kernels import remembering

import subgen
from subgen import backends
from subgen.merging import Means

pytestmark = pytest.mark.gpu


@pytest.fixture
def lab() -> Lab:
    return cuda_labs.gpu()


def test_every_kernel_compiles_with_the_compiler_of_the_driver(lab: Lab) -> None:
    for module, kernels in VARIANTS.values():
        for kernel in kernels:
            assert _function(0, module, kernel).num_regs > 0
            assert _function(0, module, kernel).local_size_bytes == 0


def test_the_paper_sketch_keeps_what_it_keeps_on_numpy(lab: Lab) -> None:
    assert backends.get("cupy") is BACKEND
    rng = np.random.default_rng(0)
    keys = rng.integers(-5, 6, size=(3, 300, 2)).astype(np.float32)
    values = rng.integers(-2, 3, size=(3, 300, 4)).astype(np.float32)
    queries = rng.normal(size=(3, 300, 2)).astype(np.float32) / 4
    results = []
    for put, get in ((np.asarray, np.asarray), (lab.put, lab.get)):
        sketch = subgen.AttentionSketch.paper(delta=2.0, samples_per_cluster=3, value_samples=9)
        outputs = sketch.step(*map(put, (queries, keys, values)))
        state: Any = sketch.state
        results.append([get(x) for x in (outputs, state.clusters.samples, state.clusters.counts, state.reservoir.keys)])
    np.testing.assert_allclose(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    for mine, numpys in zip(results[1][1:], results[0][1:], strict=True):
        np.testing.assert_array_equal(mine, numpys)


def test_a_decoding_step_is_captured_in_a_graph_and_replayed_on_new_input(lab: Lab) -> None:
    import cupy

    rng = np.random.default_rng(2)

    def draw(*shape: int, dtype: str = "bfloat16") -> np.ndarray:
        return rng.normal(size=shape).astype(DTYPES[dtype])

    queries = lab.put(draw(4, 4, 128, dtype="float32"))
    keys, values = (lab.put(draw(4, 150, 128))[:, :140] for _ in range(2))
    counts, spread = np.full((4, 90), 3, np.int64), abs(draw(4, 90, 4, dtype="float32")).astype(DTYPES["bfloat16"])
    clusters = lab.put(counts), lab.put(spread)
    attend = BACKEND.operations["sketch_attention"]
    replay, result = capture(lambda: attend(queries, keys, values, *clusters))
    for _ in range(3):
        queries[...] = lab.put(draw(4, 4, 128, dtype="float32"))
        replay()
        cupy.cuda.Device().synchronize()
        for mine, eager in zip(result, attend(queries, keys, values, *clusters, 1), strict=True):
            np.testing.assert_array_equal(lab.get(mine), lab.get(eager))


@pytest.mark.parametrize("storage", ["input", "int8"])
def test_a_token_never_asks_the_host(lab: Lab, storage: Any) -> None:
    import cupy

    queries, keys, values = (cupy.random.standard_normal((heads, 300, 64), dtype=cupy.float32) for heads in (8, 2, 2))
    sketch = subgen.AttentionSketch(max_clusters=64, window=64, storage=storage, check_finite=False)
    sketch.update(*(x.astype(cupy.float16)[:, :260] for x in (keys, values, queries)))
    token = [x.astype(cupy.float16)[:, 260:261] for x in (queries, keys, values)]
    # A question to the host while a graph is recorded is an error; two tokens, with room for both.
    replay, _ = capture(lambda: sketch.step(*token))
    replay()
    cupy.cuda.Device().synchronize()
    assert sketch.n_seen == 262


@pytest.mark.parametrize("remember", [False, True])
@pytest.mark.parametrize("most", [1024, 500])
def test_merging_never_asks_the_host(lab: Lab, most: int, remember: bool) -> None:
    import cupy

    rng = np.random.default_rng(3)
    keys, values = rng.normal(size=(2, 2, 1536, 128)).astype(np.float32)
    counts, importance = rng.integers(1, 10, size=(2, 1536)).astype(np.int64), rng.random((2, 1536), dtype=np.float32)
    spread, leaders = rng.random((2, 1536, 4), dtype=np.float32), keys.astype(np.float16)
    nearest = None
    if remember:
        nearest = (np.arange(1536, dtype=np.int32) + rng.integers(1, 500, size=(2, 1536)).astype(np.int32)) % 500
        nearest[:, 500:] = -1  # so many are new that 512 can merge without those that remember others
    means, scale = (
        Means(keys, values, counts, spread, importance, leaders, nearest).each(lab.put),
        lab.put(np.ones(2, np.float32)),
    )
    metric = lab.put(np.tile(np.eye(128, dtype=np.float32), (2, 1, 1)))
    # A question to the host while a graph is recorded is an error.
    replay, result = capture(lambda: BACKEND.operations["merge_closest"](means, metric, scale, most, most))
    replay()
    cupy.cuda.Device().synchronize()
    merged, moved = result[0].each(lab.get), lab.get(result[1])
    assert (merged.counts > 0).sum(axis=1).tolist() == [most, most]
    members = np.zeros((2, most), dtype=np.int64)
    for s in range(2):
        np.add.at(members[s], moved[s], counts[s])
    np.testing.assert_array_equal(merged.counts, members)
    if not remember:
        assert merged.nearest is None
        return
    # Whom clusters remember is data: a replay that is to compare all anew finds -1 there.
    means.nearest.fill(-1)  # type: ignore[union-attr]
    replay()
    cupy.cuda.Device().synchronize()
    eager, eager_moved = BACKEND.operations["merge_closest"](means, metric, scale, most, most)
    for mine, now in zip((*result[0].arrays(), result[1]), (*eager.arrays(), eager_moved), strict=True):
        np.testing.assert_array_equal(lab.get(mine), lab.get(now))
    if most == 1024:
        assert (lab.get(eager_moved) != moved).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("storage", ["input", "int8"])
# Of the second block, which is recorded: new clusters alone are compared with all, or all anew, as every eighth time.
@pytest.mark.parametrize("before", [300, 268])
def test_a_block_is_absorbed_without_asking_the_host(
    lab: Lab, dtype: str, asked: bool, storage: Any, before: int
) -> None:
    import cupy

    rng = np.random.default_rng(5)
    queries, keys, values = (lab.put(rng.normal(size=(heads, 300, 64)).astype(DTYPES[dtype])) for heads in (8, 2, 2))
    sketch = subgen.AttentionSketch(max_clusters=64, window=64, storage=storage, check_finite=False)
    sketch.update(*(x[:, :before] for x in (keys, values)), queries[:, :before] if asked else None)
    block = [x[:, :32] for x in (keys, values, queries)]
    # A question to the host while a graph is recorded is an error; each time half a window leaves.
    replay, _ = capture(lambda: sketch.update(*block[: 2 + asked]))
    replay()
    cupy.cuda.Device().synchronize()
    state: Any = sketch.state
    assert sketch.n_seen == before + 64
    assert lab.get(state.counts).sum(axis=1).tolist() == [before + 64 - state.n_exact] * 2


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_long_streams_are_answered_as_well_as_on_numpy(lab: Lab, dtype: str) -> None:
    rng = np.random.default_rng(1)
    keys, values = rng.normal(size=(2, 4, 600, 64)).astype(DTYPES[dtype])
    queries = rng.normal(size=(8, 600, 64)).astype(DTYPES[dtype])
    exact = subgen.attention(*(x.astype(np.float32) for x in (queries[:, -4:], keys, values)))
    errors = []
    # NumPy computes with no bfloat16.
    for put, get in ((lambda x: x.astype(np.float32) if dtype == "bfloat16" else x, np.asarray), (lab.put, lab.get)):
        sketch = subgen.AttentionSketch(max_clusters=64, window=32, sink=2)
        sketch.update(*map(put, (keys, values, queries)))
        outputs = get(sketch.attend(put(queries[:, -4:])))
        errors.append(np.linalg.norm(outputs.astype(np.float32) - exact) / np.linalg.norm(exact))
    assert errors[1] < 1.1 * errors[0]


def test_a_long_block_is_replayed_and_waits_for_nothing(lab: Lab) -> None:
    rng = np.random.default_rng(6)
    queries, keys, values = (lab.put(rng.normal(size=(heads, 1500, 64)).astype(np.float16)) for heads in (8, 2, 2))
    states: list[Any] = []
    for size in (1500, 30):
        sketch = subgen.AttentionSketch(max_clusters=64, window=64, check_finite=False)
        for i in range(0, 1500, size):
            sketch.update(*(x[:, i : i + size] for x in (keys, values, queries)))
        states.append(sketch.state)
    whole, pieces = states
    for name in ("keys", "values", "counts", "spread", "importance"):
        used = slice(0, 64 + whole.n_exact)
        np.testing.assert_array_equal(lab.get(getattr(whole, name))[:, used], lab.get(getattr(pieces, name))[:, used])


@pytest.mark.parametrize("new", [None, 1.0, 0.5, 0.1])
@pytest.mark.parametrize(("n", "most"), [(1280, 1024), (2048, 1024), (700, 699)])
def test_blocks_that_match_a_stream_together_decide_as_one_does(lab: Lab, n: int, most: int, new: float | None) -> None:
    if not lab.device.clusters:
        pytest.skip("this device has no clusters of blocks")

    class Alone(CupyDevice):
        clusters = False  # type: ignore[assignment]

    rng = np.random.default_rng(7)
    keys, values = rng.normal(size=(2, 3, n, 64)).astype(np.float32)
    counts, importance = (rng.random((3, n)) < 0.95).astype(np.int64), rng.random((3, n), dtype=np.float32) ** 4
    nearest = None if new is None else remembering(rng, counts, new)
    means = Means(keys, values, counts, np.zeros((3, n, 4), np.float32), importance, nearest=nearest).each(lab.put)
    scale = lab.put(np.ones(3, np.float32))
    together, alone = (_merging.shrink(d, means, None, scale, most, most) for d in (lab.device, Alone(0)))
    for mine, theirs in zip((*together[0].arrays(), together[1]), (*alone[0].arrays(), alone[1]), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_array_equal(lab.get(mine), lab.get(theirs))


def test_tensors_of_torch_are_served_without_being_asked(lab: Lab) -> None:
    torch = cuda_labs.gpu_for_torch() and pytest.importorskip("torch")
    import subgen_torch

    assert backends.get("torch") is subgen_torch.BACKEND
    assert subgen_torch.BACKEND is not subgen_torch.OWN
    x = torch.randn(2, 400, 64, device="cuda", dtype=torch.bfloat16)
    sketch = subgen.AttentionSketch(max_clusters=64, window=64)
    sketch.update(x, x, x)
    assert sketch.attend(x[:, -1:]).isfinite().all()


def test_rows_too_many_or_too_wide_go_to_matrix_products(lab: Lab) -> None:
    rng = np.random.default_rng(4)
    operation = BACKEND.operations["weighted_attention"]
    for rows, dim, dtype in [(40, 64, "float32"), (2, 600, "float32"), (2, 64, "float64")]:
        queries, keys, values = (rng.normal(size=(2, n, dim)).astype(dtype) for n in (rows, 30, 30))
        weights = np.zeros((1, 1, 30), dtype=dtype)
        got = operation(*map(lab.put, (queries, keys, values, weights)))
        expected = backends.PORTABLE["weighted_attention"](queries, keys, values, weights)
        for mine, portable in zip(got, expected, strict=True):
            np.testing.assert_allclose(lab.get(mine), portable, rtol=1e-4, atol=1e-4)
