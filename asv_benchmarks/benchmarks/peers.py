"""What the sketch is beside: exact attention as fast as NumPy and torch have it, and a cache of as many pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._common import CLUSTERS, GROUP, HEAD_DIM, KV_HEADS, SINK, SMOKE, WINDOW
from ._peers import exact_decoders

LENGTHS = (2**9,) if SMOKE else (2**11, 2**14)
WAYS = ("numpy", "torch, fused", "torch, products", "torch, products with keys on the left")


class Exact:
    params = (WAYS, LENGTHS)
    param_names = ("way", "n")

    def setup_cache(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(0)
        q = rng.standard_normal((KV_HEADS * GROUP, 1, HEAD_DIM), dtype=np.float32)
        k, v = (rng.standard_normal((KV_HEADS, max(LENGTHS), HEAD_DIM), dtype=np.float32) for _ in range(2))
        return q, k, v

    def setup(self, data: Any, way: str, n: int) -> None:
        q, k, v = data
        decoders = exact_decoders(q, k[:, :n].copy(), v[:, :n].copy())
        if way not in decoders:
            raise NotImplementedError("torch is not installed")
        self.decode = decoders[way]

    def time_attend(self, data: Any, way: str, n: int) -> None:
        self.decode()


class FixedCache:
    """The newest tokens in a ring, as many as the sketch has pairs: what a step costs if the rest is forgotten."""

    params = WAYS
    param_names = ("way",)

    def setup(self, way: str) -> None:
        rng = np.random.default_rng(0)
        pairs = CLUSTERS + SINK + WINDOW
        q = rng.standard_normal((KV_HEADS * GROUP, 1, HEAD_DIM), dtype=np.float32)
        self.k, self.v = (rng.standard_normal((KV_HEADS, pairs, HEAD_DIM), dtype=np.float32) for _ in range(2))
        self.token = self.k[:, 0].copy()
        decoders = exact_decoders(q, self.k, self.v)
        if way not in decoders:
            raise NotImplementedError("torch is not installed")
        self.decode, self.turn = decoders[way], 0

    def time_step(self, way: str) -> None:
        place = self.turn % self.k.shape[1]
        self.k[:, place] = self.token  # torch reads the same memory
        self.v[:, place] = self.token
        self.turn += 1
        self.decode()
