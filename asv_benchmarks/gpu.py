"""The CuPy backend on a GPU beside exact attention: a decoding step, and the absorbing of a long prompt.

Run with ``make bench-gpu``. Writes ``gpu.json`` and ``gpu.md``: what was measured, on what, and the target beside it.

Times are of CUDA events around CUDA graphs or long kernels, medians after a warm-up, on random data. A step over a
sketch fits the cache of the device, so steps go round over as many sketches as fill it several times.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

KV_HEADS, QUERY_HEADS, HEAD_DIM = 8, 32, 128
CLUSTERS, EXACT = 1024, 256
ROOM = 256
BYTES = 2  # of a bfloat16
CACHES_FILLED = 4  # how often the inputs of one timing fill the L2 cache


@dataclass
class Row:
    """One line of the table."""

    what: str
    measured: str
    target: str = ""
    met: str = ""


def events(module: Any, work: Callable[[], None], repeats: int) -> float:
    """Median seconds of work between two events of ``cupy.cuda`` or ``torch.cuda``."""
    timed = hasattr(module, "get_elapsed_time")
    work()
    work()
    times = []
    for _ in range(repeats):
        begin, end = (module.Event() if timed else module.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        milliseconds = module.get_elapsed_time(begin, end) if timed else begin.elapsed_time(end)
        times.append(milliseconds / 1e3)
    return float(np.median(times))


def bfloat16(cp: Any, x: Any) -> Any:
    """Truncate float32 to bfloat16."""
    import ml_dtypes

    return (x.view(cp.uint32) >> 16).astype(cp.uint16).view(ml_dtypes.bfloat16)


def draw(cp: Any, *shape: int) -> Any:
    return cp.random.standard_normal(shape, dtype=cp.float32)


def copy_bandwidth(cp: Any) -> float:
    """Bytes read and written each second by a large copy."""
    source = cp.random.randint(0, 255, size=1 << 30, dtype=cp.uint8)
    target = cp.empty_like(source)
    seconds = events(cp.cuda, lambda: cp.copyto(target, source), 20)
    return 2 * source.nbytes / seconds


def decoding_step(cp: Any, batch: int) -> tuple[float, float, int]:
    """Seconds of a step in a graph, seconds of one launched from Python, bytes read."""
    from subgen_cupy import BACKEND, capture

    attend = BACKEND.operations["sketch_attention"]
    streams, rows = batch * KV_HEADS, QUERY_HEADS // KV_HEADS
    of_clusters = CLUSTERS * (4 + 4 * BYTES)  # a count and the spread of four bands
    size = streams * ((CLUSTERS + EXACT) * 2 * HEAD_DIM * BYTES + of_clusters)
    cache = int(cp.cuda.Device().attributes["L2CacheSize"])
    sketches = []
    for _ in range(max(1, math.ceil(CACHES_FILLED * cache / size))):
        # As a sketch holds them: clusters, exact pairs, and room behind that is not read.
        pairs = [bfloat16(cp, draw(cp, streams, CLUSTERS + EXACT + ROOM, HEAD_DIM)) for _ in range(2)]
        counts = cp.random.randint(1, 1000, size=(streams, CLUSTERS)).astype(cp.int32)
        spread = bfloat16(cp, cp.abs(draw(cp, streams, CLUSTERS, 4)))
        queries = draw(cp, streams, rows, HEAD_DIM) * HEAD_DIM**-0.5
        sketches.append((queries, *(x[:, : CLUSTERS + EXACT] for x in pairs), counts, spread, 1))

    def all_of_them() -> list[Any]:
        return [attend(*sketch) for sketch in sketches]

    replay, _ = capture(all_of_them)
    graph = events(cp.cuda, replay, 50) / len(sketches)
    eager = events(cp.cuda, lambda: all_of_them() and None, 10) / len(sketches)
    return graph, eager, size


def exact_backends(torch: Any) -> list[Any]:
    from torch.nn.attention import SDPBackend

    names = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
    return [getattr(SDPBackend, name) for name in names if hasattr(SDPBackend, name)]


def fastest(torch: Any, q: Any, k: Any, v: Any, repeats: int, causal: bool = False) -> tuple[float, str]:
    """Seconds of exact attention, and which of torch's implementations it was."""
    from torch.nn.attention import sdpa_kernel

    best = (math.inf, "none")
    for backend in exact_backends(torch):

        def attend(backend: Any = backend) -> None:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        try:
            best = min(best, (events(torch.cuda, attend, repeats), backend.name))
        except RuntimeError as error:
            print(f"  {backend.name}: {str(error).splitlines()[0]}", file=sys.stderr)
    return best


def exact_step(torch: Any, batch: int, n: int) -> tuple[float, str] | None:
    """A decoding step of exact attention over n tokens, the query heads of a group folded into rows."""
    size = 2 * batch * KV_HEADS * n * HEAD_DIM * BYTES
    if size > 0.85 * torch.cuda.mem_get_info()[0]:
        return None
    options = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(batch, KV_HEADS, QUERY_HEADS // KV_HEADS, HEAD_DIM, **options)
    k, v = (torch.empty(batch, KV_HEADS, n, HEAD_DIM, **options).normal_() for _ in range(2))
    return fastest(torch, q, k, v, 20)


def absorbing(cp: Any, batch: int, tokens: int, block: int) -> float:
    """Seconds of merging tokens into the clusters, a block at a time: each step a graph, after a copy of the block."""
    from subgen_cupy import BACKEND, capture

    from subgen.merging import Means

    merge = BACKEND.operations["merge_closest"]
    streams, places = batch * KV_HEADS, CLUSTERS + block
    new = [draw(cp, streams, 4 * block, HEAD_DIM) for _ in range(2)]
    held = Means(
        keys=draw(cp, streams, places, HEAD_DIM),
        values=draw(cp, streams, places, HEAD_DIM),
        counts=cp.ones((streams, places), dtype=cp.int32),
        spread=cp.zeros((streams, places, 4), dtype=cp.float32),
        importance=cp.ones((streams, places), dtype=cp.float32),
    )
    queries = draw(cp, streams, 2 * HEAD_DIM, HEAD_DIM)
    metric = cp.matmul(cp.swapaxes(queries, 1, 2), queries) / queries.shape[1]
    scale = cp.full(streams, HEAD_DIM**0.5, dtype=cp.float32)

    def step() -> Any:
        merged, moved = merge(held, metric, scale, CLUSTERS, CLUSTERS)
        for name in ("keys", "values", "counts", "spread", "importance"):
            getattr(held, name)[:, :CLUSTERS] = getattr(merged, name)
        held.counts[:, CLUSTERS:] = 1
        held.importance[:, CLUSTERS:] = 1
        held.spread[:, CLUSTERS:] = 0
        return moved

    replay, _ = capture(step)

    def all_tokens() -> None:
        for turn in range(tokens // block):
            part = slice(turn % 4 * block, (turn % 4 + 1) * block)
            held.keys[:, CLUSTERS:], held.values[:, CLUSTERS:] = new[0][:, part], new[1][:, part]
            replay()

    return events(cp.cuda, all_tokens, 3)


def whole_sketch(cp: Any, batch: int, tokens: int, window: int) -> tuple[float, float]:
    """Seconds of `AttentionSketch.update` with the queries, and of a token in `AttentionSketch.step` after it."""
    import subgen

    queries = draw(cp, batch, QUERY_HEADS, tokens, HEAD_DIM).astype(cp.float16)
    keys, values = (draw(cp, batch, KV_HEADS, tokens, HEAD_DIM).astype(cp.float16) for _ in range(2))

    def update() -> Any:
        sketch = subgen.AttentionSketch(max_clusters=CLUSTERS, window=window, check_finite=False)
        sketch.update(keys, values, queries)
        return sketch

    sketch, steps = update(), window  # so that merges are in it, as often as they are in a long answer

    def decode() -> None:
        for i in range(steps):
            part = slice(i % tokens, i % tokens + 1)
            sketch.step(queries[:, :, part], keys[:, :, part], values[:, :, part])

    return events(cp.cuda, lambda: update() and None, 3), events(cp.cuda, decode, 3) / steps


def exact_causal(torch: Any, batch: int, n: int) -> tuple[float, str]:
    options = {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = (torch.randn(batch, QUERY_HEADS, n, HEAD_DIM, **options) for _ in range(3))
    return fastest(torch, q, k, v, 3, causal=True)


def verdict(met: bool) -> str:
    return "yes" if met else "no"


def measure(cp: Any, torch: Any | None, quick: bool) -> list[Row]:
    """Measure everything, printing as it goes."""
    rows: list[Row] = []

    def add(*cells: str) -> None:
        rows.append(Row(*cells))
        print(*cells, sep=" | ", flush=True)

    def tidy() -> None:
        cp.get_default_memory_pool().free_all_blocks()
        if torch is not None:
            torch.cuda.empty_cache()

    bandwidth = copy_bandwidth(cp)
    add("copy, bytes read and written", f"{bandwidth / 1e12:.2f} TB/s")
    targets = {(1, 131072): 5, (1, 10**6): 40, (16, 131072): 40, (16, 10**6): 200}
    for batch in (1, 16, 64):
        tidy()
        seconds, eager, size = decoding_step(cp, batch)
        floor = size / bandwidth
        name = f"step over the sketch, batch {batch}"
        target = "within 3x of its bytes" if batch == 64 else ""
        met = verdict(seconds <= 3 * floor) if target else ""
        add(name, f"{seconds * 1e6:.1f} us, {seconds / floor:.2f}x the time of its {size / 1e6:.1f} MB", target, met)
        add(f"{name}, launched from Python", f"{eager * 1e6:.1f} us")
        for n in () if torch is None or quick else (131072, 10**6):
            tidy()
            exact = exact_step(torch, batch, n)
            if exact is None:
                add(f"exact step, batch {batch}, n = {n}", "does not fit the device's memory")
                continue
            ratio = exact[0] / seconds
            goal = targets.get((batch, n))
            add(
                f"exact step, batch {batch}, n = {n}",
                f"{exact[0] * 1e6:.1f} us ({exact[1]}), {ratio:.1f}x the sketch's",
                f">= {goal}x" if goal else "",
                verdict(ratio >= goal) if goal else "",
            )
    tokens = 8192 if quick else 131072
    for batch in (1,) if quick else (1, 4):
        tidy()
        causal = None if torch is None else exact_causal(torch, batch, tokens)
        if causal is not None:
            add(f"exact causal attention, batch {batch}, {tokens} tokens", f"{causal[0] * 1e3:.1f} ms ({causal[1]})")
        for block in (64, 128, 256, 512):
            tidy()
            seconds = absorbing(cp, batch, tokens, block)
            share = "" if causal is None else f", {seconds / causal[0]:.2f} of exact"
            add(
                f"merging {tokens} tokens into {CLUSTERS} clusters by {block}, batch {batch}",
                f"{seconds * 1e3:.1f} ms{share}",
                "< 0.25 of exact" if causal is not None else "",
                "" if causal is None else verdict(seconds < 0.25 * causal[0]),
            )
    few, window = 8192, 512
    for batch in (1,) if quick else (1, 16):
        tidy()
        update, token = whole_sketch(cp, batch, few, window)
        where = f"window {window}, batch {batch}, float16"
        add(f"AttentionSketch.update, {few} tokens, {where}", f"{update * 1e3:.1f} ms")
        add(f"AttentionSketch.step, a token, {where}", f"{token * 1e6:.1f} us")
    return rows


def describe(cp: Any, torch: Any | None) -> dict[str, str]:
    """Say what it was measured on."""
    properties = cp.cuda.runtime.getDeviceProperties(0)
    return {
        "device": properties["name"].decode(),
        "multiprocessors": str(properties["multiProcessorCount"]),
        "L2": f"{properties['l2CacheSize'] >> 20} MiB",
        "driver": str(cp.cuda.runtime.driverGetVersion()),
        "CUDA runtime": str(cp.cuda.runtime.runtimeGetVersion()),
        "cupy": cp.__version__,
        "numpy": np.__version__,
        "torch": "not used" if torch is None else torch.__version__,
        "python": platform.python_version(),
        "shape": f"{KV_HEADS} KV heads, {QUERY_HEADS} query heads, head_dim {HEAD_DIM}, bfloat16, "
        f"{CLUSTERS} clusters + {EXACT} exact",
    }


def markdown(rows: list[Row], where: dict[str, str]) -> str:
    """Write the table."""
    lines = ["| what | measured | target | met |", "| --- | --- | --- | --- |"]
    lines += [f"| {row.what} | {row.measured} | {row.target} | {row.met} |" for row in rows]
    return "\n".join(lines) + "\n\n" + "; ".join(f"{name} {value}" for name, value in where.items()) + ".\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, default=Path("build/gpu"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see whether it runs")
    options = parser.parse_args(arguments)
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy missing, or no device behind it
        print(f"gpu benchmarks need CuPy and a CUDA device: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    torch: Any | None = None
    try:
        import torch

        if not torch.cuda.is_available():
            torch = None
    except ImportError:
        pass
    if torch is None:
        print("without torch on CUDA: nothing to compare with", file=sys.stderr)
    rows, where = measure(cupy, torch, options.quick), describe(cupy, torch)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "gpu.json").write_text(json.dumps({"on": where, "rows": [asdict(row) for row in rows]}, indent=1))
    (options.output / "gpu.md").write_text(markdown(rows, where))
    print(markdown(rows, where))
    return 0


if __name__ == "__main__":
    sys.exit(main())
