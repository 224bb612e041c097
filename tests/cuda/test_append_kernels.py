"""The kernels of append.cu: a token of a decoding step, and queries in int8."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from cuda_cases import make_clusters, make_state, random_quantized, random_vectors, upcast, weighted_attention
from cuda_targets import DTYPES, Target
from subgen_cupy.append import count_tokens, decode_token, quantize

from subgen.backends import PORTABLE
from subgen.default.attend import log_weights
from subgen.default.merging import bands
from subgen.default.quantization import dequantize
from subgen.default.quantization import quantize as quantize_by_rows
from subgen.default.state import Quantized, State

CAPACITY = 12


def token_case(
    dtype: str, n_exact: int, n_clusters: int, dims: tuple[int, int], group: int, quantized: bool = False
) -> tuple[State, list[np.ndarray]]:
    """Make a state of two streams with NaN behind the exact tokens; and queries, key and value of a token."""
    rng = np.random.default_rng(n_exact)
    buffers = [random_vectors(rng, dtype, 2, CAPACITY, dim) for dim in dims]
    for x in buffers:
        x[:, n_exact:] = np.nan
    means = [
        random_quantized(rng, n_clusters, dim, dtype) if quantized else random_vectors(rng, dtype, 2, n_clusters, dim)
        for dim in dims
    ]
    variance = (rng.random((2, n_clusters, bands(dims[0]))) * 0.2).astype(DTYPES[dtype])
    clusters = make_clusters(*means, rng.integers(0, 5, size=(2, n_clusters)), variance)
    codes = rng.integers(-127, 128, size=(2, CAPACITY, dims[0])).astype(np.int8)
    queries = Quantized(codes, rng.random((2, CAPACITY)).astype(np.float32))
    state = make_state(clusters, *buffers, queries, n_exact, 1000 * bool(n_clusters) + n_exact)
    return state, [random_vectors(rng, dtype, 2, *shape) for shape in ((group, dims[0]), (1, dims[0]), (1, dims[1]))]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("n_exact", "n_clusters", "dims", "group"),
    [(0, 0, (8, 8), 1), (2, 0, (64, 64), 4), (3, 40, (64, 64), 4), (11, 40, (8, 24), 3), (7, 300, (128, 128), 16)],
)
@pytest.mark.parametrize(("counted", "quantized"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_token_is_appended_and_answered(
    target: Target,
    dtype: str,
    n_exact: int,
    n_clusters: int,
    dims: tuple[int, int],
    group: int,
    counted: bool,
    quantized: bool,
) -> None:
    """Whether its place is an argument or a number on the device; with means of either storage."""
    given, token = token_case(dtype, n_exact, n_clusters, dims, group, quantized)
    state = target.put(given)
    counters = None
    if counted:
        counters = target.put(np.zeros(2, np.int64))
        count_tokens(target.device, counters, state.exact.n, state.n_seen)
        # The same is launched for every token, so it cannot depend on these.
        state = replace(state, exact=replace(state.exact, n=5), n_seen=77)
    outputs = target.get(decode_token(target.device, state, *map(target.put, token), 0.3, counters))

    queries, key, value = token
    rows = queries.astype(np.float32) * np.float32(0.3)
    exact = given.exact
    exact.keys[:, n_exact], exact.values[:, n_exact] = key[:, 0], value[:, 0]
    # Every token keeps a query, those at the front too.
    kept = quantize_by_rows(rows[:, given.n_seen % group][:, None], np.dtype("float32"))
    exact.queries.codes[:, n_exact], exact.queries.scales[:, n_exact] = kept.codes[:, 0], kept.scales[:, 0]
    got = target.get(state.exact)  # written in place
    for mine, expected in [
        (upcast(got.keys), upcast(exact.keys)),
        (upcast(got.values), upcast(exact.values)),
        (got.queries.codes, exact.queries.codes),
        (got.queries.scales, exact.queries.scales),
    ]:
        np.testing.assert_array_equal(mine, expected)

    wide, clusters = rows.astype(np.float64), given.clusters
    keys, values = (x[:, : n_exact + 1].astype(np.float64) for x in (exact.keys, exact.values))
    weights = np.zeros((2, group, n_exact + 1))
    if n_clusters:
        of_clusters = log_weights(wide, clusters.counts, clusters.key_variance)
        weights = np.concatenate([of_clusters, weights], axis=-1)
    means = [
        dequantize(x, np.float64) if isinstance(x, Quantized) else x.astype(np.float64)
        for x in (clusters.keys, clusters.values)
    ]
    keys, values = (np.concatenate(pair, axis=1) for pair in zip(means, (keys, values), strict=True))
    expected, _ = weighted_attention(wide, keys, values, weights)
    assert outputs.dtype == DTYPES[dtype]
    # Answers are rounded to the dtype of the input, once.
    unit = float(ml_dtypes.finfo(DTYPES[dtype]).eps)
    np.testing.assert_allclose(outputs.astype(np.float64), expected, rtol=2e-5 + unit / 2, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_answer_beyond_the_dtype_is_its_largest_number(target: Target, dtype: str) -> None:
    state, (queries, key, value) = token_case(dtype, 0, 0, (8, 8), 1)
    largest = float(ml_dtypes.finfo(DTYPES[dtype]).max)
    value[0], value[1] = largest, -largest
    outputs = decode_token(target.device, target.put(state), *map(target.put, (queries, key, value)), 1.0)
    np.testing.assert_array_equal(target.get(outputs), np.broadcast_to(value, (2, 1, 8)))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("group", [1, 3])
def test_quantized_queries_equal_the_portable_ones(target: Target, dtype: str, group: int) -> None:
    rng = np.random.default_rng(14)
    x = rng.normal(size=(2, group, 11, 70)) * 10.0 ** rng.integers(-6, 4, size=(2, group, 11, 1))
    x = x.astype(DTYPES[dtype])
    x[0, 0, 3], x[1, 0, 2, ::2] = 0.0, 2.5
    wide = x.astype(np.float32)
    # Part of a block: its heads are strided.
    for part, first in ((slice(0, 11), 0), (slice(4, 5), 7), (slice(0, 7), 2)):
        rows = target.put(x.reshape(2 * group, 11, 70))[:, part]
        got = quantize(target.device, rows, group, 0.3, first)
        expected = PORTABLE["quantize_queries"](wide[:, :, part], 0.3, first, np.dtype("float32"))
        np.testing.assert_array_equal(target.get(got.codes), expected.codes)
        np.testing.assert_array_equal(target.get(got.scales), expected.scales)
