"""Planning: the theorem's sizes and the default as measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import subgen
from subgen.evaluation.compare import compare
from subgen.evaluation.plan import DefaultSize, _clusters_for
from subgen.io.captures import Capture, sample
from subgen.theory import sample_sizes


def clustered(n: int) -> Capture:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 8))
    k = centres[rng.integers(0, 6, (2, n))] + 0.01 * rng.normal(size=(2, n, 8))
    q, v = rng.normal(size=(2, 2, n, 8))
    return Capture(*(x.astype(np.float32) for x in (q, k, v)))


def test_the_theorem_is_in_reach_where_keys_cluster() -> None:
    capture = clustered(400)
    found = subgen.plan(0.5, keys=capture.k, values=capture.v, queries=capture.q, n=10**7, window=8)
    assert found.theorem_in_reach
    assert "within reach" in found.words
    best = min(found.theorem, key=lambda size: size.share)
    norm = np.linalg.norm(capture.q, axis=-1).max() / np.sqrt(8)
    assert found.query_norm == pytest.approx(norm, rel=1e-6)
    sizes = sample_sizes(0.5, delta=best.delta, query_norm=found.query_norm, value_dim=8)
    assert (sizes.samples_per_cluster, sizes.value_samples) == (best.samples_per_cluster, best.value_samples)
    # The bytes are those that a sketch of these sizes holds, but for room at the ends of its arrays.
    sketch = subgen.AttentionSketch.paper(
        delta=best.delta, samples_per_cluster=sizes.samples_per_cluster, value_samples=sizes.value_samples, scale=None
    )
    sketch.update(capture.k, capture.v)
    assert (sketch.n_clusters <= best.clusters).all()
    assert sketch.nbytes <= 1.3 * best.share * found.exact_nbytes


def test_real_attention_is_out_of_the_theorems_reach_and_the_default_is_measured() -> None:
    capture = Capture(*(x[:, :800] for x in (sample().q, sample().k, sample().v)))
    found = subgen.plan(0.08, keys=capture.k, values=capture.v, queries=capture.q, n=3200)
    assert not found.theorem_in_reach
    assert "out of reach" in found.words
    assert found.clusters is not None
    assert found.sample_clusters is not None
    assert found.clusters == pytest.approx(found.sample_clusters * 4**found.exponent, abs=1)
    assert 0 < found.nbytes < found.exact_nbytes
    # As large as planned, the error is what was asked for, within the noise of interpolation.
    prefix = capture.k.shape[1] * 375 // 512
    share = (found.sample_clusters + found.window + found.sink) / prefix
    assert compare(capture, [share], methods=["subgen"], window=found.window).error[0, 0] < 0.1
    sketch = subgen.AttentionSketch(found.clusters, window=found.window, sink=found.sink)
    sketch.update(*(np.tile(x, (1, 4, 1)) for x in (capture.k, capture.v)))
    assert sketch.nbytes == found.nbytes


def test_random_keys_do_not_compress_and_it_says_so() -> None:
    rng = np.random.default_rng(1)
    q, k, v = (4 * rng.normal(size=(1, 400, 16)) for _ in range(3))
    found = subgen.plan(0.01, keys=k, values=v, queries=q, window=8)
    assert found.clusters is None
    assert found.nbytes == 0
    assert "Keep the exact cache" in found.words


def test_interpolation() -> None:
    sizes = tuple(DefaultSize(c, c / 1000, e) for c, e in ((10, 0.4), (40, 0.1), (160, 0.025)))
    assert _clusters_for(0.5, sizes) == 10
    assert _clusters_for(0.2, sizes) == 20
    assert _clusters_for(0.05, sizes) == 80
    assert _clusters_for(0.01, sizes) is None


GOOD: dict[str, Any] = {"keys": np.ones((1, 400, 4)), "values": np.ones((1, 400, 4)), "queries": np.ones((1, 400, 4))}


@pytest.mark.parametrize(
    ("eps", "change", "kind", "message"),
    [
        (0.0, {}, ValueError, r"eps.*above 0"),
        (0.1, {"n": 0}, ValueError, r"n must be.*at least 1"),
        (0.1, {"queries": np.ones((1, 399, 4))}, ValueError, "a query for each token"),
        (0.1, {"window": 64}, ValueError, r"400 tokens is too short.*680"),
        (0.1, {"values": np.ones((1, 300, 4))}, ValueError, "agree in every axis"),
    ],
)
def test_bad_arguments(eps: float, change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        subgen.plan(eps, **{**GOOD, **change})
