"""How bytes and the time of a step grow with the stream: exponents, from a clusterable stream of one head.

Bytes must grow with an exponent below 0.05 in threshold mode, 0.02 with a fixed budget and 0.55 under the schedule
``subgen.Power(c, 0.5)``; 1 is an exact cache.
"""

from __future__ import annotations

import copy
import time

import numpy as np

from subgen import AttentionSketch, Power

from ._common import SMOKE, slope

LENGTHS = [2**i for i in (range(10, 12) if SMOKE else range(10, 21, 2))]
HEAD_DIM, CENTRES, WINDOW = 32, 64, 64
# Passes of half a window: each holds one absorption. All lengths take turns, and the fastest pass of each is a step's
# time: other work on the machine only adds, and it comes and goes. It drowned an exponent of a hundredth otherwise.
PASSES = 2 if SMOKE else 40
MODES = {
    "threshold": {"delta": 1.0},
    "fixed": {"max_clusters": 128},
    "schedule": {"max_clusters": Power(2, 0.5)},
}


def tokens(n: int, seed: int) -> np.ndarray:
    """Keys around 64 centres, as queries and values too: (1, n, head_dim)."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(CENTRES, HEAD_DIM))
    keys = centres[rng.integers(0, CENTRES, n)] + rng.normal(scale=0.02, size=(n, HEAD_DIM))
    return keys[None].astype(np.float32)


def step_times(sketches: list[AttentionSketch]) -> list[float]:
    """Seconds of a step of each, absorption included."""
    best = [float("inf")] * len(sketches)
    for number in range(PASSES + 1):
        x = tokens(WINDOW // 2, 1000 + number)
        for which, sketch in enumerate(sketches):
            begin = time.perf_counter()
            for i in range(WINDOW // 2):
                token = x[:, i : i + 1]
                sketch.update(token, token, queries=token)
                sketch.attend(token)
            if number:  # the first warms up
                best[which] = min(best[which], (time.perf_counter() - begin) / (WINDOW // 2))
    return best


class Exponents:
    params = tuple(MODES)
    param_names = ("mode",)
    timeout = 1200.0

    def setup_cache(self) -> dict[str, tuple[list[int], list[float]]]:
        grown = {}
        for mode, options in MODES.items():
            sketch = AttentionSketch(**options, window=WINDOW, sink=4)
            held, at = [], []
            for n in LENGTHS:
                while sketch.n_seen < n:
                    x = tokens(min(n - sketch.n_seen, 4096), sketch.n_seen)
                    sketch.update(x, x, queries=x)
                held.append(sketch.nbytes)
                at.append(copy.copy(sketch))
            grown[mode] = held, step_times(at)
        return grown

    setup_cache.timeout = 1200.0

    def track_memory_exponent(self, grown: dict[str, tuple[list[int], list[float]]], mode: str) -> float:
        return slope(LENGTHS, grown[mode][0])

    track_memory_exponent.unit = "exponent"

    def track_step_time_exponent(self, grown: dict[str, tuple[list[int], list[float]]], mode: str) -> float:
        return slope(LENGTHS, grown[mode][1])

    track_step_time_exponent.unit = "exponent"
