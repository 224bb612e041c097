"""Eviction: score every pair, keep the best within the budget, forget the others.

They differ in the score alone. The sinks and the window are always kept; what is kept is exact and has weight 1.
Scores are computed once, at the end of the prefix and from exact attention, which can only help a method that
would evict while it streams. All functions share the parameters of `subgen.evaluation.baselines.Baseline`; ``rng`` is
not used, the choice is deterministic.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .prefix import Floats, Prefix, Summary, attention_received, check_budget, keep, with_ends

__all__ = ["expected_attention", "h2o", "keydiff", "snapkv", "streaming_llm"]


def streaming_llm(prefix: Prefix, budget: int, rng: np.random.Generator) -> Summary:
    """StreamingLLM: the sinks and the most recent pairs.

    References
    ----------
    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453 (2023). There the kept
    tokens are given new positions; captured keys carry theirs, which is exact attention over the same pairs.
    """
    return _keep_best(prefix, budget, np.broadcast_to(np.arange(prefix.n), (prefix.streams, prefix.n)))


def h2o(prefix: Prefix, budget: int, rng: np.random.Generator) -> Summary:
    """H2O: the heavy hitters, by attention accumulated over all past queries, and the recent window.

    The paper halves the budget between heavy hitters and recent pairs (.182 / .143 here); leaving the share of the
    recent ones to their scores is as good and better (.187 / .137).

    References
    ----------
    Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    arXiv 2306.14048 (2023).
    """
    return _keep_best(prefix, budget, attention_received(prefix, prefix.n))


def snapkv(prefix: Prefix, budget: int, rng: np.random.Generator, *, observed: int = 16, kernel: int = 7) -> Summary:
    """SnapKV: attention from the last queries, averaged over neighbouring tokens, and the recent window.

    Of 16, 32 and 64 queries, no pooling and average or maximum pooling over 3, 5 and 7 tokens, 16 and an average
    over 7 did best over two captures together (no pooling: .167 / .124 on this one, but .154 / .156 on the shipped
    sample, against .151 / .120).

    Parameters
    ----------
    prefix, budget, rng
        As in every baseline.
    observed : int
        Last queries that vote.
    kernel : int
        Tokens averaged, an odd number.

    References
    ----------
    Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469 (2024).
    """
    return _keep_best(prefix, budget, snapkv_scores(prefix, observed, kernel))


def snapkv_scores(prefix: Prefix, observed: int = 16, kernel: int = 7) -> NDArray[np.float64]:
    """Compute the scores of `snapkv`: shape (streams, n)."""
    return _average(attention_received(prefix, min(observed, prefix.n)), kernel)


def expected_attention(prefix: Prefix, budget: int, rng: np.random.Generator, *, observed: int = 64) -> Summary:
    """Expected Attention: the attention that Gaussian queries are expected to pay, times the norm of the value.

    With queries of mean mu and covariance Sigma, ``E e^<q,k> = exp(<mu,k> + k^T Sigma k / 2)``; normalised over the
    tokens, averaged over the query heads of a stream, times ``||v||``. The paper takes mu and Sigma of queries
    before their rotary embedding and turns them to future positions. Captured queries are turned already, and that
    cannot be undone without the model, so the statistics are those of recent queries, which are turned nearly as
    the next ones are. Of 32 to all queries, 64 did best, with 32 (256: .200 / .145; all: .205 / .162).

    Parameters
    ----------
    prefix, budget, rng
        As in every baseline.
    observed : int
        Last queries whose statistics are taken.

    References
    ----------
    Devoto, Jeblick, Jegou, "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
    Distribution", arXiv 2510.00636 (2025), and its code, kvpress's ``ExpectedAttentionPress``.
    """
    rows = prefix.last_queries(min(observed, prefix.n)).astype(np.float64)
    mean = rows.mean(axis=2)
    centred = rows - mean[:, :, None]
    keys = prefix.keys.astype(np.float64)[:, None]
    # k^T Sigma k is the mean square of the centred queries' logits: no covariance is formed.
    spread = ((centred @ keys.swapaxes(-1, -2)) ** 2).mean(axis=2)
    log_expected = (keys @ mean[..., None])[..., 0] + spread / 2.0
    # Sinks would take all of the normalised mass from the heads that have them; the paper leaves them out too.
    # (Not -inf: a prefix that is all sinks would divide nothing by nothing.)
    log_expected[..., : prefix.sinks] = -1e300
    expected = np.exp(log_expected - log_expected.max(axis=-1, keepdims=True))
    expected = (expected / expected.sum(axis=-1, keepdims=True)).mean(axis=1)
    return _keep_best(prefix, budget, expected * np.linalg.norm(prefix.values.astype(np.float64), axis=-1))


def keydiff(prefix: Prefix, budget: int, rng: np.random.Generator) -> Summary:
    """KeyDiff: evict the keys most similar, by cosine, to the mean of the normalised keys. Sees no query.

    References
    ----------
    Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
    Resource-Constrained Environments", arXiv 2504.15364 (2025).
    """
    keys = prefix.keys.astype(np.float64)
    norms = np.linalg.norm(keys, axis=-1, keepdims=True)
    directions = keys / np.where(norms > 0, norms, 1.0)
    # The length of the mean does not change the order, so it is not normalised again.
    return _keep_best(prefix, budget, -(directions @ directions.mean(axis=1)[..., None])[..., 0])


def _keep_best(prefix: Prefix, budget: int, scores: Floats) -> Summary:
    """Keep the sinks, the window and the tokens of the best scores, in order; equal scores keep the later token."""
    return keep(prefix, with_ends(prefix, best_tokens(prefix, check_budget(prefix, budget), scores)))


def best_tokens(prefix: Prefix, count: int, scores: Floats) -> NDArray[np.int64]:
    """Return the positions of the middle with the best scores, in order: ``(streams, count)``."""
    middle = scores[:, prefix.middle][:, ::-1]
    last = prefix.n - prefix.window - 1
    return np.sort(last - np.argsort(-middle, axis=-1, kind="stable")[:, :count], axis=-1)


def _average(scores: NDArray[np.float64], kernel: int) -> NDArray[np.float64]:
    """Average over a centred window of tokens, zeros past the ends."""
    padded = np.pad(scores, ((0, 0), (kernel // 2, kernel // 2)))
    return np.asarray(np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=1).mean(axis=-1))
