"""The estimator's moments against the closed forms, and the theorem's bound.

Heads of one batch draw independently, so one stream repeated over thousands of heads gives as many seeds at once.
Bounds are six standard deviations of a mean: a false alarm with probability below 2e-9 each (the means are over
thousands of draws, so the normal law holds well enough); seeds are fixed besides.
"""

from __future__ import annotations

import numpy as np
import pytest

from subgen import AttentionSketch, attention
from subgen.paper.state import PaperState
from subgen.theory import sample_sizes


def clustered(seed: int, n: int, m: int, d: int, e: int, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Keys in m balls of a radius, values of unequal norms."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(m, d))
    inside = rng.normal(size=(n, d))
    inside *= radius * rng.random((n, 1)) / np.linalg.norm(inside, axis=-1, keepdims=True)
    return centres[rng.integers(0, m, n)] + inside, rng.normal(size=(n, e)) * rng.gamma(2.0, size=(n, 1))


def over_heads(sketch: AttentionSketch, keys: np.ndarray, values: np.ndarray, heads: int, block: int) -> PaperState:
    for start in range(0, keys.shape[0], block):
        part = slice(start, start + block)
        sketch.update(*(np.repeat(x[None, part], heads, axis=0) for x in (keys, values)))
    assert sketch.state is not None
    return sketch.state


def z_and_tau(state: PaperState, query: np.ndarray, t: int, s: int) -> tuple[np.ndarray, np.ndarray]:
    """The paper's sums from the state, written out: shapes (heads, value_dim) and (heads,)."""
    clusters, slots = state.clusters, state.reservoir
    tau = (clusters.counts[..., None] / t * np.exp(clusters.samples @ query)).sum(axis=(1, 2))
    weights = slots.weight[:, None] / (s * (slots.values**2).sum(axis=-1)) * np.exp(slots.keys @ query)
    return (weights[..., None] * slots.values).sum(axis=1), tau


@pytest.mark.parametrize("block", [17, 120])
def test_moments_of_numerator_and_denominator(block: int) -> None:
    heads, n, t, s = 6000, 120, 3, 5
    keys, values = clustered(0, n, m=4, d=3, e=2, radius=0.5)
    query = np.asarray([1.0, -0.7, 0.4])
    sketch = AttentionSketch.paper(delta=1.2, samples_per_cluster=t, value_samples=s, seed=21)
    state = over_heads(sketch, keys, values, heads, block)
    z, tau = z_and_tau(state, query, t, s)

    mass = np.exp(keys @ query)
    centres = state.clusters.centres[0][: int(sketch.n_clusters[0])]
    opened = []  # the plain leader rule, for the members
    member = np.empty(n, dtype=int)
    for i, key in enumerate(keys):
        distances = [np.linalg.norm(key - keys[j]) for j in opened]
        if not distances or min(distances) > 1.2:
            opened.append(i)
            member[i] = len(opened) - 1
        else:
            member[i] = int(np.argmin(distances))
    np.testing.assert_array_equal(centres, keys[opened])

    variance = sum((member == c).sum() ** 2 / t * mass[member == c].var() for c in range(len(opened)))
    assert abs(tau.mean() - mass.sum()) < 6 * np.sqrt(variance / heads)
    # The deviation of a sample variance, from the sample's own fourth moment.
    fourth = np.mean((tau - tau.mean()) ** 4)
    assert abs(tau.var(ddof=1) - variance) < 6 * np.sqrt((fourth - variance**2) / heads)

    numerator = mass @ values
    squared = ((z - numerator) ** 2).sum(axis=-1)
    expected = ((values**2).sum() * (mass**2).sum() - (numerator**2).sum()) / s
    assert np.all(np.abs(z.mean(axis=0) - numerator) < 6 * z.std(axis=0) / np.sqrt(heads))
    assert abs(squared.mean() - expected) < 6 * squared.std() / np.sqrt(heads)

    # The sketch's answer is their ratio.
    got = sketch.attend(np.repeat(query[None, None], heads, axis=0))[:, 0]
    np.testing.assert_allclose(got, z / tau[:, None], rtol=1e-9)


def test_slots_are_uniform_over_members_and_weighted_by_norm() -> None:
    """The distribution itself, not only two moments: chi-square over which token a slot holds."""
    heads, n, t, s = 4000, 30, 4, 4
    keys = np.arange(n)[:, None] * 1e-3
    values = np.sqrt(np.arange(n, dtype=np.float64))[:, None]  # ||v||^2 = position; token 0 is never sampled
    sketch = AttentionSketch.paper(delta=1.0, samples_per_cluster=t, value_samples=s, seed=5)
    state = over_heads(sketch, keys, values, heads, 11)
    assert int(sketch.n_clusters[0]) == 1
    held = np.rint(state.clusters.samples[:, 0, :, 0] * 1e3).astype(int)
    slots = np.rint(state.reservoir.keys[..., 0] * 1e3).astype(int)
    for sampled, weights in ((held, np.ones(n)), (slots, np.arange(n))):
        expected = weights / weights.sum() * sampled.size
        counts = np.bincount(sampled.ravel(), minlength=n)
        assert counts[expected == 0].sum() == 0
        some = expected > 0
        # At most 29 degrees of freedom: beyond 95 with probability below 1e-8.
        assert np.sum((counts[some] - expected[some]) ** 2 / expected[some]) < 95
    # Slots are independent: two of them agree as often as two draws would. Normal, 6 deviations.
    same = np.mean(held[:, 0] == held[:, 1])
    assert abs(same - 1 / n) < 6 * np.sqrt(1 / n / heads)
    # Heads differ, too.
    same = np.mean(held[::2, 0] == held[1::2, 0])
    assert abs(same - 1 / n) < 6 * np.sqrt(2 / n / heads)


@pytest.mark.parametrize("eps", [0.3, 0.9])
def test_the_theorem_holds_at_least_as_often_as_promised(eps: float) -> None:
    heads, failure = 100, 0.1
    keys, values = clustered(3, 300, m=5, d=4, e=4, radius=0.1)
    delta = 0.2
    queries = np.random.default_rng(4).normal(size=(4, 4))
    queries *= 1.5 / np.linalg.norm(queries, axis=-1, keepdims=True)
    sizes = sample_sizes(eps, delta=delta, query_norm=1.5, value_dim=4, failure=failure)
    sketch = AttentionSketch.paper(
        delta=delta,
        samples_per_cluster=sizes.samples_per_cluster,
        value_samples=sizes.value_samples,
        seed=8,
    )
    over_heads(sketch, keys, values, heads, 300)
    got = sketch.attend(np.repeat(queries[None], heads, axis=0))
    exact = attention(queries, keys, values, scale=1.0)
    softmax = np.exp(queries @ keys.T)
    softmax /= softmax.sum(axis=-1, keepdims=True)
    bound = eps * np.linalg.norm(softmax, axis=-1) * np.linalg.norm(values, ord=2)
    missed = np.linalg.norm(got - exact, axis=-1) > bound
    # Promised: each query misses with probability at most 0.1. Of 100 heads at that rate, more than 28 would miss
    # with probability below 1e-6 (binomial).
    assert missed.sum(axis=0).max() <= 28


def test_a_theorem_out_of_reach_says_so() -> None:
    with pytest.raises(OverflowError, match="smaller delta"):
        sample_sizes(0.1, delta=20.0, query_norm=40.0, value_dim=64)
    with pytest.raises(ValueError, match="eps"):
        sample_sizes(1.5, delta=1.0, query_norm=1.0, value_dim=4)
