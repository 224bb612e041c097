"""Whole sketches on the kernels: for arrays of NumPy, which stand for CuPy's, and of torch; and on a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cuda_cases import TOLERANCE, written
from cuda_targets import DTYPES, Target, using_portable

import subgen
from subgen._array import dtype_name
from subgen._tree import leaves
from subgen.default import algorithm

pytestmark = pytest.mark.slow


def run_sketch(target: Target, arrays: list[np.ndarray], with_queries: bool, **options: Any) -> tuple[np.ndarray, Any]:
    """Absorb most tokens at once and the last ones one by one; return the last answers, and the state."""
    queries, keys, values = map(target.put, arrays)
    sketch = subgen.AttentionSketch(sink=2, window=16, residual_samples=8, **options)
    n = keys.shape[-2] - 9
    sketch.update(keys[:, :n], values[:, :n], queries=queries[:, :n] if with_queries else None)
    steps = [sketch.step(*(x[:, i : i + 1] for x in (queries, keys, values))) for i in range(n, n + 9)]
    return target.get(steps[-1]), target.get(sketch.state)


def run_portable(arrays: list[np.ndarray], with_queries: bool, **options: Any) -> tuple[np.ndarray, Any]:
    """Do the same by the portable functions."""
    with using_portable():
        return run_sketch(Target("portable"), arrays, with_queries, **options)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("float32", {"max_clusters": 24}),
        ("float16", {"max_clusters": 5}),
        ("float16", {"max_clusters": 24, "storage": "int8"}),
        ("float32", {"max_clusters": 24, "delta": 3.0}),
    ],
)
def test_the_sketch_answers_as_well_as_with_the_portable_code(
    sketch_target: Target, dtype: str, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(algorithm, "FEW_CLUSTERS", 4)
    rng = np.random.default_rng(11)
    arrays = [rng.normal(size=(heads, 130, 8)).astype(dtype) for heads in (4, 2, 2)]
    exact = subgen.attention(*(x.astype(np.float32) for x in (arrays[0][:, -1:], *arrays[1:])))
    outputs, state = run_sketch(sketch_target, arrays, True, **options)
    portable, portable_state = run_portable(arrays, True, **options)
    # Merges may differ where costs are equal but for rounding; what they are worth may not.
    mine, portables = (np.linalg.norm(x.astype(np.float32) - exact) for x in (outputs, portable))
    assert mine < 1.1 * portables
    counts, nearest = state.clusters.counts, state.clusters.nearest
    assert counts.dtype == np.int64
    assert counts.sum(axis=1).tolist() == [130 - state.exact.n] * 2
    assert (counts > 0).sum() == (portable_state.clusters.counts > 0).sum()
    if "delta" in options:
        assert nearest is None
        return
    # Clusters that did not change cache another that lives, some time after all were compared.
    assert nearest.dtype == np.int32
    assert nearest.shape == counts.shape
    assert ((nearest >= 0).any(axis=1) == (portable_state.clusters.nearest >= 0).any(axis=1)).all()
    assert (nearest != np.arange(counts.shape[1])).all()
    assert (np.take_along_axis(counts, np.maximum(nearest, 0), axis=1)[nearest >= 0] > 0).all()


@pytest.mark.parametrize(("dtype", "storage"), [("float32", "input"), ("float16", "input"), ("float16", "int8")])
def test_a_prompt_is_absorbed_as_well_as_by_the_portable_code(sketch_target: Target, dtype: str, storage: Any) -> None:
    rng = np.random.default_rng(12)
    arrays = [rng.normal(size=(heads, 150, 8)).astype(dtype) for heads in (4, 2, 2)]
    exact = subgen.attention(*(x.astype(np.float32) for x in (arrays[0][:, -4:], *arrays[1:])))

    def absorbed(target: Target) -> tuple[np.ndarray, Any]:
        queries, keys, values = map(target.put, arrays)
        sketch = subgen.AttentionSketch(60, window=16, sink=2, storage=storage)
        sketch.prefill(keys, values, queries=queries)
        return target.get(sketch.attend(queries[:, -4:])), target.get(sketch.state)

    (outputs, state) = absorbed(sketch_target)
    with using_portable():
        portable, portable_state = absorbed(Target("portable"))
    mine, portables = (np.linalg.norm(x.astype(np.float32) - exact) for x in (outputs, portable))
    assert mine < 1.1 * portables
    assert state.clusters.counts.sum(axis=1).tolist() == [150 - state.exact.n] * 2
    assert state.clusters.counts.shape == portable_state.clusters.counts.shape == (2, 60)
    assert (state.exact.n, state.n_seen) == (portable_state.exact.n, 150)


@pytest.mark.parametrize("storage", ["input", "int8"])
def test_a_sketch_of_bfloat16(sketch_target: Target, storage: Any) -> None:
    rng = np.random.default_rng(16)
    arrays = [rng.normal(size=(heads, 130, 8)).astype(DTYPES["bfloat16"]) for heads in (4, 2, 2)]
    errors = []
    for target, given in ((sketch_target, arrays), (Target("numpy"), [x.astype(np.float32) for x in arrays])):
        queries, keys, values = map(target.put, given)
        sketch = subgen.AttentionSketch(max_clusters=24, window=16, sink=2, storage=storage)
        sketch.update(keys[:, :120], values[:, :120], queries=queries[:, :120])
        outputs = target.get(sketch.step(*(x[:, 120:] for x in (queries, keys, values))))
        assert outputs.dtype == given[0].dtype
        state: Any = sketch.state
        names = {dtype_name(x.dtype) for x in (state.exact.keys, state.clusters.key_variance)}
        assert names == {dtype_name(given[0].dtype)}
        exact = subgen.attention(*(x.astype(np.float32) for x in arrays), causal=True)[:, 120:]
        errors.append(np.linalg.norm(outputs.astype(np.float32) - exact) / np.linalg.norm(exact))
    assert errors[0] < 1.1 * errors[1]


def test_threshold_clusters_and_samples_equal_those_of_the_portable_code(sketch_target: Target) -> None:
    rng = np.random.default_rng(12)
    arrays = [rng.integers(-2, 3, size=(heads, 130, 4)).astype(np.float32) for heads in (2, 2, 2)]
    outputs, state = run_sketch(sketch_target, arrays, False, delta=2.0)
    portable, expected = run_portable(arrays, False, delta=2.0)
    np.testing.assert_allclose(outputs, portable, **TOLERANCE)
    for mine, portables in [
        (state.clusters.counts, expected.clusters.counts),
        (state.clusters.leaders, expected.clusters.leaders),
        (state.residual.cluster, expected.residual.cluster),
        (state.residual.keys, expected.residual.keys),
    ]:
        np.testing.assert_array_equal(mine, portables)


def test_one_stream_of_a_batch_has_queries_and_the_other_none(sketch_target: Target) -> None:
    """A query of zeros is none: the metric of that stream is isotropic, as in the portable code."""
    rng = np.random.default_rng(21)
    queries, keys = rng.normal(size=(2, 2, 34, 8)).astype(np.float32)
    queries[1] = 0.0
    results = []
    for target, context in ((sketch_target, nullcontext()), (Target("portable"), using_portable())):
        sketch = subgen.AttentionSketch(max_clusters=8, window=16, sink=2)
        with context:
            sketch.update(*map(target.put, (keys, keys)), queries=target.put(queries))
        results.append(target.get(sketch.state))
    mine, portable = results
    np.testing.assert_array_equal(mine.exact.queries.scales, portable.exact.queries.scales)
    assert (mine.exact.queries.scales[0, : mine.exact.n] > 0).all()
    assert not mine.exact.queries.scales[1].any()
    np.testing.assert_array_equal(mine.clusters.counts, portable.clusters.counts)
    np.testing.assert_allclose(mine.clusters.keys, portable.clusters.keys, **TOLERANCE)


@pytest.mark.parametrize(("heads", "storage"), [(2, "input"), (8, "input"), (8, "int8")])
def test_a_token_is_three_launches(sketch_target: Target, heads: int, storage: Any) -> None:
    if not sketch_target.emulated:
        pytest.skip("launches are counted in the emulation")
    rng = np.random.default_rng(18)
    shapes = [(2, h, 60, 8) for h in (heads, 2, 2)]
    queries, keys, values = (sketch_target.put(rng.normal(size=shape).astype(np.float16)) for shape in shapes)
    sketch = subgen.AttentionSketch(max_clusters=8, window=16, sink=2, storage=storage)
    sketch.update(keys[:, :, :48], values[:, :, :48], queries=queries[:, :, :48])
    token = [sketch_target.device.packed(x[:, :, 48:49]) for x in (queries, keys, values)]
    launches = sketch_target.launches
    launches.clear()
    outputs = sketch.step(*token)
    assert [launch.kernel for launch in launches] == ["append_token", "attend_split", "attend_join"]
    assert outputs.dtype == queries.dtype
    assert tuple(outputs.shape) == (2, heads, 1, 8)
    given = {sketch_target.device.pointer(x) for x in token}
    assert given <= {int(x) for launch in launches for x in launch.arguments if isinstance(x, np.uint64)}


# One by one; recorded, and replayed with one over; without queries; and where all are compared in between.
@pytest.mark.parametrize("storage", ["input", "int8"])
@pytest.mark.parametrize(
    ("steps", "with_queries", "few"), [(7, True, 768), (8, True, 768), (9, False, 4), (20, True, 4)]
)
def test_a_long_block_equals_its_steps(
    sketch_target: Target, steps: int, with_queries: bool, few: int, storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, whether they are launched one by one or replayed."""
    monkeypatch.setattr(algorithm, "FEW_CLUSTERS", few)
    rng = np.random.default_rng(19)
    n = 18 + 5 * 8 + steps * 8 + 3
    # Of a longer prompt, so that streams are strided.
    arrays = [sketch_target.put(rng.normal(size=(1, h, n + 10, 8)).astype(np.float16))[:, :, :n] for h in (4, 2, 2)]
    states = []
    for size in (n, 8):
        sketch = subgen.AttentionSketch(max_clusters=24, window=16, sink=2, seed=3, storage=storage)
        for i in range(0, n, size):
            q, k, v = (x[:, :, i : i + size] for x in arrays)
            sketch.update(k, v, queries=q if with_queries else None)
        states.append(sketch.state)
    whole, pieces = (sketch_target.get(state) for state in states)
    assert whole.n_seen == pieces.n_seen == n
    assert whole.exact.n == pieces.exact.n
    assert (whole.exact.queries.scales[:, : whole.exact.n] > 0).all() == with_queries
    assert hasattr(whole.clusters.keys, "codes") == (storage == "int8")
    mine, theirs = written(whole), written(pieces)
    assert mine.keys() == theirs.keys()
    assert ("clusters.nearest" in mine) == (few == 4)
    for name, x in theirs.items():
        np.testing.assert_array_equal(mine[name], x, err_msg=name)


@pytest.mark.parametrize("storage", ["input", "int8"])
def test_a_long_block_counts_in_64_bits(sketch_target: Target, storage: Any) -> None:
    """Eight steps, which are replayed where that is possible, and a token: as many tokens more, to the last."""
    rng = np.random.default_rng(21)
    queries, keys, values = (sketch_target.put(rng.normal(size=(2, 122, 8)).astype(np.float32)) for _ in range(3))
    sketch = subgen.AttentionSketch(max_clusters=10, window=16, sink=2, storage=storage)
    sketch.update(keys[:, :50], values[:, :50], queries=queries[:, :50])
    state: Any = sketch.state
    counts = sketch_target.get(state.clusters.counts) << 40
    clusters = replace(state.clusters, counts=sketch_target.put(counts))
    long = replace(state, clusters=clusters, n_seen=int(counts[0].sum()) + state.exact.n)
    sketch = sketch.continued(sketch.layout, long)
    sketch.update(keys[:, 50:121], values[:, 50:121], queries=queries[:, 50:121])
    outputs = sketch.step(*(x[:, 121:] for x in (queries, keys, values)))
    assert np.isfinite(sketch_target.get(outputs)).all()
    state = sketch.state
    assert state.n_seen == long.n_seen + 72
    found = sketch_target.get(state.clusters.counts)
    assert found.dtype == np.int64
    assert found.sum(axis=1).tolist() == [state.n_seen - state.exact.n] * 2
    # The heavy clusters are there, with few tokens more.
    assert (found >> 40).sum(axis=1).tolist() == (counts >> 40).sum(axis=1).tolist()


def test_a_long_block_does_not_change_the_state_before(sketch_target: Target) -> None:
    """The steps write into arrays of their own; what comes after is the same, too."""
    rng = np.random.default_rng(20)
    arrays = [rng.normal(size=(2, 400, 8)).astype(np.float32) for _ in range(3)]
    queries, keys, values = map(sketch_target.put, arrays)
    sketch = subgen.AttentionSketch(max_clusters=24, window=16, sink=2)
    sketch.update(keys[:, :200], values[:, :200], queries=queries[:, :200])
    state: Any = sketch.state
    before = {name: np.array(sketch_target.get(x)) for name, x in written(state).items()}
    again = sketch.continued(sketch.layout, state)
    for each in (sketch, again):
        each.update(keys[:, 200:], values[:, 200:], queries=queries[:, 200:])
    for name, x in written(state).items():
        np.testing.assert_array_equal(sketch_target.get(x), before[name], err_msg=name)
    for mine, given in zip((queries, keys, values), arrays, strict=True):
        np.testing.assert_array_equal(sketch_target.get(mine), given)
    mine, theirs = (sketch_target.get(each.attend(queries[:, -1:])) for each in (sketch, again))
    np.testing.assert_array_equal(mine, theirs)


def test_a_token_in_decoding_copies_no_window(sketch_target: Target) -> None:
    rng = np.random.default_rng(13)
    sketch = subgen.AttentionSketch(max_clusters=8, window=16, sink=2)
    x = sketch_target.put(rng.normal(size=(2, 60, 8)).astype(np.float32))
    sketch.update(x[:, :48], x[:, :48])
    before: Any = sketch.state
    sketch.step(x[:, 48:49], x[:, 48:49], x[:, 48:49])
    after: Any = sketch.state
    assert after.n_seen == before.n_seen + 1
    for (name, mine), (_, old) in zip(leaves(after.exact), leaves(before.exact), strict=True):
        assert mine is old, name
