"""The baselines: what every one of them must do, and what each of them is.

A prefix is made of small random tokens; attention over it is compared with the plain softmax written out here.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from subgen.evaluation.baselines import BASELINES, Answers, Prefix, Summary, exact
from subgen.evaluation.baselines.clusters import Moments
from subgen.evaluation.baselines.eviction import snapkv
from subgen.evaluation.baselines.halving import second_of_each_pair
from subgen.evaluation.baselines.nystrom import SignedSummary
from subgen.evaluation.baselines.oracle import Oracle
from subgen.evaluation.baselines.prefix import attention_received
from subgen.evaluation.compare import METHODS, compare
from subgen.io.captures import Capture

STREAMS, N, HEAD_DIM, VALUE_DIM, SINKS, WINDOW = 3, 60, 8, 6, 2, 5

# Algorithm 1 keeps samples of keys and of pairs, not pairs: no sinks, no window, and no budget at which it is exact.
METHODS_OF_WEIGHT = ("halving", "uniform")
PAIRS = sorted(set(BASELINES) - {"algorithm1"})
# Of means, not of tokens.
CLUSTERED = {"momentkv", "reskv"}
EVICTIONS = ["streaming-llm", "h2o", "snapkv", "expected-attention", "keydiff"]


def make_prefix(group: int = 1, dtype: Any = np.float32, seed: int = 0) -> Prefix:
    rng = np.random.default_rng(seed)
    return Prefix(
        queries=(3 * rng.normal(size=(group * STREAMS, N, HEAD_DIM))).astype(dtype),
        keys=rng.normal(size=(STREAMS, N, HEAD_DIM)).astype(dtype),
        values=rng.normal(size=(STREAMS, N, VALUE_DIM)).astype(dtype),
        scale=HEAD_DIM**-0.5,
        sinks=SINKS,
        window=WINDOW,
    )


def make_rows(prefix: Prefix, m: int = 7) -> NDArray[np.float32]:
    rng = np.random.default_rng(99)
    rows = 3 * prefix.scale * rng.normal(size=(prefix.streams, m, HEAD_DIM))
    return rows.astype(np.float32)


def compress(name: str, prefix: Prefix, budget: int, seed: int = 0) -> Answers:
    return BASELINES[name].compress(prefix, budget, np.random.default_rng(seed))


def plain_attention(prefix: Prefix, rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    weights = np.exp(rows.astype(np.float64) @ prefix.keys.astype(np.float64).swapaxes(1, 2))
    total = weights.sum(axis=-1)
    return (weights @ prefix.values.astype(np.float64)) / total[..., None], np.log(total)


def kept_tokens(prefix: Prefix, summary: Summary | SignedSummary) -> list[list[int]]:
    """Find the tokens of the pairs by their keys, which are all different."""
    return [
        [int(np.flatnonzero((keys == key).all(axis=-1))[0]) for key in kept]
        for keys, kept in zip(prefix.keys, summary.keys, strict=True)
    ]


# What every baseline must do


def test_exact_is_attention() -> None:
    prefix = make_prefix()
    rows = make_rows(prefix)
    outputs, logsumexp = exact(prefix).answer(rows)
    expected, expected_logsumexp = plain_attention(prefix, rows)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    np.testing.assert_allclose(logsumexp, expected_logsumexp, atol=1e-5)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("name", BASELINES)
def test_answers_have_the_shape_of_the_queries_and_are_finite(name: str, group: int) -> None:
    prefix = make_prefix(group)
    outputs, logsumexp = compress(name, prefix, 20).answer(make_rows(prefix, 7 * group))
    assert outputs.shape == (STREAMS, 7 * group, VALUE_DIM)
    assert logsumexp.shape == (STREAMS, 7 * group)
    assert np.isfinite(outputs).all()
    assert np.isfinite(logsumexp).all()


@pytest.mark.parametrize("budget", [SINKS + WINDOW, SINKS + WINDOW + 1, 20, N - 1, N])
@pytest.mark.parametrize("name", sorted(set(PAIRS) - {"oracle"} - CLUSTERED))
def test_the_budget_is_used_in_full_with_sinks_and_window_in_it(name: str, budget: int) -> None:
    prefix = make_prefix()
    summary = compress(name, prefix, budget)
    assert isinstance(summary, Summary | SignedSummary)
    assert summary.keys.shape == (STREAMS, budget, HEAD_DIM)
    ends = {*range(SINKS), *range(N - WINDOW, N)}
    for tokens in kept_tokens(prefix, summary):
        assert len(set(tokens)) == budget
        assert ends <= set(tokens)
    weights = summary.log_weights if isinstance(summary, Summary) else np.log(summary.masses[:, [0, 1, -1]])
    np.testing.assert_array_equal(weights[:, [0, 1, -1]], 0.0)


@pytest.mark.parametrize("name", PAIRS)
def test_a_budget_of_all_pairs_is_exact_attention(name: str) -> None:
    prefix = make_prefix(group=2)
    rows = make_rows(prefix)
    outputs, logsumexp = compress(name, prefix, N).answer(rows)
    expected, expected_logsumexp = plain_attention(prefix, rows)
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    np.testing.assert_allclose(logsumexp, expected_logsumexp, atol=1e-5)


@pytest.mark.parametrize("name", BASELINES)
def test_equal_seeds_give_equal_answers(name: str) -> None:
    prefix = make_prefix()
    rows = make_rows(prefix)
    once, again = (compress(name, prefix, 20, seed=3).answer(rows) for _ in range(2))
    np.testing.assert_array_equal(once[0], again[0])
    np.testing.assert_array_equal(once[1], again[1])


@pytest.mark.parametrize("name", ["uniform", "halving", "nystrom", "algorithm1", "reskv"])
def test_other_seeds_give_other_answers(name: str) -> None:
    prefix = make_prefix()
    rows = make_rows(prefix)
    assert not np.array_equal(
        compress(name, prefix, 20, seed=3).answer(rows)[0], compress(name, prefix, 20, seed=4).answer(rows)[0]
    )


@pytest.mark.parametrize("name", sorted(set(BASELINES) - {"oracle"}))
def test_bytes_are_those_of_the_budget_and_the_weights(name: str) -> None:
    prefix = make_prefix(dtype=np.float16)
    budget = 30
    pairs = STREAMS * budget * (HEAD_DIM + VALUE_DIM) * 2
    weights = dict.fromkeys(("uniform", "halving", "reskv", "attention-matching"), 4 * STREAMS * budget)
    weights["nystrom"] = 4 * STREAMS * budget + 2 * STREAMS * VALUE_DIM * 2
    nbytes = compress(name, prefix, budget).nbytes
    if name == "algorithm1":
        assert 0.5 * pairs < nbytes <= pairs
    elif name == "momentkv":
        # What no whole cluster or entry fits into is left.
        assert pairs - STREAMS * ((HEAD_DIM + VALUE_DIM) * 2 + 4) < nbytes <= pairs
    else:
        assert nbytes == pairs + weights.get(name, 0)


@pytest.mark.parametrize("name", BASELINES)
def test_a_budget_below_sinks_and_window_says_what_to_do(name: str) -> None:
    with pytest.raises(ValueError, match=r"6 pairs cannot hold 2 sinks and a window of 5; raise it to at least 7"):
        compress(name, make_prefix(), SINKS + WINDOW - 1)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("budget", [0, N + 1])
def test_a_budget_out_of_bounds_says_the_bounds(name: str, budget: int) -> None:
    with pytest.raises(ValueError, match=f"budget must be an integer of at least 1 and at most {N}"):
        compress(name, make_prefix(), budget)


@pytest.mark.parametrize("name", BASELINES)
def test_equal_keys_do_no_harm(name: str) -> None:
    prefix = make_prefix()
    prefix = replace(prefix, keys=np.ones_like(prefix.keys), values=np.ones_like(prefix.values))
    outputs, _ = compress(name, prefix, 20).answer(make_rows(prefix))
    np.testing.assert_allclose(outputs, 1.0, atol=1e-3)


def test_reskv_holds_means_and_counts_of_what_it_does_not_keep() -> None:
    prefix = make_prefix()
    summary = compress("reskv", prefix, 27)
    assert isinstance(summary, Summary)
    entries = SINKS + WINDOW + 5  # a quarter of 20, and 15 clusters
    exactly, tokens = replace(summary, **{name: x[:, :entries] for name, x in vars(summary).items()}), []
    for stream, kept in enumerate(kept_tokens(prefix, exactly)):
        rest = sorted(set(range(N)) - set(kept))
        counts = np.exp(summary.log_weights[stream, entries:])
        np.testing.assert_allclose(counts.sum(), len(rest), rtol=1e-5)
        for name in ("keys", "values"):
            means = getattr(summary, name)[stream, entries:]
            np.testing.assert_allclose(counts @ means, getattr(prefix, name)[stream, rest].sum(axis=0), atol=1e-4)
        tokens.append(kept)
    assert all(len(set(kept)) == entries for kept in tokens)


def test_momentkv_is_exact_to_first_order_in_the_query() -> None:
    """The derivative of an output at a query of zero is the covariance of values and keys, whatever the clusters."""
    prefix = make_prefix(seed=2)
    answers = compress("momentkv", prefix, 50)
    assert isinstance(answers, Moments)
    assert answers.covariance.shape[1] > 0
    # 1e-3 in float64: what is left is of second order, 1e-6.
    rows = 1e-3 * np.random.default_rng(1).normal(size=(STREAMS, 9, HEAD_DIM))
    outputs, _ = answers.answer(rows)
    expected, _ = plain_attention(prefix, rows)
    plain, _ = answers.entries.answer(rows)
    np.testing.assert_allclose(outputs, expected, atol=2e-5)
    assert abs(plain - expected).max() > 10 * abs(outputs - expected).max()


def test_attention_matching_fits_reference_queries_better_than_the_same_keys_alone() -> None:
    prefix = make_prefix(group=2)
    fitted = compress("attention-matching", prefix, 25)
    assert isinstance(fitted, Summary)
    tokens = np.array(kept_tokens(prefix, fitted))
    values = np.take_along_axis(prefix.values, tokens[..., None], axis=1)
    alone = replace(fitted, values=values, log_weights=np.zeros_like(fitted.log_weights))
    rows = prefix.last_queries(N).reshape(STREAMS, -1, HEAD_DIM)
    expected, mass = plain_attention(prefix, rows)
    errors = [
        [abs(x - y).mean() for x, y in zip(each.answer(rows), (expected, mass), strict=True)]
        for each in (fitted, alone)
    ]
    assert errors[0][0] < 0.6 * errors[1][0]
    assert errors[0][1] < 0.5 * errors[1][1]


# A prefix that does not fit


def test_a_prefix_checks_its_arrays() -> None:
    good = make_prefix()
    with pytest.raises(ValueError, match="of the same n tokens"):
        replace(good, queries=good.queries[:, 1:])
    with pytest.raises(ValueError, match="exceed the 60 tokens"):
        replace(good, sinks=30, window=31)
    with pytest.raises(ValueError, match="NaN or infinity"):
        replace(good, keys=np.full_like(good.keys, np.nan))
    with pytest.raises(ValueError, match="scale"):
        replace(good, scale=0.0)


# What each of them is


def test_attention_received_is_causal_and_sums_to_the_queries() -> None:
    prefix = make_prefix(group=2)
    received = attention_received(prefix, 10)
    np.testing.assert_allclose(received.sum(axis=-1), 2 * 10, rtol=1e-5)
    logits = prefix.last_queries(1)[:, :, 0].astype(np.float64) @ prefix.keys.astype(np.float64).swapaxes(1, 2)
    weights = np.exp(logits)
    expected = (weights / weights.sum(axis=-1, keepdims=True)).sum(axis=1)
    np.testing.assert_allclose(attention_received(prefix, 1), expected, rtol=1e-4)
    # The last token is seen by the last query alone.
    np.testing.assert_allclose(received[:, -1], expected[:, -1], rtol=1e-4)


def test_attention_received_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = make_prefix(group=2)
    whole = attention_received(prefix, 25)
    monkeypatch.setattr("subgen._array.TRANSIENT_NUMBERS", 4 * STREAMS * 2 * N)
    np.testing.assert_allclose(attention_received(prefix, 25), whole, rtol=1e-5)


def test_streaming_llm_keeps_the_ends() -> None:
    prefix = make_prefix()
    summary = compress("streaming-llm", prefix, 20)
    assert isinstance(summary, Summary)
    assert kept_tokens(prefix, summary) == [[0, 1, *range(N - 18, N)]] * STREAMS


@pytest.mark.parametrize("name", ["h2o", "snapkv", "expected-attention"])
def test_eviction_by_attention_keeps_a_token_that_all_queries_attend_to(name: str) -> None:
    prefix = make_prefix(group=2)
    keys, queries = 0.1 * prefix.keys, prefix.queries.copy()
    queries[..., 0] = 5.0
    keys[:, 20, 0] = 5.0
    summary = compress(name, replace(prefix, keys=keys, queries=queries), SINKS + WINDOW + 1)
    assert isinstance(summary, Summary)
    for tokens in kept_tokens(replace(prefix, keys=keys), summary):
        # Pooling gives neighbours the score of their best.
        assert abs(tokens[SINKS] - 20) <= (3 if name == "snapkv" else 0)


def test_snapkv_without_pooling_keeps_the_token_itself() -> None:
    prefix = make_prefix()
    keys, queries = 0.1 * prefix.keys, prefix.queries.copy()
    queries[..., 0] = 5.0
    keys[:, 20, 0] = 5.0
    prefix = replace(prefix, keys=keys, queries=queries)
    summary = snapkv(prefix, SINKS + WINDOW + 1, np.random.default_rng(0), kernel=1)
    assert [tokens[SINKS] for tokens in kept_tokens(prefix, summary)] == [20] * STREAMS


def test_expected_attention_follows_its_formula() -> None:
    prefix = make_prefix(group=2)
    keys, values = prefix.keys.copy(), prefix.values * np.linspace(1, 4, N)[:, None]
    # A sink that takes all attention of one head of each stream must not silence that head.
    keys[:, 0] = 2 * prefix.queries[::2].mean(axis=1)
    prefix = replace(prefix, keys=keys, values=values.astype(np.float32), queries=prefix.queries + 1)
    room = 12
    expected = []
    for stream in range(STREAMS):
        k = prefix.keys[stream, SINKS:].astype(np.float64)
        score = np.zeros(len(k))
        for q in prefix.queries[2 * stream : 2 * stream + 2].astype(np.float64) * prefix.scale:
            attention = np.exp(k @ q.mean(axis=0) + 0.5 * np.sum((k @ np.cov(q.T, bias=True)) * k, axis=-1))
            score += attention / attention.sum()
        score *= np.linalg.norm(prefix.values[stream, SINKS:], axis=-1)
        expected.append(sorted(SINKS + np.argsort(-score[: N - SINKS - WINDOW])[:room]))
    summary = compress("expected-attention", prefix, SINKS + WINDOW + room)
    assert isinstance(summary, Summary)
    assert [tokens[SINKS:-WINDOW] for tokens in kept_tokens(prefix, summary)] == expected


def test_keydiff_keeps_the_key_that_differs() -> None:
    prefix = make_prefix()
    keys = 0.1 * prefix.keys + 1.0
    keys[:, 20] = -1.0
    prefix = replace(prefix, keys=keys.astype(np.float32))
    summary = compress("keydiff", prefix, SINKS + WINDOW + 1)
    assert isinstance(summary, Summary)
    assert [tokens[SINKS] for tokens in kept_tokens(prefix, summary)] == [20] * STREAMS


def test_the_uniform_normaliser_is_unbiased() -> None:
    # Mean of 2000 samples against the exact sum, per stream: |t| > 4.5 in one of 3 by chance 2e-5. Fixed seed.
    prefix = make_prefix()
    rows = 0.5 * make_rows(prefix, m=1)
    rng = np.random.default_rng(0)
    draws = np.stack(
        [np.exp(BASELINES["uniform"].compress(prefix, 20, rng).answer(rows)[1][:, 0]) for _ in range(2000)]
    )
    exact_sum = np.exp(plain_attention(prefix, rows)[1][:, 0])
    error = draws.std(axis=0, ddof=1) / math.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - exact_sum) < 4.5 * error).all()
    # And the test would notice weights that are off by a tenth.
    assert (0.1 * exact_sum * (1 - (SINKS + WINDOW) / N) > 9 * error).all()


@pytest.mark.parametrize("budget", [20, 40, N - 1])
def test_the_weights_of_a_coreset_count_the_tokens(budget: int) -> None:
    for name in METHODS_OF_WEIGHT:
        summary = compress(name, make_prefix(), budget)
        assert isinstance(summary, Summary)
        np.testing.assert_allclose(np.exp(summary.log_weights).sum(axis=-1), N, rtol=1e-5)


def test_halving_balances_the_kernel() -> None:
    # The kernel norm of kept minus dropped is less than half of what coins leave.
    keys = np.random.default_rng(0).normal(size=(256, 2))
    kernel = np.exp(0.25 * keys @ keys.T)

    def imbalance(second: NDArray[Any]) -> float:
        signs = np.stack([1 - 2 * second, 2 * second - 1], axis=1).reshape(-1)
        return math.sqrt(signs @ kernel @ signs)

    coins = np.random.default_rng(1).integers(0, 2, (20, 128))
    assert imbalance(second_of_each_pair(kernel, True)) < 0.5 * np.mean([imbalance(second) for second in coins])


def test_halving_keeps_one_of_each_pair() -> None:
    # Pairs of equal tokens: a half holds one of each, and the answer is exact. A uniform half would miss a few.
    prefix = make_prefix()
    keys, values = prefix.keys.copy(), prefix.values.copy()
    middle = N - SINKS - WINDOW - 1
    keys[:, SINKS + 1 : SINKS + middle : 2] = keys[:, SINKS : SINKS + middle : 2]
    values[:, SINKS + 1 : SINKS + middle : 2] = values[:, SINKS : SINKS + middle : 2]
    prefix = replace(prefix, keys=keys, values=values, window=WINDOW + 1)
    rows = make_rows(prefix)
    outputs, _ = compress("halving", prefix, SINKS + WINDOW + 1 + middle // 2).answer(rows)
    np.testing.assert_allclose(outputs, plain_attention(prefix, rows)[0], atol=1e-5)


def test_nystrom_is_exact_for_repeated_keys() -> None:
    # Ten different keys in the middle: ten pivots explain them all, whatever the values.
    prefix = make_prefix()
    keys = prefix.keys.copy()
    keys[:, SINKS : N - WINDOW] = keys[:, SINKS + np.arange(N - SINKS - WINDOW) % 10]
    prefix = replace(prefix, keys=keys)
    rows = make_rows(prefix)
    outputs, logsumexp = compress("nystrom", prefix, SINKS + WINDOW + 10).answer(rows)
    expected, expected_logsumexp = plain_attention(prefix, rows)
    np.testing.assert_allclose(outputs, expected, atol=1e-3)
    np.testing.assert_allclose(logsumexp, expected_logsumexp, atol=1e-3)


def test_nystrom_interpolates_smooth_keys() -> None:
    # Keys in a plane: thirty of 53 span their exponentials to three digits, where a sample of them errs by a tenth.
    prefix = make_prefix()
    keys = prefix.keys * (np.arange(HEAD_DIM) < 2)
    prefix = replace(prefix, keys=keys.astype(np.float32))
    rows = make_rows(prefix)
    expected = plain_attention(prefix, rows)[0]
    error = {
        name: np.abs(compress(name, prefix, SINKS + WINDOW + 30).answer(rows)[0] - expected).mean()
        for name in ("nystrom", "uniform")
    }
    assert error["nystrom"] < 3e-3
    assert error["uniform"] > 3e-2


def test_nystrom_without_positive_mass_has_no_say() -> None:
    one = np.ones((1, 1, 1), dtype=np.float32)
    summary = SignedSummary(one, one, -one[..., 0], one, one)
    outputs, logsumexp = summary.answer(one)
    assert outputs == 0.0
    assert logsumexp == -np.inf


def test_nystrom_outputs_stay_within_the_values() -> None:
    # A negative mass makes 2 / (1 - 0.5) = 4 of values that are at most 3.
    keys, sums = np.zeros((1, 2, 1), dtype=np.float32), np.asarray([[[2.0], [0.0]]], dtype=np.float32)
    masses = np.asarray([[1.0, -0.5]], dtype=np.float32)
    low, high = np.zeros((1, 1, 1)), np.full((1, 1, 1), 3.0)
    outputs, logsumexp = SignedSummary(keys, sums, masses, low, high).answer(keys[:, :1])
    assert outputs == 3.0
    assert logsumexp == pytest.approx(math.log(0.5))


def test_algorithm1_weighs_its_samples() -> None:
    # Equal keys make tau exact; orthonormal values make z a mean of slots, of which the parts add up to 1.
    prefix = make_prefix()
    values = np.eye(VALUE_DIM, dtype=np.float32)[np.arange(N) % VALUE_DIM]
    prefix = replace(prefix, keys=np.ones_like(prefix.keys), values=np.stack([values] * STREAMS))
    rows = make_rows(prefix)
    outputs, logsumexp = compress("algorithm1", prefix, 40).answer(rows)
    np.testing.assert_allclose(logsumexp, math.log(N) + rows.sum(axis=-1), rtol=1e-5)
    np.testing.assert_allclose(outputs.sum(axis=-1), 1.0, rtol=1e-5)
    assert outputs.max() < 1.0


def test_algorithm1_needs_room_for_a_cluster_and_a_value_sample() -> None:
    prefix = replace(make_prefix(), sinks=0, window=0)
    with pytest.raises(ValueError, match="too few for Algorithm 1"):
        compress("algorithm1", prefix, 3)


@pytest.mark.parametrize("name", EVICTIONS)
def test_the_oracle_finds_more_mass_than_any_eviction(name: str) -> None:
    prefix = make_prefix()
    rows = make_rows(prefix)
    best = compress("oracle", prefix, 20)
    assert isinstance(best, Oracle)
    assert best.nbytes == prefix.keys.nbytes + prefix.values.nbytes
    assert (best.answer(rows)[1] >= compress(name, prefix, 20).answer(rows)[1] - 1e-5).all()


# The comparison


def make_capture(n: int = 96, group: int = 2) -> Capture:
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(size, n, HEAD_DIM)).astype(np.float16) for size in (group * STREAMS, STREAMS, STREAMS))
    return Capture(q, k, v)


def test_compare_runs_every_method_at_every_budget() -> None:
    done: list[tuple[str, float]] = []
    result = compare(make_capture(), [0.3, 0.6], stride=3, on_done=lambda name, budget: done.append((name, budget)))
    assert result.methods == tuple(METHODS)
    assert done == [(name, budget) for name in METHODS for budget in (0.3, 0.6)]
    assert (result.prefix, result.pairs, result.sinks, result.window) == (70, (21, 42), 4, 5)
    np.testing.assert_array_equal(result.positions, np.arange(70, 88, 3))
    assert result.error.shape == result.held_nbytes.shape == result.seconds.shape == (len(METHODS), 2)
    assert result.stream_error.shape == (len(METHODS), 2, 2 * STREAMS)
    assert result.full_nbytes == STREAMS * 70 * 2 * HEAD_DIM * 2
    np.testing.assert_allclose(result.stream_error.mean(axis=-1), result.error)
    assert np.isfinite(result.error).all()


def test_compare_is_exact_with_all_pairs_and_measures_what_is_lost_without() -> None:
    capture = make_capture()
    result = compare(capture, [0.3, 1.0], methods=["streaming-llm"])
    assert result.error[0, 1] < 1e-5
    # The first answer by hand: query head 3 reads stream 1, from its 4 sinks, the last 17 of the prefix and itself.
    q, k, v = (x.astype(np.float64) for x in (capture.q[3, 70], capture.k[1], capture.v[1]))
    weights = np.exp(k[:71] @ q * HEAD_DIM**-0.5)
    seen = np.r_[0:4, 53:71]
    truth = weights @ v[:71] / weights.sum()
    output = weights[seen] @ v[seen] / weights[seen].sum()
    first = compare(capture, [0.3], methods=["streaming-llm"], stride=1000)
    assert first.stream_error[0, 0, 3] == pytest.approx(
        np.linalg.norm(output - truth) / np.linalg.norm(truth), rel=1e-4
    )


def test_a_result_does_not_depend_on_what_else_is_compared() -> None:
    capture = make_capture()
    together = compare(capture, [0.3, 0.6], methods=["nystrom", "uniform"], seed=5)
    alone = compare(capture, [0.6], methods=["uniform"], seed=5, window=together.window)
    assert alone.error[0, 0] == together.error[1, 1]


def test_compare_takes_methods_of_the_caller() -> None:
    result = compare(make_capture(), [0.3], methods={"mine": lambda prefix, budget, rng: exact(prefix)})
    assert result.methods == ("mine",)
    assert result.error[0, 0] < 1e-5


def test_compare_says_what_is_wrong() -> None:
    capture = make_capture()
    with pytest.raises(ValueError, match=r"unknown methods \['h20'\]; choose from .*'h2o'"):
        compare(capture, methods=["h20"])
    with pytest.raises(ValueError, match="no method"):
        compare(capture, methods=[])
    with pytest.raises(ValueError, match="leaves none of the 96"):
        compare(capture, prefix=96)
    with pytest.raises(ValueError, match="budgets is empty"):
        compare(capture, [])
    with pytest.raises(ValueError, match="a budget must be a real number above 0 and at most 1"):
        compare(capture, [1.5])
    with pytest.raises(ValueError, match="leaves no cluster beside 4 sinks and a window of 30"):
        compare(capture, [0.2], window=30)
