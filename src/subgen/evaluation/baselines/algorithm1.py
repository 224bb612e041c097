"""The paper's Algorithm 1, given the bytes of a budget of pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..._checks import check_integer
from ...paper.state import PaperState
from ...sketch import AttentionSketch
from ...softmax import weighted_attention
from ..cover import delta_for_clusters
from .prefix import Floats, Prefix, check_budget

__all__ = ["Estimator", "algorithm1"]

# Keys whose pairwise distances choose delta.
_SAMPLED_KEYS = 4096

# Of a count and of mu: the paper needs no more. The library's own bookkeeping, which saves random numbers, and
# its padding are not compared with it.
_NUMBER = 8


@dataclass(frozen=True)
class _Stream:
    """The sets D and M of one stream, live entries only; log-weights include counts, rates and sample sizes."""

    samples: Floats
    log_counts: NDArray[np.float64]
    keys: Floats
    values: Floats
    log_rates: NDArray[np.float64]


@dataclass(frozen=True)
class Estimator:
    """The ratio ``z / tau`` of two samples, stream by stream.

    Attributes
    ----------
    streams : tuple
        The samples of each stream.
    low, high : array, shape (streams, 1, value_dim)
        The range of the values; outputs are clamped to it.
    nbytes : int
        Representatives, samples, counts, value samples, mu and the range.
    """

    streams: tuple[_Stream, ...]
    low: Floats
    high: Floats
    nbytes: int

    def answer(self, rows: Floats) -> tuple[Floats, Floats]:
        """Answer as in `subgen.evaluation.baselines.prefix.Answers.answer`, in float64.

        Unclamped, the ratio is huge where tau missed what z found.
        """
        outputs, log_taus = zip(*map(_answer, self.streams, rows[:, None].astype(np.float64)), strict=True)
        return np.clip(np.concatenate(outputs), self.low, self.high), np.concatenate(log_taus)


def algorithm1(
    prefix: Prefix,
    budget: int,
    rng: np.random.Generator,
    *,
    samples_per_cluster: int = 8,
    cluster_share: float = 0.3,
) -> Estimator:
    """Run Algorithm 1 over the prefix, with a delta for each stream at which its clusters fit their share of the bytes.

    No sinks and no window: the paper keeps none. Two helps that it does not have, because they did so much: a delta
    for each stream (one for all 16 gave .9 / .6 at best, unclamped), and outputs clamped to the range of the values
    (without, a seed in three gave errors above 1, where tau misses what z found). Of 2, 4 and 8 samples per cluster
    and shares of 0.3, 0.5 and 0.7, 8 and 0.3 did best (.239 / .194, mean of three seeds; 2 and 0.5: .287 / .208).

    Parameters
    ----------
    prefix, budget, rng
        As in every baseline; the budget counts bytes of that many pairs.
    samples_per_cluster : int
        The paper's t.
    cluster_share : float
        Share of the bytes for the clusters; the value samples have the rest.

    Raises
    ------
    ValueError
        If the bytes do not hold one cluster and one value sample.

    References
    ----------
    Zandieh, Han, Mirrokni, Karbasi, "SubGen: Token Generation in Sublinear Time and Memory", arXiv 2402.06082 (2024).
    """
    check_budget(prefix, budget)
    t = check_integer("samples_per_cluster", samples_per_cluster)
    item, head_dim, value_dim = prefix.keys.itemsize, prefix.keys.shape[-1], prefix.values.shape[-1]
    pair_bytes = (head_dim + value_dim) * item
    cluster_bytes = (1 + t) * head_dim * item + _NUMBER
    # mu, and the range of the values, come off the top.
    total = budget * pair_bytes - _NUMBER - 2 * value_dim * item
    most = max(1, int(cluster_share * total / cluster_bytes))
    s = (total - most * cluster_bytes) // pair_bytes
    if s < 1:
        raise ValueError(
            f"a budget of {budget} pairs is {budget * pair_bytes} bytes, too few for Algorithm 1 with one cluster "
            f"({cluster_bytes} bytes) and one value sample ({pair_bytes}); raise it, or lower samples_per_cluster"
        )
    streams, clusters = [], 0
    for keys, values in zip(prefix.keys, prefix.values, strict=True):
        seed = int(rng.integers(2**63))
        delta = delta_for_clusters(keys[:: math.ceil(prefix.n / _SAMPLED_KEYS)], most)
        sketch = _run(prefix, keys, values, delta, t, s, seed)
        while int(sketch.n_clusters) > most:  # only where delta was chosen from a sample
            delta *= 1.05
            sketch = _run(prefix, keys, values, delta, t, s, seed)
        clusters += int(sketch.n_clusters)
        streams.append(_live(sketch, t, s))
    low, high = prefix.values.min(axis=1, keepdims=True), prefix.values.max(axis=1, keepdims=True)
    nbytes = clusters * cluster_bytes + prefix.streams * (s * pair_bytes + _NUMBER) + low.nbytes + high.nbytes
    return Estimator(tuple(streams), low, high, nbytes)


def _run(prefix: Prefix, keys: Floats, values: Floats, delta: float, t: int, s: int, seed: int) -> AttentionSketch:
    sketch = AttentionSketch.paper(delta=delta, samples_per_cluster=t, value_samples=s, scale=prefix.scale, seed=seed)
    sketch.update(keys, values)
    return sketch


def _live(sketch: AttentionSketch, t: int, s: int) -> _Stream:
    """Take the samples and their log-weights out of a sketch of one stream, without padding."""
    state = sketch.state
    if not isinstance(state, PaperState):
        raise TypeError(f"expected the state of Algorithm 1 after an update, got {type(state).__name__}")
    live = state.clusters.counts[0] > 0
    counts = state.clusters.counts[0, live].astype(np.float64)
    values = state.reservoir.values[0]
    squared = (values.astype(np.float64) ** 2).sum(axis=-1)
    # A zero vector in M weighs nothing: M holds one only if there were no others.
    log_norms = np.log(s * squared, where=squared > 0, out=np.full(s, np.inf))
    weight = float(state.reservoir.weight[0])
    return _Stream(
        samples=state.clusters.samples[0, live].reshape(-1, state.clusters.samples.shape[-1]),
        log_counts=np.repeat(np.log(counts) - math.log(t), t),
        keys=state.reservoir.keys[0],
        values=values,
        log_rates=(math.log(weight) if weight > 0 else 0.0) - log_norms,
    )


def _answer(stream: _Stream, rows: NDArray[np.float64]) -> tuple[Floats, Floats]:
    """Answer ``(1, m, head_dim)`` from one stream."""
    samples = stream.samples[None]
    _, log_tau = weighted_attention(rows, samples, samples[..., :1], stream.log_counts[None, None])
    outputs, log_mass = weighted_attention(rows, stream.keys[None], stream.values[None], stream.log_rates[None, None])
    # exp(700) is the end of float64; such a ratio is lost in any case.
    return outputs * np.exp(np.minimum(log_mass - log_tau, 700.0))[..., None], log_tau
