"""Algorithm 1, block by block: bit for bit the plain token-by-token reference, on every library."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import LIBRARIES, NUMPY, Library, skip_compiling, to_numpy
from reference import Reference

import subgen
from subgen import AttentionSketch
from subgen.paper.state import PaperState


def integer_stream(seed: int, shape: tuple[int, ...], n: int, head_dim: int = 2, value_dim: int = 3) -> tuple:
    """Keys and values of small integers: every distance, norm and sum is exact on every library."""
    rng = np.random.default_rng(seed)
    keys = rng.integers(-6, 7, size=(*shape, n, head_dim)).astype(np.float32)
    values = rng.integers(-2, 3, size=(*shape, n, value_dim)).astype(np.float32)
    return keys, values


def discrete(state: PaperState | None) -> dict[str, Any]:
    """Everything a state decides, without the padding."""
    assert state is not None
    counts = to_numpy(state.clusters.counts)
    used = int((counts > 0).sum(axis=-1).max())
    return {
        "centres": to_numpy(state.clusters.centres)[:, :used],
        "counts": counts[:, :used],
        "samples": to_numpy(state.clusters.samples)[:, :used],
        "key_due": to_numpy(state.clusters.due)[:, :used],
        "slot_keys": to_numpy(state.reservoir.keys),
        "slot_values": to_numpy(state.reservoir.values),
        "slot_due": to_numpy(state.reservoir.due),
        "weight": to_numpy(state.reservoir.weight),
        "n_seen": np.asarray(state.n_seen),
    }


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    for name, expected in b.items():
        np.testing.assert_array_equal(a[name], expected, err_msg=name, strict=True)


def of_reference(streams: list[Reference]) -> dict[str, Any]:
    used = max(len(stream.clusters) for stream in streams)
    d = streams[0].clusters[0].centre.shape[0]
    t = streams[0].t
    out = {
        "centres": np.zeros((len(streams), used, d), dtype=np.float32),
        "counts": np.zeros((len(streams), used), dtype=np.int64),
        "samples": np.zeros((len(streams), used, t, d), dtype=np.float32),
        "key_due": np.ones((len(streams), used, t), dtype=np.int64),
        "slot_keys": np.stack([[slot.key for slot in stream.slots] for stream in streams]),
        "slot_values": np.stack([[slot.value for slot in stream.slots] for stream in streams]),
        "weight": np.asarray([stream.mu for stream in streams]),
        "n_seen": np.asarray(streams[0].n),
    }
    for i, stream in enumerate(streams):
        for c, cluster in enumerate(stream.clusters):
            out["centres"][i, c], out["counts"][i, c] = cluster.centre, len(cluster.members)
            out["samples"][i, c], out["key_due"][i, c] = cluster.samples, cluster.due
    if all(stream.mu > 0 for stream in streams):
        out["slot_due"] = np.asarray([[slot.due for slot in stream.slots] for stream in streams])
    return out


def cut(n: int, cuts: list[int]) -> list[slice]:
    edges = sorted({0, n, *(c % n for c in cuts)})
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("library", list(LIBRARIES.values()), ids=list(LIBRARIES))
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32),
    delta=st.sampled_from([0.0, 2.0, 2.0**0.5, 3.0**0.5, 5.0, 40.0]),
    cuts=st.lists(st.integers(0, 10**6), max_size=4),
)
def test_any_cut_of_the_stream_is_the_plain_algorithm_bit_for_bit(
    library: Library, seed: int, delta: float, cuts: list[int]
) -> None:
    skip_compiling(library)
    n, t, s = 24, 2, 3
    keys, values = integer_stream(seed, (2, 2), n)
    streams = [Reference(delta, t, s, seed, head=h) for _ in range(2) for h in range(2)]
    for stream, ks, vs in zip(streams, keys.reshape(4, n, -1), values.reshape(4, n, -1), strict=True):
        for key, value in zip(ks, vs, strict=True):
            stream.update(key, value)
    sketch = AttentionSketch.paper(delta=delta, samples_per_cluster=t, value_samples=s, seed=seed)
    for part in cut(n, cuts):
        sketch.update(library.array(keys[..., part, :]), library.array(values[..., part, :]))
    assert_same(discrete(sketch.state), of_reference(streams))


@given(seed=st.integers(0, 2**32), n=st.integers(1, 200), block=st.integers(1, 70), delta=st.floats(0, 30))
def test_longer_streams_and_other_blocks_on_numpy(seed: int, n: int, block: int, delta: float) -> None:
    keys, values = integer_stream(seed, (3,), n, head_dim=3)
    sketches = [AttentionSketch.paper(delta=delta, samples_per_cluster=3, value_samples=5, seed=seed) for _ in range(3)]
    whole, in_blocks, by_token = sketches
    whole.update(keys, values)
    for start in range(0, n, block):
        in_blocks.update(keys[:, start : start + block], values[:, start : start + block])
    for i in range(n):
        by_token.update(keys[:, i : i + 1], values[:, i : i + 1])
    assert_same(discrete(in_blocks.state), discrete(whole.state))
    assert_same(discrete(by_token.state), discrete(whole.state))
    assert whole.nbytes == in_blocks.nbytes == by_token.nbytes


def test_a_row_of_a_batch_equals_the_row_alone(library: Library) -> None:
    skip_compiling(library)
    rows, n = 3, 40
    keys, values = integer_stream(11, (rows, 2), n)
    make = {"delta": 3.0, "samples_per_cluster": 2, "value_samples": 4, "seed": 9}
    batch = AttentionSketch.paper(**make)
    batch.update(library.array(keys), library.array(values))
    together = discrete(batch.state)
    queries = np.random.default_rng(0).normal(size=(rows, 2, 5, 2)).astype(np.float32) / 8
    answers = to_numpy(batch.attend(library.array(queries)))
    for row in range(rows):
        alone = AttentionSketch.paper(**make)
        alone.update(library.array(keys[row]), library.array(values[row]))
        state = discrete(alone.state)
        used = state["counts"].shape[1]
        for name, expected in state.items():
            got = together[name] if name == "n_seen" else together[name][2 * row : 2 * row + 2]
            if name in ("centres", "counts", "samples", "key_due"):
                got = got[:, :used]
            np.testing.assert_array_equal(got, expected, err_msg=name)
        # The same terms, padded differently: sums may round differently.
        np.testing.assert_allclose(
            answers[row], to_numpy(alone.attend(library.array(queries[row]))), rtol=2e-5, atol=1e-6
        )


def test_answers_are_the_papers_formula(library: Library) -> None:
    skip_compiling(library)
    keys, values = integer_stream(12, (), 60)
    reference = Reference(2.0, 3, 8, seed=4)
    for key, value in zip(keys, values, strict=True):
        reference.update(key, value)
    sketch = AttentionSketch.paper(delta=2.0, samples_per_cluster=3, value_samples=8, seed=4)
    sketch.update(library.array(keys), library.array(values))
    queries = np.random.default_rng(1).normal(size=(6, 2)).astype(np.float32) / 2
    expected = np.stack([reference.answer(query) for query in queries])
    got = to_numpy(sketch.attend(library.array(queries)))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [1, 7, 40])
def test_a_step_is_update_and_attend_token_by_token(library: Library, block: int) -> None:
    if block != 7:
        skip_compiling(library)
    n = 21 if library.compiles else 40
    keys, values = integer_stream(13, (2,), n)
    queries = np.random.default_rng(2).normal(size=(4, n, 2)).astype(np.float32) / 4  # two query heads a stream
    make = {"delta": 3.0, "samples_per_cluster": 2, "value_samples": 6, "seed": 3}
    by_token, by_block = AttentionSketch.paper(**make), AttentionSketch.paper(**make)
    expected, got = [], []
    for i in range(n):
        token = slice(i, i + 1)
        by_token.update(NUMPY.array(keys[:, token]), NUMPY.array(values[:, token]))
        expected.append(by_token.attend(NUMPY.array(queries[:, token])))
    for start in range(0, n, block):
        part = slice(start, start + block)
        got.append(to_numpy(by_block.step(*(library.array(x[:, part]) for x in (queries, keys, values)))))
    assert_same(discrete(by_block.state), discrete(by_token.state))
    np.testing.assert_allclose(np.concatenate(got, 1), np.concatenate(expected, 1), rtol=1e-4, atol=1e-5)


def test_temporaries_are_cut_without_changing_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, values = integer_stream(14, (2,), 90)
    queries = np.random.default_rng(3).normal(size=(2, 90, 2)).astype(np.float32) / 4
    make = {"delta": 2.0, "samples_per_cluster": 2, "value_samples": 6}
    sketches = [AttentionSketch.paper(**make) for _ in range(2)]
    whole = [sketches[0].step(queries, keys, values), sketches[0].attend(queries)]
    monkeypatch.setattr("subgen._array.TRANSIENT_NUMBERS", 20_000)
    cut_up = [sketches[1].step(queries, keys, values), sketches[1].attend(queries)]
    assert_same(discrete(sketches[1].state), discrete(sketches[0].state))
    for a, b in zip(cut_up, whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_equal_everywhere_on_floats_too() -> None:
    """Not promised bit for bit, but decisions are made in float64 and should not hang on the library."""
    rng = np.random.default_rng(5)
    keys = rng.normal(size=(2, 300, 16)).astype(np.float32) + 1000.0  # a large common offset
    values = rng.normal(size=(2, 300, 4)).astype(np.float32)
    counts = []
    for library in LIBRARIES.values():
        sketch = AttentionSketch.paper(delta=5.0, samples_per_cluster=2, value_samples=4, scale=1e-4)
        sketch.update(library.array(keys), library.array(values))
        counts.append(discrete(sketch.state))
    for other in counts[1:]:
        np.testing.assert_array_equal(other["counts"], counts[0]["counts"])
        np.testing.assert_array_equal(other["samples"], counts[0]["samples"])
        np.testing.assert_array_equal(other["slot_keys"], counts[0]["slot_keys"])


class TestClusters:
    """What the theorem asks of the clusters."""

    @given(seed=st.integers(0, 2**32), m=st.integers(1, 12), offset=st.sampled_from([0.0, 300.0]))
    def test_clusterable_keys_open_at_most_m(self, seed: int, m: int, offset: float) -> None:
        rng = np.random.default_rng(seed)
        d, delta, n = 8, 1.0, 300
        centres = rng.normal(size=(m, d)) * 3 + offset
        inside = rng.normal(size=(n, d))
        inside *= 0.499 * delta * rng.random((n, 1)) / np.linalg.norm(inside, axis=-1, keepdims=True)
        keys = (centres[rng.integers(0, m, n)] + inside).astype(np.float32)  # diameter below delta
        sketch = AttentionSketch.paper(delta=delta, samples_per_cluster=4, value_samples=2, seed=seed)
        sketch.update(keys, np.ones((n, 1), dtype=np.float32))
        assert 1 <= int(sketch.n_clusters) <= m

    @given(seed=st.integers(0, 2**32), delta=st.floats(0.0, 8.0))
    def test_representatives_are_apart_and_members_are_near(self, seed: int, delta: float) -> None:
        keys = np.random.default_rng(seed).normal(size=(250, 6))
        sketch = AttentionSketch.paper(delta=delta, samples_per_cluster=8, value_samples=2, seed=seed)
        sketch.update(keys, keys)
        state = discrete(sketch.state)
        centres, samples = state["centres"][0], state["samples"][0]
        apart = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
        np.fill_diagonal(apart, np.inf)
        assert apart.min() > delta * (1 - 1e-12)
        assert np.linalg.norm(samples - centres[:, None], axis=-1).max() <= delta * (1 + 1e-12)
        assert state["counts"].sum() == 250

    def test_radius_zero_keeps_every_distinct_key_and_joins_equal_ones(self, library: Library) -> None:
        skip_compiling(library)
        keys = np.random.default_rng(6).normal(size=(30, 16)).astype(np.float32) * 100
        keys = np.concatenate([keys, keys[::-1], keys[:7]])
        sketch = AttentionSketch.paper(delta=0.0, samples_per_cluster=1, value_samples=1, scale=1e-4)
        sketch.update(library.array(keys), library.array(np.ones_like(keys)))
        assert int(sketch.n_clusters) == 30
        counts = discrete(sketch.state)["counts"][0]
        np.testing.assert_array_equal(counts, [3] * 7 + [2] * 23)

    def test_streams_may_have_different_numbers(self) -> None:
        keys = np.zeros((2, 50, 3), dtype=np.float32)
        keys[1, :, 0] = np.arange(50)
        sketch = AttentionSketch.paper(delta=0.5, samples_per_cluster=1, value_samples=1)
        sketch.update(keys, keys)
        assert sketch.n_clusters.tolist() == [1, 50]


def test_logits_of_ten_thousand_and_zero_vectors(library: Library) -> None:
    skip_compiling(library)
    keys = np.asarray([[100.0, 0.0], [0.0, 100.0], [0.0, 0.0]] * 10, dtype=np.float32)
    values = np.asarray([[1.0], [-1.0], [0.0]] * 10, dtype=np.float32)
    sketch = AttentionSketch.paper(delta=1.0, samples_per_cluster=4, value_samples=64)
    sketch.update(library.array(keys), library.array(values))
    queries = np.asarray([[100.0, 0.0], [0.0, 100.0], [-100.0, -100.0], [0.0, 0.0]], dtype=np.float32)
    got = to_numpy(sketch.attend(library.array(queries)))[:, 0]
    # The first two see one cluster; half the slots hold each, so 64 slots estimate 1 within 6 deviations.
    assert abs(got[0] - 1) < 0.75
    assert abs(got[1] + 1) < 0.75
    # The third sees the zero key alone, whose value is zero and never sampled.
    assert got[2] == 0
    assert np.isfinite(got).all()


def test_values_that_are_all_zero_answer_zero(library: Library) -> None:
    skip_compiling(library)
    keys, _ = integer_stream(15, (), 20)
    zeros = np.zeros((20, 3), dtype=np.float32)
    sketch = AttentionSketch.paper(delta=1.0, samples_per_cluster=2, value_samples=4)
    sketch.update(library.array(keys), library.array(zeros))
    assert np.all(to_numpy(sketch.attend(library.array(keys[:2]))) == 0)
    later = np.ones((20, 3), dtype=np.float32)
    sketch.update(library.array(keys), library.array(later))  # the first value that is not zero fills every slot
    assert np.all(discrete(sketch.state)["slot_values"] == 1)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_an_estimate_beyond_the_dtype_saturates(dtype: str) -> None:
    """Where the samples of D miss the key that M holds, the paper's ratio may exceed any float."""
    keys = np.asarray([[0.0], [300.0]] + [[0.0]] * 1000, dtype=dtype)
    values = np.asarray([[1.0], [100.0]] + [[0.0]] * 1000, dtype=dtype)
    sketch = AttentionSketch.paper(delta=1000.0, samples_per_cluster=1, value_samples=4)
    sketch.update(keys, values)
    got = sketch.attend(np.asarray([[30.0]], dtype=dtype))
    assert got.dtype == dtype
    assert np.isfinite(got).all()
    assert got[0, 0] > 1e4


def test_bfloat16_streams() -> None:
    torch = pytest.importorskip("torch")
    keys, values = (torch.from_numpy(x).to(torch.bfloat16) for x in integer_stream(16, (2,), 50))
    sketch = AttentionSketch.paper(delta=2.0, samples_per_cluster=2, value_samples=8)
    out = sketch.step(keys / 8, keys, values)
    assert out.dtype == torch.bfloat16
    wide = AttentionSketch.paper(delta=2.0, samples_per_cluster=2, value_samples=8)
    wide.update(keys.float(), values.float())
    np.testing.assert_array_equal(discrete(wide.state)["counts"], discrete(sketch.state)["counts"])
    assert bool(torch.isfinite(out).all())


def test_memory_is_that_of_the_arrays_and_does_not_grow_with_the_stream() -> None:
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(16, 8)).astype(np.float32)
    sketch = AttentionSketch.paper(delta=0.1, samples_per_cluster=4, value_samples=32)
    sizes = []
    for _ in range(5):
        keys = centres[rng.integers(0, 16, 2000)]
        sketch.update(keys, keys)
        sizes.append(sketch.nbytes)
    assert len(set(sizes)) == 1
    # centres and samples: 16 * 5 * 8 floats; counts and moments due: 16 * 5 words of 8 bytes; slots and weight.
    assert sizes[0] == 16 * 5 * 8 * 4 + 16 * 5 * 8 + 32 * (16 * 4 + 8) + 8


def test_a_copy_goes_its_own_way() -> None:
    keys, values = integer_stream(17, (), 30)
    sketch = AttentionSketch.paper(delta=2.0, samples_per_cluster=2, value_samples=4)
    sketch.update(keys, values)
    other = copy.copy(sketch)
    other.update(keys, values)
    assert (sketch.n_seen, other.n_seen) == (30, 60)


def test_properties_before_anything_was_seen() -> None:
    sketch = AttentionSketch.paper(delta=1.0, samples_per_cluster=2, value_samples=4)
    assert (sketch.n_seen, sketch.nbytes, sketch.n_clusters, sketch.state) == (0, 0, 0, None)
    assert "Algorithm1" in repr(sketch)
    with pytest.raises(RuntimeError, match="empty"):
        sketch.attend(np.zeros((1, 2)))


def test_version() -> None:
    assert subgen.__version__
