"""The deterministic bounds of cluster means hold, whatever the members."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subgen import AttentionSketch, attention
from subgen.default.attend import log_weights
from subgen.default.merging import band_means
from subgen.theory import mass_bounds, output_bound

# Float64 sums of a few hundred terms: far above their rounding, far below any slack of the bounds.
ROUNDING = 1e-9


def cluster(rng: np.random.Generator, n: int, radius: float, kind: str, q: Any) -> Any:
    """Members whose farthest lies at ``radius`` from their mean, arranged against the query."""
    d = len(q)
    if kind == "two points":  # the extreme of the chord: half of the members at either end of the query's direction
        signs = np.where(np.arange(n) % 2 == 0, 1.0, -1.0)
        signs[-1] *= n % 2 == 0  # an odd one in the middle
        offsets = signs[:, None] * q
    elif kind == "one far":
        offsets = np.zeros((n, d))
        offsets[0] = q * rng.choice([-1.0, 1.0])
    elif kind == "one coordinate":  # the variance of a band averages over its coordinates
        offsets = np.zeros((n, d))
        offsets[:, 0] = rng.choice([-1.0, 1.0], size=n)
    else:
        offsets = rng.normal(size=(n, d)) * rng.exponential(size=(n, 1))
    offsets = offsets - offsets.mean(axis=0)
    farthest = np.linalg.norm(offsets, axis=1).max()
    return offsets * (radius / farthest if farthest > 0 else 0.0)


@settings(max_examples=300)
@given(
    seed=st.integers(0, 2**32),
    norm=st.floats(0.0, 8.0),
    radius=st.floats(1e-6, 1.0),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    kind=st.sampled_from(["two points", "one far", "one coordinate", "normal"]),
    values=st.sampled_from(["normal", "follows the logit", "one far"]),
    corrected=st.booleans(),
)
def test_answers_from_means_are_within_the_bound(
    seed: int, norm: float, radius: float, sizes: list[int], kind: str, values: str, corrected: bool
) -> None:
    rng = np.random.default_rng(seed)
    d = 4
    q = rng.normal(size=d)
    q *= norm / np.linalg.norm(q)
    direction = q / norm if norm > 0 else q
    mean_keys, mean_values, counts, variances, deviations = [], [], [], [], []
    all_keys, all_values = [], []
    for n in sizes:
        offsets = cluster(rng, n, radius, kind, direction)
        centre = rng.normal(size=d)
        v = rng.normal(size=(n, 3))
        if values == "follows the logit":
            v = np.exp(offsets @ q)[:, None] * np.ones(3)
        elif values == "one far":
            v[:] = 0.0
            v[np.argmax(offsets @ q)] = 10.0
        v = v + rng.normal(size=3) * 3
        all_keys.append(centre + offsets)
        all_values.append(v)
        mean_keys.append(centre)
        mean_values.append(v.mean(axis=0))
        counts.append(n)
        variances.append(band_means(offsets**2).mean(axis=0))
        deviations.append(math.sqrt(((v - v.mean(axis=0)) ** 2).sum(axis=1).mean()))
    keys, vals = np.concatenate(all_keys), np.concatenate(all_values)
    exact = attention(q[None], keys, vals, scale=1.0)[0]
    logs = np.log(np.asarray(counts, float))
    if corrected:
        logs = log_weights(q[None, None], np.asarray([counts]), np.asarray([variances]))[0, 0]
    logits = np.asarray(mean_keys) @ q + logs
    weights = np.exp(logits - logits.max())
    answer = (weights @ np.asarray(mean_values)) / weights.sum()

    bounds = mass_bounds(norm, radius, corrected=corrected)
    for members, logit in zip(all_keys, logits, strict=True):
        ratio = np.exp(members @ q - logit).sum()
        assert bounds.low * (1 - ROUNDING) <= ratio <= bounds.high * (1 + ROUNDING)
    value_range = np.linalg.norm(np.asarray(mean_values) - answer, axis=1).max()
    bound = output_bound(
        norm, radius, value_deviation=max(deviations), value_range=float(value_range), corrected=corrected
    )
    assert np.linalg.norm(answer - exact) <= bound * (1 + ROUNDING) + ROUNDING


def test_the_bound_is_nearly_reached() -> None:
    """Two points at either end: the mass is cosh a to the last digit."""
    a = 0.3
    assert mass_bounds(3.0, 0.1, corrected=False).high == pytest.approx((math.exp(a) + math.exp(-a)) / 2)
    q, keys = np.asarray([[3.0]]), np.asarray([[0.1], [-0.1]])
    values = np.asarray([[1.0], [-1.0]])
    exact = abs(attention(q, keys, values, scale=1.0)[0, 0])  # tanh a, the answer from the means being 0
    bound = output_bound(3.0, 0.1, value_deviation=1.0, value_range=0.0, corrected=False)
    assert exact <= bound <= 1.04 * exact


@given(seed=st.integers(0, 2**32), delta=st.floats(0.01, 0.3))
def test_a_sketch_with_delta_keeps_the_bound(seed: int, delta: float) -> None:
    """Every member lies within delta of its leader, so within twice that of the mean."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(5, 4)) * 3
    keys = centres[rng.integers(0, 5, 300)] + rng.normal(size=(300, 4)) * delta / 3
    values = rng.normal(size=(300, 3))
    queries = rng.normal(size=(20, 4))
    sketch = AttentionSketch(delta=delta, window=8, sink=2, scale=1.0)
    sketch.update(keys, values)
    missed = np.linalg.norm(sketch.attend(queries) - attention(queries, keys, values, scale=1.0), axis=-1)
    diameter = float(np.linalg.norm(values[:, None] - values[None], axis=-1).max())
    for query, error in zip(queries, missed, strict=True):
        norm = float(np.linalg.norm(query))
        bound = output_bound(norm, 2 * delta, value_deviation=diameter, value_range=diameter)
        assert error <= bound * (1 + ROUNDING)


def test_bounds_end_in_infinity_and_bad_arguments_in_errors() -> None:
    assert output_bound(100.0, 10.0, value_deviation=0.0, value_range=1.0) == math.inf
    assert output_bound(100.0, 0.0, value_deviation=1.0, value_range=1.0) == 0.0
    with pytest.raises(ValueError, match=r"radius.*at least 0"):
        mass_bounds(1.0, -0.1)
    with pytest.raises(TypeError, match="value_range"):
        output_bound(1.0, 0.1, value_deviation=0.0, value_range="1")  # type: ignore[arg-type]
