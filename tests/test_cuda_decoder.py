"""`subgen_cupy.Decoder`: the same launches for every token, and what the sketch would hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_labs import DTYPES, Lab
from subgen_cupy import BACKEND, Decoder, capture
from test_cuda_kernels import GPUS, library  # noqa: F401

import subgen
from subgen import backends

OPTIONS: dict[str, Any] = {"max_clusters": 24, "window": 16, "sink": 2, "check_finite": False}
N = 130


@pytest.fixture
def lab(library: Lab) -> Lab:  # noqa: F811
    return library


def stream(
    lab: Lab, dtype: str = "float16", n: int = N, before: int = 100, storage: Any = "input"
) -> tuple[Any, list[np.ndarray]]:
    """A sketch of all but the last tokens, and queries, keys and values."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(2, heads, n, 8)).astype(DTYPES[dtype]) for heads in (8, 2, 2)]
    queries, keys, values = (lab.put(x[:, :, :before]) for x in arrays)
    sketch = subgen.AttentionSketch(**OPTIONS, storage=storage)
    sketch.update(keys, values, queries)
    return sketch, arrays


def held(lab: Lab, sketch: Any) -> list[np.ndarray]:
    """What a sketch holds, room left out."""
    state = sketch.state
    used, window = state.n_means + state.n_exact, len(state.asked)
    arrays = [state.keys[:, :used], state.values[:, :used], state.counts, state.spread, state.importance]
    arrays += [state.queries.codes[:, :window], state.queries.scales[:, :window]]
    arrays += [] if state.nearest is None else [state.nearest]
    for codes in (state.key_codes, state.value_codes):
        arrays += [] if codes is None else [codes.codes, codes.scales]
    return [np.asarray(lab.get(x), dtype=np.float64) for x in arrays]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("few", "storage"), [(4, "input"), (768, "input"), (768, "int8")])
def test_it_holds_and_answers_what_the_sketch_does(
    lab: Lab, dtype: str, few: int, storage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any filling of the window on; to the last bit, also where clusters remember their nearest others."""
    monkeypatch.setattr(subgen.means, "FEW_CLUSTERS", few)
    sketch, arrays = stream(lab, dtype, storage=storage)
    decoder, before = Decoder(sketch), held(lab, sketch)
    assert decoder.n_seen == 100
    # What is replayed reads its token where it was when the launches were recorded.
    token = [lab.put(x[:, :, :1]) for x in arrays]
    reference = sketch.continued(sketch.layout, sketch.state)
    for i in range(100, N):
        for place, x in zip(token, arrays, strict=True):
            place[...] = lab.put(x[:, :, i : i + 1])
        outputs = decoder.step(*token)
        decoder.advance()
        expected = reference.step(*token)
        # The keys are cut into other pieces: sums of float32 in another order, rounded to the dtype of the input.
        unit = float(np.finfo(np.float32).eps) * 64 if dtype == "float32" else 2.0**-10 if dtype == "float16" else 2**-7
        mine, theirs = (np.asarray(lab.get(x), dtype=np.float64) for x in (outputs, expected))
        np.testing.assert_allclose(mine, theirs, rtol=unit, atol=unit)
        assert outputs.dtype == expected.dtype
        state: Any = reference.state
        if state.n_exact == 18:
            continue  # the decoder has made room already
        for mine, theirs in zip(held(lab, decoder.sketch()), held(lab, reference), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert decoder.n_seen == decoder.sketch().n_seen == N
    for now, then in zip(held(lab, sketch), before, strict=True):
        np.testing.assert_array_equal(now, then)  # what it was made from is as it was


def test_what_is_launched_is_the_same_for_every_token(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """So one recording serves them all, also after half a window joined the clusters."""
    if lab.name in GPUS:
        pytest.skip("launches are recorded in the emulation")
    sketch, arrays = stream(lab)
    decoder = Decoder(sketch)
    token = [lab.put(x[:, :, :1]) for x in arrays]
    kept: list[Any] = []
    empty = type(lab.device).empty

    def keeping(device: Any, *shape: Any) -> Any:
        kept.append(empty(device, *shape))  # as a recording keeps what it allocates
        return kept[-1]

    monkeypatch.setattr(type(lab.device), "empty", keeping)
    launches = lab.device.launches  # type: ignore[attr-defined]
    launches.clear()
    replayed = decoder.step(*token)
    recorded = list(launches)
    assert [launch.kernel for launch in recorded] == ["take_in", "attend_split", "attend_join"]
    for i in range(100, N):
        for place, x in zip(token, arrays, strict=True):
            place[...] = lab.put(x[:, :, i : i + 1])
        launches.clear()
        eager = decoder.step(*token)
        for first, later in zip(recorded, launches, strict=True):
            assert (first.kernel, first.blocks, first.module) == (later.kernel, later.blocks, later.module)
            # All arguments are equal, but for where the answers and the pieces of them go.
            same = [a == b for a, b in zip(first.arguments, later.arguments, strict=True)]
            assert same.count(False) == {"take_in": 0, "attend_split": 2, "attend_join": 4}[first.kernel]
        for launch in recorded:  # a replay, which writes over the token that was not kept
            lab.device.run(launch)
        np.testing.assert_array_equal(lab.get(replayed), lab.get(eager))
        decoder.advance()


def test_a_token_that_is_not_kept_leaves_no_trace(lab: Lab) -> None:
    sketch, arrays = stream(lab)
    decoder, other = Decoder(sketch), Decoder(sketch)
    tokens = [[lab.put(x[:, :, i : i + 1]) for x in arrays] for i in range(100, 104)]
    for token in tokens[:3]:
        decoder.step(*token)
    decoder.advance()
    other.step(*tokens[2])
    other.advance()
    for mine, theirs in zip(held(lab, decoder.sketch()), held(lab, other.sketch()), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert decoder.n_seen == 101


def test_sketches_that_are_given_back_go_on_by_themselves(lab: Lab) -> None:
    sketch, arrays = stream(lab)
    decoder = Decoder(sketch)
    token = [lab.put(x[:, :, 100:101]) for x in arrays]
    decoder.step(*token)
    decoder.advance()
    first, second = decoder.sketch(), decoder.sketch()
    before = held(lab, second)
    for i in range(101, N):
        first.step(*(lab.put(x[:, :, i : i + 1]) for x in arrays))
    decoder.step(*token)
    decoder.advance()
    for now, then in zip(held(lab, second), before, strict=True):
        np.testing.assert_array_equal(now, then)
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
def test_sketches_whose_arrays_cannot_stay(lab: Lab, options: dict[str, Any], message: str) -> None:
    x = lab.put(np.random.default_rng(1).normal(size=(1, 1, 100, 8)).astype(np.float32))
    sketch = subgen.AttentionSketch(**{**OPTIONS, **options})
    with pytest.raises(ValueError, match="the sketch is empty"):
        Decoder(sketch)
    sketch.update(x, x, x)
    with pytest.raises(ValueError, match=message):
        Decoder(sketch)


def test_what_is_no_such_sketch_and_no_such_token(lab: Lab) -> None:
    x = lab.put(np.random.default_rng(1).normal(size=(1, 1, 100, 8)).astype(np.float32))
    paper = subgen.AttentionSketch.paper(delta=1.0, samples_per_cluster=1, value_samples=1)
    with pytest.raises(TypeError, match="needs a default AttentionSketch, got <AttentionSketch Paper"):
        Decoder(paper)
    with pytest.raises(TypeError, match="got 3"):
        Decoder(3)  # type: ignore[arg-type]
    sketch, arrays = stream(lab)
    decoder = Decoder(sketch)
    token = [lab.put(x[:, :, :2]) for x in arrays]
    with pytest.raises(ValueError, match="one token at a time, got 2"):
        decoder.step(*token)
    with pytest.raises(ValueError, match="the stream has keys"):
        decoder.step(x[:, :, :1], x[:, :, :1], x[:, :, :1])
    many = lab.put(np.repeat(arrays[0], 8, axis=1)[:, :, :1])
    with pytest.raises(ValueError, match="the kernels do not take 32 query heads of a group with head_dim 8"):
        decoder.step(many, *(x[:, :, :1] for x in token[1:]))
    assert decoder.n_seen == 100


@pytest.mark.gpu
@pytest.mark.parametrize("library", GPUS, indirect=True)
def test_a_graph_is_replayed_for_each_token(lab: Lab) -> None:
    sketch, arrays = stream(lab, "bfloat16")
    reference = sketch.continued(sketch.layout, sketch.state)
    decoder, token = Decoder(sketch), [lab.put(x[:, :, :1]) for x in arrays]
    if lab.name == "gpu":
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
            place[...] = lab.put(x[:, :, i : i + 1])
        replay()
        decoder.advance()
        mine, theirs = (np.asarray(lab.get(x), np.float64) for x in (outputs, reference.step(*token)))
        np.testing.assert_allclose(mine, theirs, rtol=2**-7, atol=2**-7)
    assert decoder.n_seen == N


def test_arrays_that_no_kernel_serves() -> None:
    x = np.random.default_rng(1).normal(size=(1, 1, 100, 8)).astype(np.float32)
    sketch = subgen.AttentionSketch(**OPTIONS)
    sketch.update(x, x, x)
    assert backends.get("cupy") is BACKEND
    with pytest.raises(TypeError, match=r"take arrays of CuPy, or tensors of torch on a CUDA device: got .*ndarray"):
        Decoder(sketch)
