"""Exact and weighted attention against NumPy written out, on every library."""

from __future__ import annotations

import numpy as np
import pytest
from libraries import Library, to_numpy

import subgen
from subgen.backends import PORTABLE, get
from subgen.softmax import merge_attention

# Attention in float32 loses a few units of the last place per term; 1e-5 relative to values of order 1.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, causal: bool) -> np.ndarray:
    """softmax(scale q k^T) v for one head, in float64."""
    logits = scale * q.astype(np.float64) @ k.astype(np.float64).T
    if causal:
        m, n = logits.shape
        logits[np.arange(n)[None, :] > np.arange(n - m, n)[:, None]] = -np.inf
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights @ v / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("leading", "q_heads", "kv_heads"), [((), None, None), ((), 6, 2), ((2, 3), 4, 4)])
def test_matches_attention_written_out(
    library: Library, leading: tuple, q_heads: int | None, kv_heads: int | None, causal: bool
) -> None:
    rng = np.random.default_rng(1)
    m, n, d, e = 5, 9, 4, 3
    q = rng.normal(size=(*leading, *([q_heads] if q_heads else []), m, d)).astype(np.float32)
    k = rng.normal(size=(*leading, *([kv_heads] if kv_heads else []), n, d)).astype(np.float32)
    v = rng.normal(size=(*k.shape[:-1], e)).astype(np.float32)
    got = to_numpy(subgen.attention(*map(library.array, (q, k, v)), scale=0.7, causal=causal))
    assert got.shape == (*q.shape[:-1], e)
    group = q_heads // kv_heads if q_heads and kv_heads else 1
    flat_q, flat_k, flat_v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    expected = np.stack(
        [plain(head, flat_k[h // group], flat_v[h // group], 0.7, causal) for h, head in enumerate(flat_q)]
    )
    np.testing.assert_allclose(got.reshape(expected.shape), expected, **TOLERANCE)


def test_default_scale_is_that_of_the_field() -> None:
    rng = np.random.default_rng(2)
    q, k, v = rng.normal(size=(3, 6, 16))
    np.testing.assert_array_equal(subgen.attention(q, k, v), subgen.attention(q, k, v, scale=0.25))


@pytest.mark.parametrize("limit", [1000, 300, 100, 10], ids=["queries", "streams", "keys", "a few keys"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_long_contexts_are_cut_into_pieces_with_the_same_result(
    monkeypatch: pytest.MonkeyPatch, limit: int, causal: bool, dtype: str
) -> None:
    rng = np.random.default_rng(3)
    q = rng.normal(size=(4, 50, 8)).astype(dtype)
    k, v = rng.normal(size=(2, 2, 70, 8)).astype(dtype)
    whole = subgen.attention(q, k, v, causal=causal)
    monkeypatch.setattr("subgen._array.TRANSIENT_NUMBERS", limit)
    tolerance = 1e-3 if dtype == "float16" else 1e-12  # the last bit of a result in 16 bits is 5e-4 of it
    np.testing.assert_allclose(subgen.attention(q, k, v, causal=causal), whole, rtol=tolerance, atol=tolerance)


def test_huge_logits_and_zero_vectors(library: Library) -> None:
    k = np.asarray([[100.0, 0.0], [0.0, 100.0], [0.0, 0.0]], dtype=np.float32)
    v = np.asarray([[1.0], [2.0], [3.0]], dtype=np.float32)
    q = np.asarray([[100.0, 0.0], [0.0, -100.0], [0.0, 0.0]], dtype=np.float32)  # logits of 1e4
    got = to_numpy(subgen.attention(*map(library.array, (q, k, v)), scale=1.0))
    np.testing.assert_allclose(got[:, 0], [1.0, 2.0, 2.0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_output_has_the_dtype_of_the_input(dtype: str) -> None:
    q, k, v = np.random.default_rng(4).normal(size=(3, 7, 8)).astype(dtype)
    got = subgen.attention(q, k, v)
    assert got.dtype == dtype
    expected = plain(q, k, v, 8**-0.5, False)
    np.testing.assert_allclose(got, expected, atol=2e-3 if dtype == "float16" else 1e-5)


def test_bfloat16_of_torch() -> None:
    torch = pytest.importorskip("torch")
    q, k, v = torch.randn(3, 2, 7, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    got = subgen.attention(q, k, v)
    assert got.dtype == torch.bfloat16
    expected = plain(*(x[0].float().numpy() for x in (q, k, v)), 8**-0.5, False)
    np.testing.assert_allclose(got[0].float().numpy(), expected, atol=1e-2)


def weighted(rng: np.random.Generator) -> list[np.ndarray]:
    shapes = [(2, 5, 4), (2, 7, 4), (2, 7, 3), (2, 1, 7)]
    q, k, v, w = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    w[0, 0, 3] = -np.inf
    w[1] = -np.inf  # a stream in which nothing has weight
    return [q, k, v, w]


@pytest.mark.parametrize("operation", [PORTABLE["weighted_attention"], get("numpy").operations["weighted_attention"]])
def test_weighted_attention_on_numpy(operation) -> None:
    arrays = weighted(np.random.default_rng(5))
    copies = [x.copy() for x in arrays]
    output, logsumexp = operation(*arrays)
    for x, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(x, copy)
    q, k, v, w = (x[0].astype(np.float64) for x in arrays)
    mass = np.exp(q @ k.T + w)
    np.testing.assert_allclose(logsumexp[0], np.log(mass.sum(axis=-1)), **TOLERANCE)
    np.testing.assert_allclose(output[0], mass @ v / mass.sum(axis=-1, keepdims=True), **TOLERANCE)
    assert np.all(output[1] == 0)
    assert np.all(np.isneginf(logsumexp[1]))


def test_weighted_attention_agrees_between_libraries(library: Library) -> None:
    arrays = weighted(np.random.default_rng(6))
    for got, expected in zip(
        PORTABLE["weighted_attention"](*map(library.array, arrays)),
        PORTABLE["weighted_attention"](*arrays),
        strict=True,
    ):
        np.testing.assert_allclose(to_numpy(got), expected, **TOLERANCE)


def test_partial_answers_merge(library: Library) -> None:
    q, k, v, w = map(library.array, weighted(np.random.default_rng(7)))
    operation = PORTABLE["weighted_attention"]
    whole = operation(q, k, v, w)
    parts = [operation(q, k[:, part, :], v[:, part, :], w[:, :, part]) for part in (slice(0, 3), slice(3, 7))]
    for got, expected in zip(merge_attention(*parts), whole, strict=True):
        np.testing.assert_allclose(to_numpy(got), to_numpy(expected), **TOLERANCE)
