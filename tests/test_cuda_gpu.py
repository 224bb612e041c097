"""The CuPy backend on a GPU, as the library uses it. Its kernels one by one: `test_cuda_kernels.py`."""

from __future__ import annotations

from typing import Any

import cuda_labs
import numpy as np
import pytest
from cuda_labs import DTYPES, Lab
from subgen_cupy import BACKEND, attend_clusters, capture, merge_closest
from subgen_cupy._cupy import _function
from test_cuda_compile import VARIANTS

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


def test_the_default_sketch_answers_as_on_numpy(lab: Lab) -> None:
    rng = np.random.default_rng(1)
    keys, values = rng.normal(size=(2, 4, 600, 64)).astype(np.float32)
    queries = rng.normal(size=(8, 600, 64)).astype(np.float32)
    exact = subgen.attention(queries[:, -4:], keys, values)
    errors = []
    for put, get in ((np.asarray, np.asarray), (lab.put, lab.get)):
        sketch = subgen.AttentionSketch(max_clusters=64, window=32, sink=2)
        sketch.update(*map(put, (keys, values, queries)))
        outputs = get(sketch.attend(put(queries[:, -4:])))
        errors.append(np.linalg.norm(outputs - exact) / np.linalg.norm(exact))
    # Merges may differ where costs are equal but for rounding; what they are worth may not.
    assert errors[1] < 1.1 * errors[0]


def test_a_decoding_step_is_captured_in_a_graph_and_replayed_on_new_input(lab: Lab) -> None:
    import cupy

    rng = np.random.default_rng(2)

    def draw(*shape: int, dtype: str = "bfloat16") -> np.ndarray:
        return rng.normal(size=shape).astype(DTYPES[dtype])

    queries = lab.put(draw(4, 4, 128, dtype="float32"))
    exact = lab.put(draw(4, 50, 128)), lab.put(draw(4, 50, 128)), None
    counts, spread = np.ones((4, 90), np.float32) * 3, abs(draw(4, 90, 4, dtype="float32"))
    clusters = lab.put(draw(4, 90, 128)), lab.put(draw(4, 90, 128)), lab.put(counts), lab.put(spread)
    replay, result = capture(lambda: attend_clusters(queries, 0.1, exact, clusters))
    for _ in range(3):
        queries[...] = lab.put(draw(4, 4, 128, dtype="float32"))
        replay()
        cupy.cuda.Device().synchronize()
        expected = attend_clusters(queries, 0.1, exact, clusters)
        for mine, eager in zip(result, expected, strict=True):
            np.testing.assert_array_equal(lab.get(mine), lab.get(eager))


def test_merging_never_asks_the_host(lab: Lab) -> None:
    import cupy

    rng = np.random.default_rng(3)
    arrays = [rng.random(size=(2, 1536, *rest)).astype(np.float32) for rest in ((128,), (128,), (), (4,), ())]
    arrays[2] = np.ceil(arrays[2] * 9)
    means, scale = Means(*map(lab.put, arrays)), lab.put(np.ones(2, np.float32))
    # A question to the host while a graph is recorded is an error.
    replay, result = capture(lambda: merge_closest(means, None, scale, 1024))
    replay()
    cupy.cuda.Device().synchronize()
    assert (lab.get(result.counts) > 0).sum(axis=1).tolist() == [1024, 1024]
    np.testing.assert_allclose(lab.get(result.counts).sum(axis=1), arrays[2].sum(axis=1))


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
