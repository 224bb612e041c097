"""Peak bytes of one call, without its arguments and the sketch, by length of the block and number of clusters.

docs/howto/numpy.md states the bound, which depends on neither. `tracemalloc` counts the arrays of NumPy, not those of
compiled loops: `peakmem_call` measures the process as well, and `peakmem_arguments` one that only makes the arguments.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from subgen import AttentionSketch, attention, merge

from ._common import GROUP, HEAD_DIM, KV_HEADS, SMOKE

# Tokens of the block. Half of them fill the window: the logits of a window's queries would be a quarter of the square.
LENGTHS = (2**8, 2**9) if SMOKE else (2**12, 2**13)
CALLS = ("update", "step", "attend", "attention", "threshold", "paper", "merge")


def _call(name: str, n: int) -> Callable[[], Any]:
    """Prepare a call on n tokens; what it needs is made here."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((KV_HEADS * GROUP, n, HEAD_DIM), dtype=np.float32)
    k, v = (rng.standard_normal((KV_HEADS, n, HEAD_DIM), dtype=np.float32) for _ in range(2))
    first = slice(0, n // 2)

    def filled(seed: int = 0, **options: Any) -> AttentionSketch:
        sketch = AttentionSketch(**({"max_clusters": n // 16, "window": n // 2, "seed": seed} | options))
        sketch.update(k[:, first], v[:, first], queries=q[:, first])
        return sketch

    if name == "attention":
        return lambda: attention(q[:, -256:], k, v, causal=True)
    if name == "paper":
        paper = AttentionSketch.paper(delta=1e-3, samples_per_cluster=4, value_samples=64, scale=HEAD_DIM**-0.5)
        return lambda: paper.step(q[:, : n // 8], k[:, : n // 8], v[:, : n // 8])
    if name == "merge":
        sketches = [filled(seed, window=64) for seed in range(2)]
        return lambda: merge(*sketches)
    sketch = filled(max_clusters=None, delta=8.0) if name == "threshold" else filled()
    if name == "attend":
        return lambda: sketch.attend(q)
    if name == "step":
        return lambda: sketch.step(q, k, v)
    return lambda: sketch.update(k, v, queries=q)


class Peak:
    params = (CALLS, LENGTHS)
    param_names = ("call", "n")
    timeout = 600.0

    def setup(self, call: str, n: int) -> None:
        self.call = _call(call, n)

    def track_peak_bytes(self, call: str, n: int) -> int:
        tracemalloc.start()
        try:
            self.call()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    track_peak_bytes.unit = "bytes"

    def peakmem_call(self, call: str, n: int) -> None:
        self.call()

    def peakmem_arguments(self, call: str, n: int) -> None:
        """What the process takes without the call."""
