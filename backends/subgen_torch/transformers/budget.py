"""How much each layer keeps: a number of clusters, or a share of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from subgen import AttentionSketch
from subgen._checks import check_choice, check_integer, check_ratio, check_seed
from subgen.default.algorithm import ClusterMeans, Storage
from subgen.default.budget import Fixed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Budget", "budgets"]

# Clusters of the smallest sketch that a ratio makes.
_FEWEST = 6


@dataclass(frozen=True)
class Budget:
    """Of one layer; exactly one of ``max_clusters`` and ``compression_ratio`` is given.

    Called with the number of tokens of the first block (the prompt), the softmax scale, and keys and values of
    its shape and dtype, it gives a sketch.
    """

    max_clusters: int | None
    compression_ratio: float | None
    window: int
    sink: int
    seed: int
    storage: Storage = "input"

    def __call__(self, first: int, scale: float, keys: Tensor, values: Tensor) -> AttentionSketch:
        """Return an empty sketch.

        A share of the prompt too small to hold the sinks, a window of 2 and 6 clusters leaves the prompt exact: the
        window is not shrunk, and there are as many clusters as tokens.
        """
        window, clusters = self.window, self.max_clusters
        if clusters is None:
            window, clusters = self._share_of(first, keys, values)
        # A model's NaN passes, as it does with every cache: looking for it would wait for the device at each token.
        return AttentionSketch(
            clusters,
            window=window,
            sink=self.sink,
            scale=scale,
            storage=self.storage,
            check_finite=False,
            seed=self.seed,
        )

    def _share_of(self, first: int, keys: Tensor, values: Tensor) -> tuple[int, int]:
        """Window and clusters for a prompt of so many tokens."""
        pairs = int((1.0 - (self.compression_ratio or 0.0)) * first + 0.5)
        # Most of what the sinks leave is for clusters (docs/howto/transformers.md says what other shares gave).
        window = min(self.window, max(2, (pairs - self.sink) // 6))
        clusters = pairs - self.sink - window
        if clusters < _FEWEST:
            # A cluster of one is its token, unless it is stored in int8, as the window never is.
            window = self.window if self.storage == "input" else max(self.window, first + self.window // 2)
            return window, max(_FEWEST, first)
        if self.storage == "int8":
            # As many as fit into the bytes of those pairs.
            method = ClusterMeans(Fixed(1), window=window, sink=self.sink, storage=self.storage)
            held = method.footprint(keys.flatten(0, -3), values.flatten(0, -3))
            clusters = max(clusters, held.clusters_in(pairs * held.pair))
        return window, clusters


def budgets(
    layers: int, max_clusters: Any, compression_ratio: Any, *, window: int, sink: int, seed: int, storage: Storage
) -> list[Budget]:
    """Return the budget of each layer.

    Raises
    ------
    TypeError, ValueError
        If a number is out of bounds, both or neither way of giving a budget is used, or a sequence does not have one
        entry a layer.
    """
    if (max_clusters is None) == (compression_ratio is None):
        raise ValueError(
            f"give one of max_clusters (clusters per head) and compression_ratio (share of the prompt's pairs to "
            f"remove), got max_clusters={max_clusters!r} and compression_ratio={compression_ratio!r}"
        )
    window = check_integer("window", window, minimum=2)
    sink = check_integer("sink", sink, minimum=0)
    seed = check_seed(seed)
    check_choice("storage", storage, ("input", "int8"))
    if compression_ratio is None:
        clusters = [check_integer("max_clusters", x) for x in _each("max_clusters", max_clusters, layers)]
        return [Budget(x, None, window, sink, seed, storage) for x in clusters]
    ratios = [check_ratio(x) for x in _each("compression_ratio", compression_ratio, layers)]
    return [Budget(None, x, window, sink, seed, storage) for x in ratios]


def _each(name: str, value: Any, layers: int) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * layers
    if len(value) != layers:
        raise ValueError(f"{name} must be one number, or one for each of the {layers} layers: got {len(value)}")
    return list(value)
