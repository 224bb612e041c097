"""The kernels of leaders.cu: the leader rule for a block of keys."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_targets import DTYPES, Target
from subgen_cupy.leaders import leaders

from subgen.backends import PORTABLE


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize(
    ("seed", "n", "capacity", "head_dim", "delta"),
    [(1, 1, 8, 64, 1.0), (2, 45, 8, 2, 2.0), (3, 70, 40, 3, 3.0), (4, 33, 64, 80, 40.0), (5, 40, 8, 2, 0.0)],
)
def test_leaders_decide_as_the_portable_rule(
    target: Target, dtype: str, seed: int, n: int, capacity: int, head_dim: int, delta: float
) -> None:
    target = target.seeded(seed)
    rng = np.random.default_rng(seed)
    streams = 3
    # Small integers: every distance is exact, and ties abound.
    keys = rng.integers(-4, 5, size=(streams, n, head_dim)).astype(DTYPES[dtype])
    centres = rng.integers(-4, 5, size=(streams, capacity, head_dim)).astype(DTYPES[dtype])
    n_clusters = np.array([0, capacity // 2, capacity])
    got = leaders(target.device, *map(target.put, (keys, centres, n_clusters)), delta)
    wide = np.float64 if dtype == "float64" else np.float32
    expected = PORTABLE["assign_leaders"](keys.astype(wide), centres.astype(wide), n_clusters, delta)
    np.testing.assert_array_equal(target.get(got[0]), expected[0])
    np.testing.assert_array_equal(target.get(got[1]), expected[1])
