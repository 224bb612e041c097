"""Error on the real sample that the package ships: speed that costs accuracy shows here."""

from __future__ import annotations

import numpy as np

from subgen import AttentionSketch, attention
from subgen.io.captures import sample

# Pairs a query is answered from: a tenth and a quarter of the sample.
PAIRS = (154, 384)


class Error:
    params = (PAIRS, ("input", "int8"))
    param_names = ("pairs", "storage")

    def setup_cache(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        capture = sample()
        data = {name: getattr(capture, name).astype(np.float32) for name in ("q", "k", "v")}
        exact = attention(data["q"][:, -256:], data["k"], data["v"], causal=True)
        return data, exact

    def track_error(self, cache: tuple[dict[str, np.ndarray], np.ndarray], pairs: int, storage: str) -> float:
        """Mean relative error of the last 256 answers."""
        data, exact = cache
        sketch = AttentionSketch(pairs - 68, window=64, sink=4, storage=storage)
        got = sketch.step(data["q"], data["k"], data["v"])[:, -256:]
        return float((np.linalg.norm(got - exact, axis=-1) / np.linalg.norm(exact, axis=-1)).mean())

    track_error.unit = "relative error"
