"""The kernels of attend.cu: weighted attention over clusters and exact tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cuda_targets
import numpy as np
import pytest
from cuda_cases import TOLERANCE, make_clusters, random_quantized, random_vectors, weighted_attention
from cuda_targets import DTYPES, Target
from subgen_cupy.attend import attention

from subgen.default.attend import log_weights
from subgen.default.merging import bands
from subgen.default.quantization import dequantize

Draw = Callable[[int], tuple[np.ndarray, np.ndarray]]


def attention_case(
    rng: np.random.Generator, dtype: str, head_dim: int, value_dim: int, streams: int, rows: int
) -> tuple[np.ndarray, Draw]:
    """Draw scaled queries, and return a function that draws n keys and values."""

    def draw(n: int) -> tuple[np.ndarray, np.ndarray]:
        return random_vectors(rng, dtype, streams, n, head_dim), random_vectors(rng, dtype, streams, n, value_dim)

    return random_vectors(rng, "float32", streams, rows, head_dim), draw


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim"),
    [
        ("float32", 64, 64),
        ("float32", 128, 128),
        ("float32", 3, 5),
        ("float16", 80, 80),
        ("float16", 128, 128),
        ("bfloat16", 8, 64),
        ("bfloat16", 64, 64),
        ("bfloat16", 128, 128),
        ("bfloat16", 288, 256),
    ],
)
def test_a_decoding_step_over_exact_tokens_and_clusters(
    target: Target, dtype: str, head_dim: int, value_dim: int, seed: int
) -> None:
    target = target.seeded(seed)
    rng = np.random.default_rng(seed)
    streams, rows = 3, (4, 7, 5)[seed - 1]
    n, c = ((37, 53), (1, 300), (130, 1))[seed - 1]
    queries, draw = attention_case(rng, dtype, head_dim, value_dim, streams, rows)
    means, exact = draw(c), draw(n)
    counts = rng.integers(0, 6, size=(streams, c))
    counts[:, 0] = 1
    variance = rng.random((streams, c, bands(head_dim))) * 0.2
    variance = variance.astype(DTYPES[dtype] if head_dim == value_dim else np.float32)
    # The front of a buffer with free space behind it, which is not read.
    buffers = [target.put(np.concatenate([x, np.full_like(x[:, : seed - 1], np.nan)], axis=1)) for x in exact]
    clusters = target.put(make_clusters(*means, counts, variance))
    got = attention(target.device, target.put(queries), *(x[:, :n] for x in buffers), clusters)

    wide = queries.astype(np.float64)
    weights = np.concatenate([log_weights(wide, counts, variance), np.zeros((streams, rows, n))], axis=-1)
    keys, values = (np.concatenate(pair, axis=1) for pair in zip(means, exact, strict=True))
    outputs, logsumexp = weighted_attention(wide, keys, values, weights)
    np.testing.assert_allclose(target.get(got[0]), outputs, **TOLERANCE)
    np.testing.assert_allclose(target.get(got[1]), logsumexp, **TOLERANCE)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "value_dim"),
    [("float32", 64, 64), ("float32", 3, 5), ("float16", 128, 128), ("bfloat16", 64, 64), ("bfloat16", 6, 288)],
)
def test_int8_means_are_read_without_a_copy(
    target: Target, dtype: str, head_dim: int, value_dim: int, seed: int
) -> None:
    target = target.seeded(seed)
    rng = np.random.default_rng(seed)
    n, c = ((37, 300), (1, 5))[seed - 1]
    queries, draw = attention_case(rng, dtype, head_dim, value_dim, 2, 5)
    keys, values = draw(n + 3)
    means = random_quantized(rng, c, head_dim, dtype), random_quantized(rng, c, value_dim, dtype)
    counts = rng.integers(0, 6, size=(2, c))
    variance = (rng.random((2, c, bands(head_dim))) * 0.2).astype(DTYPES[dtype])
    exact = [target.put(x)[:, :n] for x in (keys, values)]  # behind them is free space
    clusters = target.put(make_clusters(*means, counts, variance))
    got = attention(target.device, target.put(queries), *exact, clusters)
    whole = [
        np.concatenate([dequantize(mean, np.float64), x[:, :n].astype(np.float64)], axis=1)
        for mean, x in zip(means, (keys, values), strict=True)
    ]
    wide = queries.astype(np.float64)
    weights = np.concatenate([log_weights(wide, counts, variance), np.zeros((2, 5, n))], axis=-1)
    for mine, expected in zip(got, weighted_attention(wide, *whole, weights), strict=True):
        np.testing.assert_allclose(target.get(mine), expected, **TOLERANCE)


@pytest.mark.parametrize("quantized", [False, True])
def test_clusters_of_more_tokens_than_32_bits_count(target: Target, quantized: bool) -> None:
    rng = np.random.default_rng(5)
    queries, draw = attention_case(rng, "float32", 8, 8, 2, 3)
    means: list[Any] = [random_quantized(rng, 40, 8, "float32") for _ in range(2)] if quantized else list(draw(40))
    exact = draw(4)
    counts = rng.integers(0, 6, size=(2, 40)) << rng.integers(0, 60, size=(2, 40))
    variance = (rng.random((2, 40, 4)) * 0.2).astype(np.float32)
    clusters = make_clusters(*means, counts, variance)
    got = attention(target.device, *map(target.put, (queries, *exact)), target.put(clusters))
    if quantized:
        means = [dequantize(x, np.float64) for x in means]
    whole = [np.concatenate(pair, axis=1) for pair in zip(means, exact, strict=True)]
    wide = queries.astype(np.float64)
    weights = np.concatenate([log_weights(wide, counts, variance), np.zeros((2, 3, 4))], axis=-1)
    for mine, expected in zip(got, weighted_attention(wide, *whole, weights), strict=True):
        # Logits of up to 60.
        np.testing.assert_allclose(target.get(mine), expected, rtol=2e-5, atol=1e-4)


def test_counts_have_64_bits(target: Target) -> None:
    """Of two clusters with the same mean key and no variance, the share is that of their counts."""
    rng = np.random.default_rng(8)
    queries, draw = attention_case(rng, "float32", 8, 8, 1, 3)
    (keys, values), exact = draw(2), draw(1)
    keys[:, 1] = keys[:, 0]
    # The lower 32 bits of the second are those of the number 7.
    counts = np.array([[5 << 33, (3 << 32) + 7]])
    clusters = make_clusters(keys, values, counts, np.zeros((1, 2, 4), np.float32))
    got = attention(target.device, *map(target.put, (queries, *exact)), target.put(clusters))
    weights = np.concatenate([np.broadcast_to(np.log(counts), (1, 3, 2)), np.zeros((1, 3, 1))], axis=-1)
    both = [np.concatenate(pair, axis=1) for pair in zip((keys, values), exact, strict=True)]
    for mine, expected in zip(got, weighted_attention(queries, *both, weights), strict=True):
        np.testing.assert_allclose(target.get(mine), expected, **TOLERANCE)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 3), (1, 3)])
def test_log_weights_of_every_shape(target: Target, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(4)
    queries, draw = attention_case(rng, "float32", 64, 64, 2, 3)
    keys, values = draw(70)
    weights = rng.normal(size=(*shape, 70)).astype(np.float32)
    weights[..., rng.random(70) < 0.3] = -np.inf
    weights[-1, -1, :] = -np.inf
    keys[:, np.isneginf(weights).all(axis=(0, 1))] = np.nan  # a key without weight in any row is not read
    got = attention(target.device, *map(target.put, (queries, keys, values)), log_weights=target.put(weights))
    expected = weighted_attention(queries, np.nan_to_num(keys), values, np.broadcast_to(weights, (2, 3, 70)))
    np.testing.assert_allclose(target.get(got[0]), expected[0], **TOLERANCE)
    np.testing.assert_allclose(target.get(got[1]), expected[1], **TOLERANCE)
    assert np.isneginf(target.get(got[1])[-1, -1])
    assert not target.get(got[0])[-1, -1].any()


def test_logits_of_any_size(target: Target) -> None:
    rng = np.random.default_rng(5)
    queries, draw = attention_case(rng, "float32", 64, 64, 1, 4)
    keys, values = draw(40)
    weights = np.float32([[[1e4]], [[-1e4]]]) + np.zeros((2, 1, 40), dtype=np.float32)
    both = [np.concatenate([x, x]) for x in (queries * 30, keys, values)]
    got = attention(target.device, *map(target.put, both), log_weights=target.put(weights))
    expected = weighted_attention(*both, np.broadcast_to(weights, (2, 4, 40)))
    # Logits of order 1e4 in float32 are known to 1e-3: so are the weights, relatively.
    np.testing.assert_allclose(target.get(got[0]), expected[0], rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(target.get(got[1]), expected[1], rtol=1e-6)


def test_arrays_that_start_anywhere_and_lie_in_any_order(target: Target) -> None:
    rng = np.random.default_rng(6)
    queries, draw = attention_case(rng, "bfloat16", 64, 64, 2, 4)
    keys, values = draw(11)
    expected = weighted_attention(queries, keys, values, np.zeros((2, 4, 11)))
    shifted = [target.put(np.concatenate([x[..., :1], x], axis=-1))[..., 1:] for x in (queries, keys, values)]
    turned = [target.put(np.ascontiguousarray(x.swapaxes(0, 1))).swapaxes(0, 1) for x in (queries, keys, values)]
    for arrays in (shifted, turned):
        got = attention(target.device, *arrays)
        np.testing.assert_allclose(target.get(got[0]), expected[0], **TOLERANCE)


def test_the_front_of_a_buffer_is_read_in_place(target: Target) -> None:
    buffer = target.put(np.zeros((3, 20, 8), dtype=np.float16))
    for view, copied in ((buffer, False), (buffer[:, :7], False), (buffer[1:, :7], False), (buffer[..., :4], True)):
        x, step = target.device.streams(view)
        assert (target.device.pointer(x) != target.device.pointer(view)) == copied
        assert step == (20 * 4 if copied else 20 * 8)
    assert target.device.streams(buffer[:1, :7])[1] == 7 * 8


@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("n", [0, 1, 65])
def test_any_number_of_rows_and_of_exact_tokens(target: Target, rows: int, n: int) -> None:
    rng = np.random.default_rng(rows)
    queries, draw = attention_case(rng, "bfloat16", 64, 64, 1, rows)
    means, exact = draw(3), draw(n)
    clusters = target.put(make_clusters(*means, np.ones((1, 3), np.int64), np.zeros((1, 3, 4), np.float32)))
    got = attention(target.device, *map(target.put, (queries, *exact)), clusters)
    keys, values = (np.concatenate(pair, axis=1) for pair in zip(means, exact, strict=True))
    expected = weighted_attention(queries, keys, values, np.zeros((1, rows, n + 3)))
    np.testing.assert_allclose(target.get(got[0]), expected[0], **TOLERANCE)
    np.testing.assert_allclose(target.get(got[1]), expected[1], **TOLERANCE)


def test_a_decoding_step_is_two_launches_and_copies_nothing() -> None:
    target = cuda_targets.emulation()
    rng = np.random.default_rng(7)
    queries, draw = attention_case(rng, "bfloat16", 64, 64, 2, 4)
    means, exact = draw(9), draw(16)
    clusters = make_clusters(*means, np.ones((2, 9), np.int64), np.zeros((2, 9, 4), DTYPES["bfloat16"]))
    attention(target.device, queries, *(x[:, :9] for x in exact), clusters)
    split, join = target.launches
    assert (split.kernel, join.kernel) == ("attend_split", "attend_join")
    given = {x.ctypes.data for x in (queries, *exact, *means, clusters.counts, clusters.key_variance)}
    assert given <= {int(x) for x in split.arguments if isinstance(x, np.uint64)}
