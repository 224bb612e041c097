"""The time to absorb a prompt, as a share of exact causal attention over it by PyTorch, in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from subgen import AttentionSketch

from ._common import SINK, SMOKE, array

LENGTHS = (2**9,) if SMOKE else (2**11, 2**13, 2**15)
#: Key-value heads, query heads of each, head_dim, clusters and window: None takes a tenth of the prompt.
SHAPES = {"3 x 3 heads of 64, a tenth": (3, 3, 64, None), "8 x 4 heads of 128, 1024 clusters": (8, 4, 128, (1024, 128))}
ROUNDS = 1 if SMOKE else 3


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Prompt:
    params = (list(SHAPES), LENGTHS, ("update", "prefill"))
    param_names = ("shape", "n", "call")
    timeout = 1200

    def setup(self, shape: str, n: int, call: str) -> None:
        kv_heads, group, head_dim, sizes = SHAPES[shape]
        if SMOKE:
            kv_heads, sizes = 1, None
        rng = np.random.default_rng(0)
        self.queries, self.keys, self.values = (
            array("torch", rng.standard_normal((1, heads, n, head_dim), dtype=np.float32))
            for heads in (kv_heads * group, kv_heads, kv_heads)
        )
        self.group, entries = group, n // 10
        self.clusters, self.window = sizes or (entries - SINK - entries // 6, entries // 6)

    def track_prompt_over_exact(self, shape: str, n: int, call: str) -> float:
        from torch.nn.functional import scaled_dot_product_attention

        keys, values = (x.repeat_interleave(self.group, dim=1) for x in (self.keys, self.values))

        def absorb() -> None:
            sketch = AttentionSketch(self.clusters, window=self.window, sink=SINK, check_finite=False)
            getattr(sketch, call)(self.keys, self.values, queries=self.queries)

        absorb()  # loops are compiled at their first use
        exact, sketched = [], []
        for _ in range(ROUNDS):
            exact.append(seconds(lambda: scaled_dot_product_attention(self.queries, keys, values, is_causal=True)))
            sketched.append(seconds(absorb))
        return statistics.median(sketched) / statistics.median(exact)

    track_prompt_over_exact.unit = "of exact"  # type: ignore[attr-defined]
