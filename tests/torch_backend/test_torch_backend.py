"""The PyTorch backend keeps the contract of the portable operations, and builds no autograd graph."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
from libraries import to_numpy
from states import TOLERANCE, arrays_of, full_state, weighted
from switches import needs_loops, using_backend, without_loops

from subgen import AttentionSketch
from subgen._tree import leaves, tree_map
from subgen.backends import PORTABLE, get
from subgen.default.append import append
from subgen.default.state import BufferOwner, Quantized, State, clear_free_space

torch = pytest.importorskip("torch")
import numpy as np  # noqa: E402


def operation(name: str):
    return get("torch").operations[name]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", ["one", "each"])
def test_weighted_attention(stored: torch.dtype, rows: str) -> None:
    q, k, v, w = map(torch.asarray, weighted(np.random.default_rng(5)))
    k, v = k.to(stored), v.to(stored)
    if rows == "each":
        w = w + torch.zeros(1, q.shape[1], 1)
    given = [x.clone() for x in (q, k, v, w)]
    output, logsumexp = operation("weighted_attention")(q, k, v, w)
    for x, copy in zip((q, k, v, w), given, strict=True):
        assert torch.equal(x, copy)
    expected = PORTABLE["weighted_attention"](q, k.float(), v.float(), w)
    np.testing.assert_allclose(output, expected[0], **TOLERANCE)
    np.testing.assert_allclose(logsumexp, expected[1], **TOLERANCE)
    assert (output.dtype, logsumexp.dtype) == (torch.float32, torch.float32)
    assert bool((output[1] == 0).all())
    assert bool(torch.isneginf(logsumexp[1]).all())


def test_double_precision_stays() -> None:
    q, k, v, w = (torch.asarray(x).double() for x in weighted(np.random.default_rng(6)))
    output, _ = operation("weighted_attention")(q, k, v, w)
    torch.testing.assert_close(output, PORTABLE["weighted_attention"](q, k, v, w)[0], rtol=1e-12, atol=1e-12)


def test_no_autograd_graph() -> None:
    q, k, v, w = (torch.asarray(x).requires_grad_() for x in weighted(np.random.default_rng(7)))
    assert not operation("weighted_attention")(q, k, v, w)[0].requires_grad


def with_free_space(n: int) -> State:
    """Make a state of tensors in which so many of the places for exact tokens are taken, by zeros."""
    state = full_state(4, dims=(8, 5), capacity=(1, 4))
    exact = replace(tree_map(np.zeros_like, state.exact), n=n, owner=BufferOwner(n))
    return tree_map(torch.from_numpy, replace(state, exact=exact))


def test_tokens_are_written_where_they_belong_and_not_into_tensors_of_inference_mode() -> None:
    keys, values = torch.ones(2, 2, 8, requires_grad=True), torch.ones(2, 2, 5, requires_grad=True)
    queries = Quantized(torch.ones(2, 2, 8, dtype=torch.int8), torch.ones(2, 2))
    for given in (queries, None):
        state = with_free_space(1)
        got = append(state, keys, values, given)
        with using_backend("portable"):
            expected = append(with_free_space(1), keys.detach(), values.detach(), given)
        for (name, x), (_, old), (_, y) in zip(
            leaves(got.exact), leaves(state.exact), leaves(expected.exact), strict=True
        ):
            assert x.data_ptr() == old.data_ptr(), name
            assert not x.requires_grad, name
            np.testing.assert_array_equal(x, y, err_msg=name)
        assert (got.exact.n, got.n_seen) == (expected.exact.n, expected.n_seen)
    with torch.inference_mode():
        state = with_free_space(3)
        got = append(state, keys, values, queries)
        for (name, x), (_, old) in zip(leaves(got.exact), leaves(state.exact), strict=True):
            assert x.data_ptr() == old.data_ptr(), name
            assert bool((x[:, 3:] == 1).all()), name
            assert bool((x[:, :3] == 0).all()), name
        state = with_free_space(1)
    assert state.exact.keys.is_inference()
    got = append(state, keys, values, queries)
    for name, x in leaves(state.exact):
        assert bool((x == 0).all()), f"{name} was written to"
    with using_backend("portable"):
        expected = append(with_free_space(1), keys.detach(), values.detach(), queries)
    for (name, x), (_, y) in zip(leaves(got.exact), leaves(expected.exact), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.parametrize("storage", ["input", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_read_and_rounded_as_the_portable_code_does(storage: str, dtype: torch.dtype) -> None:
    """Few of many numbers: the least that the dtype tells apart, where they lie on the edge of two."""
    keys, values, queries = torch.randn(3, 2, 150, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    sketches, outputs = [], []
    for backend in ("torch", "portable"):
        with using_backend(backend):
            sketch = AttentionSketch(24, window=12, sink=2, storage=storage)
            sketch.update(keys[:, :60], values[:, :60], queries=queries[:, :60])
            rows = [[x[:, i : i + 1] for x in (queries, keys, values)] for i in range(60, 150)]
            outputs.append(torch.cat([sketch.step(*row) for row in rows], dim=1).float())
            sketches.append(sketch)
    (one, other), unit = (arrays_of(sketch.state) for sketch in sketches), torch.finfo(dtype).eps
    assert set(one) == set(other)
    for name in ("clusters.counts", "exact.queries.codes"):
        assert torch.equal(one[name], other[name])
    assert (one["exact.n"], sketches[0].n_seen) == (other["exact.n"], sketches[1].n_seen)
    n = int(one["exact.n"])
    means = [f"clusters.{name}.scales" if storage == "int8" else f"clusters.{name}" for name in ("keys", "values")]
    for name in ("clusters.key_variance", "clusters.importance", *means):
        x, y = one[name], other[name]
        assert x.dtype == y.dtype == dtype
        if name.endswith("scales"):
            torch.testing.assert_close(x, y, rtol=2 * unit, atol=0)
        else:
            assert (x != y).float().mean() < 0.01, name
            torch.testing.assert_close(x, y, rtol=2 * unit, atol=2 * unit)
    for name in ("exact.keys", "exact.values"):
        assert one[name].dtype == other[name].dtype == dtype
        assert torch.equal(one[name][:, :n], other[name][:, :n])
    if storage == "int8":
        for name in ("clusters.keys.codes", "clusters.values.codes"):
            assert (one[name] != other[name]).float().mean() < 0.01
    # A unit where the output is rounded, and those of the numbers that differ.
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2 * unit, atol=2 * unit)


def test_16_bits_without_compiled_loops() -> None:
    """As with them, but for what is summed up in another order."""
    keys, values, queries = torch.randn(3, 2, 90, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    outputs = []
    for switch in (nullcontext(), without_loops()):
        with switch:
            sketch = AttentionSketch(24, window=12, sink=2)
            sketch.update(keys[:, :60], values[:, :60], queries=queries[:, :60])
            rows = [[x[:, i : i + 1] for x in (queries, keys, values)] for i in range(60, 90)]
            outputs.append(torch.cat([sketch.step(*row) for row in rows], dim=1).float())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2.0**-6, atol=2.0**-6)


@needs_loops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_step_on_a_cpu_runs_on_numpy_s_operations_over_the_same_memory(dtype: torch.dtype) -> None:
    keys, values, queries = torch.randn(3, 2, 60, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    sketch = AttentionSketch(24, window=12, sink=2)
    sketch.update(keys[:, :40], values[:, :40], queries=queries[:, :40])
    for i in range(40, 60):
        before = sketch.state
        assert before.exact.keys.dtype == dtype
        sketch.step(*(x[:, i : i + 1] for x in (queries, keys, values)))
        if sketch.state.exact.n == before.exact.n + 1 and i > 40:
            assert sketch.state.exact.keys.data_ptr() == before.exact.keys.data_ptr()


@pytest.mark.parametrize("delta", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_that_goes_in_and_out_of_inference_mode(delta: float | None, dtype: torch.dtype) -> None:
    """The same state as outside all along, keys that ask for gradients included."""
    keys, values, queries = torch.randn(3, 2, 120, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    sketches = [AttentionSketch(12, delta=delta, window=8, sink=2) for _ in range(2)]
    for start in range(0, 120, 5):
        part = slice(start, start + 5)
        sketches[0].update(keys[:, part], values[:, part], queries=queries[:, part])
        with torch.inference_mode(start % 3 == 0):
            asking = [x[:, part].clone().requires_grad_() for x in (keys, values, queries)]
            sketches[1].update(*asking[:2], queries=asking[2])
    one, other = (arrays_of(clear_free_space(sketch.state)) for sketch in sketches)
    assert set(one) == set(other)
    for name, x in one.items():
        np.testing.assert_array_equal(to_numpy(other[name]), to_numpy(x), err_msg=name)
        if name != "exact.n":
            assert not other[name].requires_grad, name
