"""The default sketch: a token taken in, a token answered, both, a block; bytes held and peak memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._common import BACKENDS, CLUSTERS, SINK, SMOKE, WINDOW, array, block, filled, synchronise

LENGTHS = (2**9,) if SMOKE else (2**11, 2**14)


class _Data:
    """What all of them stream."""

    def setup_cache(self) -> dict[str, np.ndarray]:
        return block()


class Tokens(_Data):
    """Half a window of tokens, one a call: one absorption in it, whatever the machine and the length."""

    params = (BACKENDS, LENGTHS)
    param_names = ("backend", "n")
    timeout = 300.0
    storage = "input"

    def setup(self, data: dict[str, np.ndarray], backend: str, n: int) -> None:
        self.data = {name: array(backend, x) for name, x in data.items()}
        self.sketch = filled(n, self.data, storage=self.storage)
        parts = [slice(i, i + 1) for i in range(WINDOW // 2)]
        self.tokens = [tuple(self.data[name][:, part] for name in "qkv") for part in parts]

    def time_update(self, data: Any, backend: str, n: int) -> None:
        for q, k, v in self.tokens:
            self.sketch.update(k, v, queries=q)
        synchronise(backend)

    def time_attend(self, data: Any, backend: str, n: int) -> None:
        for q, _, _ in self.tokens:
            self.sketch.attend(q)
        synchronise(backend)

    def time_step(self, data: Any, backend: str, n: int) -> None:
        for q, k, v in self.tokens:
            self.sketch.update(k, v, queries=q)
            self.sketch.attend(q)
        synchronise(backend)


class TokensIn8Bits(Tokens):
    """The same with int8 clusters."""

    storage = "int8"


class Blocks(_Data):
    """Few clusters, which are all compared in every absorption, and many, which cache their nearest neighbours."""

    params = (BACKENDS, (CLUSTERS, 4 * CLUSTERS))
    param_names = ("backend", "clusters")
    timeout = 300.0

    def setup(self, data: dict[str, np.ndarray], backend: str, clusters: int) -> None:
        self.data = {name: array(backend, x) for name, x in data.items()}
        self.sketch = filled(2 * clusters, self.data, max_clusters=clusters)

    def time_update_of_a_block(self, data: Any, backend: str, clusters: int) -> None:
        self.sketch.update(self.data["k"], self.data["v"], queries=self.data["q"])
        synchronise(backend)

    def time_step_of_a_block(self, data: Any, backend: str, clusters: int) -> None:
        self.sketch.step(self.data["q"], self.data["k"], self.data["v"])
        synchronise(backend)


class Memory(_Data):
    """Peak memory of a process that streams n tokens; what it takes before the first is in the empty reference."""

    params = (("numpy", "torch"), LENGTHS)
    param_names = ("backend", "n")
    timeout = 300.0

    def setup(self, data: dict[str, np.ndarray], backend: str, n: int) -> None:
        self.data = {name: array(backend, x) for name, x in data.items()}

    def peakmem_empty_reference(self, data: Any, backend: str, n: int) -> None:
        pass

    def peakmem_update(self, data: Any, backend: str, n: int) -> None:
        filled(n, self.data)

    def peakmem_exact_cache(self, data: Any, backend: str, n: int) -> None:
        """Keys and values of as many tokens, and nothing done with them."""
        shape = (data["k"].shape[0], n, data["k"].shape[2])
        array(backend, np.ones(shape, np.float32)), array(backend, np.ones(shape, np.float32))


class Bytes(_Data):
    params = (LENGTHS, ("input", "int8"))
    param_names = ("n", "storage")

    def track_cache_bytes(self, data: Any, n: int, storage: str) -> int:
        return filled(n, data, storage=storage).nbytes

    track_cache_bytes.unit = "bytes"

    def track_pairs(self, data: Any, n: int, storage: str) -> int:
        """Pairs a query is answered from: at most the clusters, the sinks and the window."""
        sketch = filled(n, data, storage=storage)
        pairs = int(np.max(sketch.n_clusters)) + sketch.state.exact.n
        assert pairs <= CLUSTERS + SINK + WINDOW  # noqa: S101
        return pairs
