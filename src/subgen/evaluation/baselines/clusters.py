"""ResKV and MomentKV: the best entries exactly, and clusters of the others by k-means on keys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .eviction import best_tokens, snapkv_scores
from .prefix import Floats, Prefix, Summary, check_budget, exact, keep, with_ends

__all__ = ["Moments", "momentkv", "reskv"]

# Share of the middle's budget for entries that are kept exactly. ResKV with 0 / .25 / .5 / .75:
# .100 / .098 / .098 / .104 at 10% and .075 / .074 / .074 / .074 at 25%; MomentKV .129 / .125 / .133 / .174 and
# .114 / .104 / .098 / .093.
_EXACT = 0.25
_ROUNDS = 20


@dataclass(frozen=True)
class Moments:
    """Entries, and behind them clusters with the covariance of values and keys.

    Attributes
    ----------
    entries : Summary
        Exact ones with weight 1, then means with the numbers of members.
    covariance : array, shape (streams, clusters, value_dim, head_dim)
        Mean of ``(v - mean v) (k - mean k)^T`` over the members, in the dtype of the prefix.
    """

    entries: Summary
    covariance: Floats

    @property
    def nbytes(self) -> int:
        """Bytes of every array."""
        return self.entries.nbytes + self.covariance.nbytes

    def answer(self, rows: Floats) -> tuple[Floats, Floats]:
        """Answer as in `subgen.evaluation.baselines.prefix.Answers.answer`.

        To first order in ``<q, k - mean k>``, the values of a cluster add up to ``n e^<q, mean k> (mean v + C q)``, and
        the weights to ``n e^<q, mean k>``.
        """
        outputs, logsumexp = self.entries.answer(rows)
        clusters = self.covariance.shape[1]
        keys, log_weights = (x[:, x.shape[1] - clusters :] for x in (self.entries.keys, self.entries.log_weights))
        logits = rows @ keys.astype(rows.dtype).swapaxes(1, 2) + log_weights[:, None, :].astype(rows.dtype)
        weights = np.exp(logits - logsumexp[..., None])
        more = np.einsum("smc,scvk,smk->smv", weights, self.covariance.astype(rows.dtype), rows, optimize=True)
        return outputs + more, logsumexp


def reskv(prefix: Prefix, budget: int, rng: np.random.Generator) -> Summary:
    """Keep a quarter of the budget exactly, and hold the other tokens in clusters: mean key, mean value, log count.

    Which entries are exact is SnapKV's choice; k-means starts from drawn keys. Both are this project's reading of the
    description, as is the quarter.

    Parameters
    ----------
    prefix, budget, rng
        As in every baseline.

    References
    ----------
    ResKV, arXiv 2607.29591 (2026).
    """
    n_kept = check_budget(prefix, budget)
    n_exact = int(n_kept * _EXACT)
    return _clustered(prefix, n_exact, n_kept - n_exact, rng)[0]


def momentkv(prefix: Prefix, budget: int, rng: np.random.Generator) -> Moments:
    """Keep a quarter of the budget exactly, and hold the other tokens in clusters with first-order moments.

    A cluster takes the bytes of many entries, because of its covariance of values and keys. What does not make a whole
    cluster goes to exact entries. See `reskv` for the choices that are not the paper's.

    Parameters
    ----------
    prefix, budget, rng
        As in every baseline.

    References
    ----------
    MomentKV, arXiv 2606.01563 (2026).
    """
    n_kept = check_budget(prefix, budget)
    head_dim, value_dim = prefix.keys.shape[-1], prefix.values.shape[-1]
    entry = (head_dim + value_dim) * prefix.keys.itemsize
    # As soon as there is a cluster, every entry has a log-weight in float32.
    room = n_kept * entry - 4 * (prefix.sinks + prefix.window)
    cluster = entry + 4 + head_dim * value_dim * prefix.keys.itemsize
    n_clusters = max(0, int(room * (1 - _EXACT)) // cluster)
    n_exact = (room - n_clusters * cluster) // (entry + 4) if n_clusters else n_kept
    if n_kept == prefix.n - prefix.sinks - prefix.window:
        n_exact, n_clusters = n_kept, 0
    summary, clusters = _clustered(prefix, n_exact, n_clusters, rng)
    covariance = np.zeros((prefix.streams, n_clusters if clusters else 0, value_dim, head_dim), prefix.keys.dtype)
    for stream, (members, keys, values) in enumerate(clusters):
        # The mean of products, less the product of means.
        joint = np.einsum("cn,nv,nk->cvk", members, values, keys, optimize=True)
        covariance[stream] = joint - (members @ values)[:, :, None] * (members @ keys)[:, None, :]
    return Moments(summary, covariance)


def _clustered(
    prefix: Prefix, n_exact: int, n_clusters: int, rng: np.random.Generator
) -> tuple[Summary, list[tuple[Floats, Floats, Floats]]]:
    """Keep the best entries, and cluster the others.

    Returns
    -------
    Summary
        The entries, and behind them the means of the clusters.
    list of tuple
        For each stream, if there are clusters: the share of each token in the mean of each cluster, shape
        (clusters, n), and the keys and values of these tokens.
    """
    n_middle = prefix.n - prefix.sinks - prefix.window
    if n_exact + n_clusters >= n_middle:
        return exact(prefix), []
    main = best_tokens(prefix, n_exact, snapkv_scores(prefix))
    kept = keep(prefix, with_ends(prefix, main))
    if not n_clusters:
        return kept, []
    counts, clusters = [], []
    for stream in range(prefix.streams):
        rest = np.setdiff1d(np.arange(prefix.sinks, prefix.n - prefix.window), main[stream])
        keys, values = (x[stream, rest].astype(np.float64) for x in (prefix.keys, prefix.values))
        labels = _k_means(keys, n_clusters, rng)
        members = (labels[None, :] == np.arange(n_clusters)[:, None]).astype(np.float64)
        counts.append(members.sum(axis=1))
        members /= counts[-1][:, None]
        clusters.append((members, keys, values))
    dtype = prefix.keys.dtype
    entries = Summary(
        np.concatenate([kept.keys, np.stack([members @ keys for members, keys, _ in clusters]).astype(dtype)], axis=1),
        np.concatenate([kept.values, np.stack([members @ x for members, _, x in clusters]).astype(dtype)], axis=1),
        np.concatenate([kept.log_weights, np.log(np.stack(counts)).astype(np.float32)], axis=1),
    )
    return entries, clusters


def _k_means(points: Floats, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Find the cluster of each point by Lloyd's algorithm; none is empty, and there are more points than clusters."""
    centres = points[np.sort(rng.choice(len(points), count, replace=False))]
    norms = (points**2).sum(axis=1)
    for _ in range(_ROUNDS):
        squared = norms[:, None] - 2 * points @ centres.T + (centres**2).sum(axis=1)
        labels: NDArray[np.int64] = squared.argmin(axis=1)
        # A cluster that lost all its points takes the one that is farthest from its centre.
        far = np.argsort(-squared[np.arange(len(points)), labels], kind="stable")
        for empty in np.setdiff1d(np.arange(count), labels):
            counts = np.bincount(labels, minlength=count)
            labels[next(x for x in far if counts[labels[x]] > 1)] = empty
        members = (labels[None, :] == np.arange(count)[:, None]).astype(points.dtype)
        centres = members @ points / members.sum(axis=1, keepdims=True)
    return labels
