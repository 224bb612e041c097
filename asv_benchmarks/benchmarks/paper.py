"""The paper's algorithm on a clusterable stream: time of a block, of an answer, and bytes held, over n."""

from __future__ import annotations

import numpy as np

from subgen import AttentionSketch

HEAD_DIM, CLUSTERS, BLOCK = 64, 64, 512


def stream(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Keys around 64 centres and normal values: (n, 64) each, float32."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(size=(CLUSTERS, HEAD_DIM)).astype(np.float32)
    noise = rng.normal(scale=0.02, size=(n, HEAD_DIM)).astype(np.float32)
    return centres[rng.integers(0, CLUSTERS, n)] + noise, rng.normal(size=(n, HEAD_DIM)).astype(np.float32)


def sketch() -> AttentionSketch:
    """Sixteen samples a cluster, 256 of the values."""
    return AttentionSketch.paper(delta=1.0, samples_per_cluster=16, value_samples=256, scale=HEAD_DIM**-0.5)


class Stream:
    params = (2**10, 2**13, 2**16)
    param_names = ("n",)

    def setup(self, n: int) -> None:
        self.sketch = sketch()
        self.sketch.update(*stream(n))
        self.keys, self.values = stream(BLOCK, seed=2)

    def time_update_of_a_block(self, n: int) -> None:
        self.sketch.update(self.keys, self.values)

    def time_attend_of_one_query(self, n: int) -> None:
        self.sketch.attend(self.keys[:1])

    def track_cache_bytes(self, n: int) -> int:
        return self.sketch.nbytes

    track_cache_bytes.unit = "bytes"
