"""What the benchmarks share: backends, data, and waiting for a device."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np

from subgen import AttentionSketch

# Every benchmark at sizes that show that it runs, and nothing else.
SMOKE = os.environ.get("SUBGEN_BENCH_SMOKE") == "1"

BACKENDS = ("numpy", "torch", "torch-cuda", "cupy")
KV_HEADS, GROUP, HEAD_DIM = 2, 4, 64
CLUSTERS, WINDOW, SINK = 256, 128, 4
BLOCK = 1024


def array(backend: str, x: np.ndarray) -> Any:
    """Bring an array to a backend; NotImplementedError, which asv takes for a skip, where it is missing."""
    name, _, device = backend.partition("-")
    try:
        module = importlib.import_module(name)
    except ImportError:
        raise NotImplementedError(f"{name} is not installed") from None
    if device and not module.cuda.is_available():
        raise NotImplementedError("no CUDA device")
    if name == "cupy":
        try:
            module.cuda.runtime.getDeviceCount()
        except module.cuda.runtime.CUDARuntimeError:
            raise NotImplementedError("no CUDA device") from None
    if name == "torch":
        return module.from_numpy(np.ascontiguousarray(x)).to(device or "cpu")
    return module.asarray(x)


def synchronise(backend: str) -> None:
    """Wait until the device has done what it was given."""
    if backend == "torch-cuda":
        importlib.import_module("torch").cuda.synchronize()
    elif backend == "cupy":
        importlib.import_module("cupy").cuda.get_current_stream().synchronize()


def block(seed: int = 0, n: int = BLOCK) -> dict[str, np.ndarray]:
    """Queries, keys and values of normal numbers: (heads, n, head_dim), float32."""
    rng = np.random.default_rng(seed)
    heads = {"q": KV_HEADS * GROUP, "k": KV_HEADS, "v": KV_HEADS}
    return {name: rng.standard_normal((h, n, HEAD_DIM), dtype=np.float32) for name, h in heads.items()}


def filled(n: int, data: dict[str, Any], **options: Any) -> AttentionSketch:
    """Stream n tokens, the data again and again, through a new sketch."""
    sketch = AttentionSketch(**({"max_clusters": CLUSTERS, "window": WINDOW, "sink": SINK} | options))
    while sketch.n_seen < n:
        part = slice(0, min(n - sketch.n_seen, data["k"].shape[1]))
        sketch.update(data["k"][:, part], data["v"][:, part], queries=data["q"][:, part])
    return sketch


def slope(lengths: list[int], numbers: list[float]) -> float:
    """Exponent of growth: least squares through logarithms."""
    return float(np.polyfit(np.log(lengths), np.log(numbers), 1)[0])
