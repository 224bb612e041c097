"""`subgen_cupy.Decoder`: every token launches the same, and it keeps and answers the same as the sketch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_cases import written
from cuda_targets import DTYPES, Target
from subgen_cupy import BACKEND, Decoder, capture

import subgen
from subgen import backends
from subgen.default import algorithm

pytestmark = pytest.mark.slow

OPTIONS: dict[str, Any] = {"max_clusters": 24, "window": 16, "sink": 2, "check_finite": False}
N = 130


@pytest.fixture
def target(sketch_target: Target) -> Target:
    return sketch_target


def stream(
    target: Target, dtype: str = "float16", n: int = N, before: int = 100, storage: Any = "input"
) -> tuple[Any, list[np.ndarray]]:
    """Make a sketch of all but the last tokens; return queries, keys and values too."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(2, heads, n, 8)).astype(DTYPES[dtype]) for heads in (8, 2, 2)]
    queries, keys, values = (target.put(x[:, :, :before]) for x in arrays)
    sketch = subgen.AttentionSketch(**OPTIONS, storage=storage)
    sketch.update(keys, values, queries=queries)
    return sketch, arrays


def contents(target: Target, sketch: Any) -> dict[str, np.ndarray]:
    """Return the arrays of a sketch by name, without free space."""
    arrays = {name: np.asarray(target.get(x), dtype=np.float64) for name, x in written(sketch.state).items()}
    return arrays | {"n": np.asarray(sketch.state.exact.n)}


def assert_same(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Compare to the last bit."""
    assert mine.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(mine[name], x, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("few", "storage"), [(4, "input"), (768, "input"), (768, "int8")])
def test_it_keeps_and_answers_the_same_as_the_sketch(
    target: Target, dtype: str, few: int, storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any filling of the window on; to the last bit, also with cached neighbours."""
    monkeypatch.setattr(algorithm, "FEW_CLUSTERS", few)
    sketch, arrays = stream(target, dtype, storage=storage)
    decoder, before = Decoder(sketch), contents(target, sketch)
    assert decoder.n_seen == 100
    # Replayed launches read the token at the recorded addresses.
    token = [target.put(x[:, :, :1]) for x in arrays]
    reference = sketch.continued(sketch.layout, sketch.state)
    for i in range(100, N):
        for place, x in zip(token, arrays, strict=True):
            place[...] = target.put(x[:, :, i : i + 1])
        outputs = decoder.step(*token)
        decoder.advance()
        expected = reference.step(*token)
        # The keys are cut into other pieces: sums of float32 in another order, rounded to the dtype of the input.
        unit = float(np.finfo(np.float32).eps) * 64 if dtype == "float32" else 2.0**-10 if dtype == "float16" else 2**-7
        mine, theirs = (np.asarray(target.get(x), dtype=np.float64) for x in (outputs, expected))
        np.testing.assert_allclose(mine, theirs, rtol=unit, atol=unit)
        assert outputs.dtype == expected.dtype
        state: Any = reference.state
        if state.exact.n == 18:
            continue  # the decoder has absorbed half a window already
        assert_same(contents(target, decoder.sketch()), contents(target, reference))
    assert decoder.n_seen == decoder.sketch().n_seen == N
    assert_same(contents(target, sketch), before)  # the decoder works on a copy


def test_every_token_launches_the_same(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """One recording serves all tokens, also after half a window was absorbed."""
    if not target.emulated:
        pytest.skip("launches are recorded in the emulation")
    sketch, arrays = stream(target)
    decoder = Decoder(sketch)
    token = [target.put(x[:, :, :1]) for x in arrays]
    kept: list[Any] = []
    empty = type(target.device).empty

    def keeping(device: Any, *shape: Any) -> Any:
        kept.append(empty(device, *shape))  # as a recording keeps what it allocates
        return kept[-1]

    monkeypatch.setattr(type(target.device), "empty", keeping)
    launches = target.launches
    launches.clear()
    replayed = decoder.step(*token)
    recorded = list(launches)
    assert [launch.kernel for launch in recorded] == ["append_token", "attend_split", "attend_join"]
    for i in range(100, N):
        for place, x in zip(token, arrays, strict=True):
            place[...] = target.put(x[:, :, i : i + 1])
        launches.clear()
        eager = decoder.step(*token)
        for first, later in zip(recorded, launches, strict=True):
            assert (first.kernel, first.blocks, first.module) == (later.kernel, later.blocks, later.module)
            # All arguments are equal, except the addresses of the outputs and of their pieces.
            same = [a == b for a, b in zip(first.arguments, later.arguments, strict=True)]
            assert same.count(False) == {"append_token": 0, "attend_split": 2, "attend_join": 4}[first.kernel]
        for launch in recorded:  # a replay, which writes over the token that was not kept
            target.device.run(launch)
        np.testing.assert_array_equal(target.get(replayed), target.get(eager))
        decoder.advance()


def test_a_token_that_is_not_kept_leaves_no_trace(target: Target) -> None:
    sketch, arrays = stream(target)
    decoder, other = Decoder(sketch), Decoder(sketch)
    tokens = [[target.put(x[:, :, i : i + 1]) for x in arrays] for i in range(100, 104)]
    for token in tokens[:3]:
        decoder.step(*token)
    decoder.advance()
    other.step(*tokens[2])
    other.advance()
    assert_same(contents(target, decoder.sketch()), contents(target, other.sketch()))
    assert decoder.n_seen == 101


def test_returned_sketches_are_independent(target: Target) -> None:
    sketch, arrays = stream(target)
    decoder = Decoder(sketch)
    token = [target.put(x[:, :, 100:101]) for x in arrays]
    decoder.step(*token)
    decoder.advance()
    first, second = decoder.sketch(), decoder.sketch()
    before = contents(target, second)
    for i in range(101, N):
        first.step(*(target.put(x[:, :, i : i + 1]) for x in arrays))
    decoder.step(*token)
    decoder.advance()
    assert_same(contents(target, second), before)
    assert "n_seen=102" in repr(decoder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_clusters": None, "delta": 1.0}, "does not go with delta"),
        ({"residual_samples": 4}, "does not go with residual_samples"),
        ({"check_finite": True}, "does not go with check_finite"),
        ({"max_clusters": subgen.Power(1, 0.5)}, "grows: give a number"),
        ({"max_clusters": None, "compression_ratio": 0.9}, "grows: give a number"),
        ({"max_clusters": 4000}, "the sketch has 88 of its later clusters after 100 tokens: update it until"),
        ({"max_clusters": 90}, "the sketch has 88 of its 90 clusters"),
    ],
)
def test_sketches_without_fixed_addresses_are_refused(target: Target, options: dict[str, Any], message: str) -> None:
    x = target.put(np.random.default_rng(1).normal(size=(1, 1, 100, 8)).astype(np.float32))
    sketch = subgen.AttentionSketch(**{**OPTIONS, **options})
    with pytest.raises(ValueError, match="the sketch is empty"):
        Decoder(sketch)
    sketch.update(x, x, queries=x)
    with pytest.raises(ValueError, match=message):
        Decoder(sketch)


def test_other_sketches_and_tokens_are_refused(target: Target) -> None:
    x = target.put(np.random.default_rng(1).normal(size=(1, 1, 100, 8)).astype(np.float32))
    paper = subgen.AttentionSketch.paper(delta=1.0, samples_per_cluster=1, value_samples=1)
    with pytest.raises(TypeError, match="needs a default AttentionSketch, got <AttentionSketch Algorithm1"):
        Decoder(paper)
    with pytest.raises(TypeError, match="got 3"):
        Decoder(3)  # type: ignore[arg-type]
    sketch, arrays = stream(target)
    decoder = Decoder(sketch)
    token = [target.put(x[:, :, :2]) for x in arrays]
    with pytest.raises(ValueError, match="one token at a time, got 2"):
        decoder.step(*token)
    with pytest.raises(ValueError, match="the stream has keys"):
        decoder.step(x[:, :, :1], x[:, :, :1], x[:, :, :1])
    many = target.put(np.repeat(arrays[0], 8, axis=1)[:, :, :1])
    with pytest.raises(ValueError, match="the kernels do not take 32 query heads of a group with head_dim 8"):
        decoder.step(many, *(x[:, :, :1] for x in token[1:]))
    assert decoder.n_seen == 100


@pytest.mark.gpu
@pytest.mark.parametrize("sketch_target", ["gpu", "gpu_for_torch"], indirect=True)
def test_a_graph_is_replayed_for_each_token(target: Target) -> None:
    sketch, arrays = stream(target, "bfloat16")
    reference = sketch.continued(sketch.layout, sketch.state)
    decoder, token = Decoder(sketch), [target.put(x[:, :, :1]) for x in arrays]
    if target.library == "cupy":
        replay, outputs = capture(lambda: decoder.step(*token))
    else:
        import torch

        decoder.step(*token)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = decoder.step(*token)
        replay = graph.replay
    for i in range(100, N):
        for place, x in zip(token, arrays, strict=True):
            place[...] = target.put(x[:, :, i : i + 1])
        replay()
        decoder.advance()
        mine, theirs = (np.asarray(target.get(x), np.float64) for x in (outputs, reference.step(*token)))
        np.testing.assert_allclose(mine, theirs, rtol=2**-7, atol=2**-7)
    assert decoder.n_seen == N


def test_arrays_of_other_libraries_are_refused() -> None:
    x = np.random.default_rng(1).normal(size=(1, 1, 100, 8)).astype(np.float32)
    sketch = subgen.AttentionSketch(**OPTIONS)
    sketch.update(x, x, queries=x)
    assert backends.get("cupy") is BACKEND
    with pytest.raises(TypeError, match=r"take arrays of CuPy, or tensors of torch on a CUDA device: got .*ndarray"):
        Decoder(sketch)
