"""Streams, sketches of every kind, and what two states must agree in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from libraries import to_numpy
from safetensors.numpy import load_file, safe_open, save_file

from subgen import AttentionSketch, Power
from subgen._tree import leaves, tree_map
from subgen.io.save import _checksum

VARIANTS: dict[str, dict[str, Any]] = {
    "threshold": {"delta": 2.0},
    "threshold with a cap": {"delta": 1.0, "max_clusters": 9},
    "schedule": {"max_clusters": Power(1.5, 0.5)},
    "share": {"compression_ratio": 0.6},
    "bytes": {"max_bytes": 4000},
    "int8": {"max_clusters": 9, "storage": "int8"},
    "corrected": {"max_clusters": 9, "residual_samples": 12},
    "everything": {"delta": 1.0, "max_clusters": Power(1.0, 0.5), "storage": "int8", "residual_samples": 5},
}

PAPER = {"delta": 1.0, "samples_per_cluster": 3, "value_samples": 7, "scale": None}


def make(variant: str) -> AttentionSketch:
    """Make a sketch of a variant, of ``"default"`` or of ``"paper"``."""
    if variant == "paper":
        return AttentionSketch.paper(**PAPER, seed=5)
    if variant == "default":
        return AttentionSketch(9, window=8, sink=2, seed=5)
    return AttentionSketch(window=8, sink=2, seed=5, **VARIANTS[variant])


def stream(seed: int, shape: tuple[int, ...], n: int, d: int = 4, e: int = 3, group: int = 1) -> tuple[Any, Any, Any]:
    """Queries, keys and values in float32; keys share an offset, as those of models do."""
    rng = np.random.default_rng(seed)
    heads = (*shape[:-1], shape[-1] * group) if shape else shape
    q = rng.normal(size=(*heads, n, d))
    k = rng.normal(size=(*shape, n, d)) + 3.0
    v = rng.normal(size=(*shape, n, e))
    return tuple(x.astype(np.float32) for x in (q, k, v))


def feed(sketch: AttentionSketch, keys: Any, values: Any, queries: Any = None) -> None:
    """Update a sketch, by position."""
    sketch.update(keys, values, queries=queries)


def arrays(state: Any) -> dict[str, Any]:
    """Everything a state of the default sketch holds, by name; of the exact tokens without the free space."""
    n = state.exact.n
    written = replace(state, exact=tree_map(lambda x: x[:, :n, ...], state.exact))
    return {name: to_numpy(x) for name, x in leaves(written)} | {"n_seen": state.n_seen, "exact.n": n}


def assert_same(a: Any, b: Any) -> None:
    """Compare two states of the default sketch to the last bit."""
    a, b = arrays(a), arrays(b)
    assert set(a) == set(b)
    for name in b:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def resign(path: Path, change: Callable[[dict[str, Any], Any, Any], Any]) -> None:
    """Alter a saved sketch and sign it anew: what a checksum cannot catch."""
    with safe_open(path, framework="numpy") as archive:
        metadata = archive.metadata()
    tensors, config = load_file(path), json.loads(metadata["config"])
    change(tensors, config, metadata)
    text = json.dumps(config, sort_keys=True)
    metadata |= {"config": text, "sha256": _checksum(text, tensors)}
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path, metadata)


def below(degrees: int) -> float:
    """What chi-square exceeds with probability below 1e-6 (Wilson and Hilferty's normal law, z = 4.9, rounded up)."""
    a = 2.0 / (9.0 * degrees)
    return degrees * (1.0 - a + 4.9 * math.sqrt(a)) ** 3
