"""The CuPy backend on a GPU beside exact attention: a decoding step, and the absorbing of a long prompt.

Run with ``make bench-gpu``. Writes ``gpu.json`` and ``gpu.md``: what was measured, on what, and the target beside it.
They are written anew after every number, a part that fails is a line in them, and parts that would begin after
``--minutes`` are left out: whatever happens, what was measured is there.

Times are of CUDA events around CUDA graphs or long kernels, medians after a warm-up, on random data. A step over a
sketch fits the cache of the device, so steps go round over as many sketches as fill it several times.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

KV_HEADS, QUERY_HEADS, HEAD_DIM = 8, 32, 128
CLUSTERS, EXACT = 1024, 256
ROOM = 256
BYTES = 2  # of a bfloat16
LONG = 131072
#: Batch and tokens of exact attention, and how many times as fast the sketch is to be.
TARGETS = {(1, LONG): 5, (1, 10**6): 40, (16, LONG): 40, (16, 10**6): 200}
CACHES_FILLED = 4  # how often the inputs of one timing fill the L2 cache
STEPS = 8  # of a long block, in a graph that is timed


@dataclass
class Row:
    """One line of the table."""

    what: str
    measured: str
    target: str = ""
    met: str = ""


def events(module: Any, work: Callable[[], None], repeats: int, warmups: int = 2) -> float:
    """Median seconds of work between two events of ``cupy.cuda`` or ``torch.cuda``."""
    timed = hasattr(module, "get_elapsed_time")
    for _ in range(warmups):
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
    source = draw(cp, 1 << 28)
    target = cp.empty_like(source)
    seconds = events(cp.cuda, lambda: cp.copyto(target, source), 20)
    return 2 * source.nbytes / seconds


def decoding_step(cp: Any, batch: int) -> tuple[float, float, int]:
    """Seconds of a step in a graph, seconds of one launched from Python, bytes read."""
    from subgen_cupy import BACKEND, capture

    from subgen.default.state import BufferOwner, Clusters, Exact, Quantized, State

    attend = BACKEND.operations["attend"]
    streams, rows = batch * KV_HEADS, QUERY_HEADS // KV_HEADS
    of_clusters = CLUSTERS * (8 + 4 * BYTES)  # a count and the key variance of four bands
    size = streams * ((CLUSTERS + EXACT) * 2 * HEAD_DIM * BYTES + of_clusters)
    cache = int(cp.cuda.Device().attributes["L2CacheSize"])
    sketches = []
    for _ in range(max(1, math.ceil(CACHES_FILLED * cache / size))):
        # As a sketch holds them: clusters, exact tokens, and free space behind that is not read.
        means, exact = (
            [bfloat16(cp, draw(cp, streams, n, HEAD_DIM)) for _ in range(2)] for n in (CLUSTERS, EXACT + ROOM)
        )
        counts = cp.random.randint(1, 1000, size=(streams, CLUSTERS)).astype(cp.int64)
        variance = bfloat16(cp, cp.abs(draw(cp, streams, CLUSTERS, 4)))
        # Attention reads neither importance nor queries.
        importance = cp.ones((streams, CLUSTERS), cp.float32)
        codes = Quantized(cp.zeros((streams, 1, HEAD_DIM), cp.int8), cp.zeros((streams, 1), cp.float32))
        clusters = Clusters(*means, counts, variance, importance)
        state = State(clusters, Exact(*exact, codes, EXACT, BufferOwner(None)), None, CLUSTERS + EXACT)
        sketches.append((state, draw(cp, streams, rows, HEAD_DIM) * HEAD_DIM**-0.5, 1))

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


def fastest(
    torch: Any, q: Any, k: Any, v: Any, repeats: int, causal: bool = False, only: str | None = None
) -> tuple[float, str]:
    """Seconds of exact attention, and which of torch's implementations it was, or one of them."""
    from torch.nn.attention import sdpa_kernel

    best = (math.inf, "none")
    for backend in exact_backends(torch):
        if only not in (None, backend.name):
            continue

        def attend(backend: Any = backend) -> None:
            with sdpa_kernel(backend):
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

        try:
            best = min(best, (events(torch.cuda, attend, repeats, warmups=1), backend.name))
        except Exception as error:  # one that does not take these shapes
            print(f"  {backend.name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    if best[0] == math.inf:
        raise RuntimeError("none of torch's exact attentions took these shapes")
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


def whole_sketch(module: Any, arrays: list[Any], window: int, storage: Any = "input") -> tuple[float, float]:
    """Seconds of `AttentionSketch.update` with the queries, and of a token in `AttentionSketch.step` after it.

    Queries, keys and values of CuPy or torch, and the module of its events.
    """
    import subgen

    queries, keys, values = arrays
    tokens = keys.shape[2]

    def update(n: int = tokens) -> Any:
        sketch = subgen.AttentionSketch(max_clusters=CLUSTERS, window=window, check_finite=False, storage=storage)
        sketch.update(keys[:, :, :n], values[:, :, :n], queries=queries[:, :, :n])
        return sketch

    update(min(tokens, CLUSTERS + 4 * window))  # compiles what it needs
    seconds = events(module, lambda: update() and None, 3, warmups=1)
    sketch, steps = update(), window  # so that merges are in it, as often as they are in a long answer
    some = tokens_of(arrays, 16)

    def decode() -> None:
        for i in range(steps):
            sketch.step(*some[i % 16])

    return seconds, events(module, decode, 3, warmups=1) / steps


def tokens_of(arrays: list[Any], n: int) -> list[list[Any]]:
    """Tokens as a model gives them: each in arrays of its own."""
    return [[x[:, :, i : i + 1] + 0 for x in arrays] for i in range(n)]


def cupys(cp: Any, batch: int, tokens: int) -> list[Any]:
    """Queries, keys and values in float16."""
    return [draw(cp, batch, heads, tokens, HEAD_DIM).astype(cp.float16) for heads in (QUERY_HEADS, KV_HEADS, KV_HEADS)]


def by_torch(torch: Any, batch: int, tokens: int, window: int, kernels: bool) -> tuple[float, float]:
    """`whole_sketch` of torch's tensors: by these kernels, or by torch's own backend."""
    import subgen_cupy
    import subgen_torch

    from subgen import backends

    heads = (QUERY_HEADS, KV_HEADS, KV_HEADS)
    arrays = [torch.randn(batch, h, tokens, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for h in heads]
    backends.register(subgen_cupy.torch_backend() if kernels else subgen_torch.WITHOUT_CUPY, replace=True)
    try:
        return whole_sketch(torch.cuda, arrays, window)
    finally:
        backends.register(subgen_torch.BACKEND, replace=True)


def decoders(cp: Any, batch: int, storage: Any) -> tuple[float, float]:
    """Seconds of a token that `Decoder` appends and answers: in a graph, and with merges, replayed from Python."""
    from subgen_cupy import Decoder, capture

    import subgen

    arrays = cupys(cp, batch, CLUSTERS + 4 * EXACT)
    sketch = subgen.AttentionSketch(max_clusters=CLUSTERS, window=EXACT, check_finite=False, storage=storage)
    sketch.update(arrays[1], arrays[2], queries=arrays[0])
    fill = CACHES_FILLED * int(cp.cuda.Device().attributes["L2CacheSize"])
    several = [Decoder(sketch) for _ in range(max(1, math.ceil(fill / sketch.nbytes)))]
    token = tokens_of(arrays, 1)[0]
    replay, _ = capture(lambda: [decoder.step(*token) for decoder in several])
    graph = events(cp.cuda, replay, 50) / len(several)
    decoder = several[0]
    replay, _ = capture(lambda: decoder.step(*token))

    def decode() -> None:
        for _ in range(EXACT):
            replay()
            decoder.advance()

    return graph, events(cp.cuda, decode, 3, warmups=1) / EXACT


def absorption(cp: Any, batch: int, window: int) -> tuple[float, float, dict[str, float]]:
    """Seconds that the host takes to launch an absorption, that the device takes for it, and for which kernels.

    The device is kept busy while the host launches, so that neither waits for the other and each is told by itself.
    """
    from subgen_cupy.device_cupy import CupyDevice

    import subgen

    half = window // 2
    steps = 2 + math.ceil(CLUSTERS / half) + 8  # as many clusters as there may be, and kernels compiled
    queries, keys, values = cupys(cp, batch, (steps + 48) * half)
    sketch = subgen.AttentionSketch(max_clusters=CLUSTERS, window=window, check_finite=False)
    source = draw(cp, 1 << 28)
    target = cp.empty_like(source)
    launch, spans = CupyDevice.run, []

    def update(step: int) -> None:
        part = slice(step * half, (step + 1) * half)
        sketch.update(keys[:, :, part], values[:, :, part], queries=queries[:, :, part])

    def timed(device: Any, work: Any) -> None:
        begin, end = cp.cuda.Event(), cp.cuda.Event()
        begin.record()
        launch(device, work)
        end.record()
        spans.append((work.kernel, begin, end))

    def busy_while(step: int) -> tuple[float, float]:
        begin, end = cp.cuda.Event(), cp.cuda.Event()
        for _ in range(24):
            cp.copyto(target, source)
        begin.record()
        start = time.perf_counter()
        update(step)
        host = time.perf_counter() - start
        if begin.done:
            raise RuntimeError("the device was idle before all was launched")
        end.record()
        end.synchronize()
        return host, cp.cuda.get_elapsed_time(begin, end) / 1e3

    for step in range(steps):
        update(step)
    cp.cuda.Device().synchronize()
    host, device = (float(np.median(x)) for x in zip(*(busy_while(steps + i) for i in range(24)), strict=True))
    CupyDevice.run = timed
    try:
        for step in range(24):
            busy_while(steps + 24 + step)
    finally:
        CupyDevice.run = launch
    kernels: dict[str, list[float]] = {}
    for name, begin, end in spans:
        kernels.setdefault(name, []).append(cp.cuda.get_elapsed_time(begin, end) / 1e3)
    # Of all absorptions together, as some launch a kernel more often than others.
    return host, device, {name: sum(times) / 24 for name, times in kernels.items()}


def added_in_a_graph(cp: Any, batch: int, window: int) -> list[tuple[str, float]]:
    """Of a step of a long block, the seconds that each kernel adds to those before it, in a graph of some steps.

    Graphs end after one kernel more each time. They write into the arrays of the steps, which are not used afterwards.
    """
    from subgen_cupy.device_cupy import CupyDevice, graph_of

    import subgen

    added: list[tuple[str, float]] = []
    replayed = CupyDevice.replayed

    def timed(device: Any, launches: Any) -> Any:
        step, before = list(launches[: len(launches) // 2]), 0.0
        for k, launch in enumerate(step):
            graph = graph_of(device.number, step[: k + 1] * STEPS)
            now = events(cp.cuda, graph.launch, 10) / STEPS
            added.append((launch.kernel, now - before))
            before = now
        return replayed(device, launches)

    queries, keys, values = cupys(cp, batch, CLUSTERS + 8 * window)
    sketch = subgen.AttentionSketch(max_clusters=CLUSTERS, window=window, check_finite=False)
    CupyDevice.replayed = timed
    try:
        sketch.update(keys, values, queries=queries)
    finally:
        CupyDevice.replayed = replayed
    return added


def exact_causal(torch: Any, batch: int, n: int, only: str | None) -> tuple[float, str]:
    options = {"device": "cuda", "dtype": torch.bfloat16}
    q, k, v = (torch.randn(batch, QUERY_HEADS, n, HEAD_DIM, **options) for _ in range(3))
    return fastest(torch, q, k, v, 3, causal=True, only=only)


def verdict(met: bool) -> str:
    return "yes" if met else "no"


class Bench:
    """What was measured so far; every number is written to the files at once."""

    def __init__(self, cp: Any, torch: Any | None, quick: bool, folder: Path, minutes: float) -> None:
        self.cp, self.torch, self.quick, self.folder = cp, torch, quick, folder
        self.deadline = time.monotonic() + 60 * minutes
        self.rows: list[Row] = []
        self.failed: list[str] = []
        self.bandwidth = math.nan
        self.causal: dict[int, tuple[float, str]] = {}
        self.where: dict[str, str] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, *cells: str) -> None:
        self.rows.append(Row(*cells))
        print(*cells, sep=" | ", flush=True)
        self.write()

    def write(self) -> None:
        rows = [asdict(row) for row in self.rows]
        (self.folder / "gpu.json").write_text(
            json.dumps({"on": self.where, "rows": rows, "failed": self.failed}, indent=1)
        )
        (self.folder / "gpu.md").write_text(markdown(self.rows, self.where))

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Run a part; whatever goes wrong in it is a line of the table, and the next part follows."""
        if time.monotonic() > self.deadline:
            self.add(name, "left out: no time was left")
            return
        gc.collect()
        try:
            self.cp.get_default_memory_pool().free_all_blocks()
            if self.torch is not None:
                self.torch.cuda.empty_cache()
            begin = time.monotonic()
            work()
            print(f"  ({name}: {time.monotonic() - begin:.1f} s)", file=sys.stderr, flush=True)
        except Exception as error:
            self.failed.append(f"{name}\n{traceback.format_exc()}")
            traceback.print_exc()
            self.add(name, f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}")

    def copy(self) -> None:
        self.bandwidth = copy_bandwidth(self.cp)
        self.add("copy, bytes read and written", f"{self.bandwidth / 1e12:.2f} TB/s")

    def step(self, batch: int) -> None:
        seconds, eager, size = decoding_step(self.cp, batch)
        floor = size / self.bandwidth
        name = f"step over the sketch, batch {batch}"
        target = "within 3x of its bytes" if batch == 64 else ""
        met = verdict(seconds <= 3 * floor) if target else ""
        text = f"{seconds * 1e6:.1f} us, {seconds / floor:.2f}x the time of its {size / 1e6:.1f} MB"
        self.add(name, text, target, met)
        self.add(f"{name}, launched from Python", f"{eager * 1e6:.1f} us")
        for n in () if self.torch is None or self.quick else (131072, 10**6):
            self.part(f"exact step, batch {batch}, n = {n}", lambda n=n: self.beside(batch, n, seconds))  # type: ignore[misc]

    def beside(self, batch: int, n: int, seconds: float) -> None:
        name, goal = f"exact step, batch {batch}, n = {n}", TARGETS.get((batch, n))
        exact = exact_step(self.torch, batch, n)
        if exact is None:
            self.add(name, "does not fit the device's memory")
            return
        ratio = exact[0] / seconds
        text = f"{exact[0] * 1e6:.1f} us ({exact[1]}), {ratio:.1f}x the sketch's"
        self.add(name, text, f">= {goal}x" if goal else "", verdict(ratio >= goal) if goal else "")

    def exact_prompt(self, batch: int, tokens: int) -> None:
        # What is fastest for one prompt is for several, and others take long to show that they are not.
        only = self.causal[1][1] if 1 in self.causal else None
        self.causal[batch] = exact_causal(self.torch, batch, tokens, only)
        seconds, implementation = self.causal[batch]
        self.add(
            f"exact causal attention, batch {batch}, {tokens} tokens", f"{seconds * 1e3:.1f} ms ({implementation})"
        )

    def prompt(self, what: str, seconds: float, batch: int | None) -> None:
        causal = None if batch is None else self.causal.get(batch)
        share = "" if causal is None else f", {seconds / causal[0]:.2f} of exact"
        target = "" if causal is None else "< 0.25 of exact"
        met = "" if causal is None else verdict(seconds < 0.25 * causal[0])
        self.add(what, f"{seconds * 1e3:.1f} ms{share}", target, met)

    def sketch(self, batch: int, tokens: int, window: int, storage: str = "input") -> None:
        update, token = whole_sketch(self.cp.cuda, cupys(self.cp, batch, tokens), window, storage)
        where = f"window {window}, batch {batch}, float16{', int8 means' if storage == 'int8' else ''}"
        self.prompt(f"AttentionSketch.update, {tokens} tokens, {where}", update, batch)
        self.add(f"AttentionSketch.step, a token, {where}", f"{token * 1e6:.1f} us")

    def decoder(self, batch: int, storage: str = "input") -> None:
        graph, replayed = decoders(self.cp, batch, storage)
        self.add(
            f"Decoder, a token, batch {batch}, float16{', int8 means' if storage == 'int8' else ''}",
            f"{graph * 1e6:.1f} us in a graph; {replayed * 1e6:.1f} us with what the host does, merges included",
        )

    def tensors(self, batch: int, tokens: int, window: int) -> None:
        own, kernels = (by_torch(self.torch, batch, tokens, window, which) for which in (False, True))
        what = f"torch, window {window}, batch {batch}, bfloat16: its own operations, these kernels"
        self.add(
            f"AttentionSketch.update, {tokens} tokens, {what}",
            f"{own[0] * 1e3:.1f} ms, {kernels[0] * 1e3:.1f} ms: {own[0] / kernels[0]:.1f} times as fast",
        )
        self.add(
            f"AttentionSketch.step, a token, {what}",
            f"{own[1] * 1e6:.1f} us, {kernels[1] * 1e6:.1f} us: {own[1] / kernels[1]:.1f} times as fast",
        )

    def apart(self, batch: int, window: int) -> None:
        host, device, kernels = absorption(self.cp, batch, window)
        longest = sorted(kernels.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{name} {seconds * 1e6:.0f}" for name, seconds in longest)
        self.add(
            f"an absorption of {window // 2} tokens, batch {batch}",
            f"launching {host * 1e6:.0f} us, on the device {device * 1e6:.0f} us: {parts}",
        )

    def in_a_graph(self, batch: int, window: int) -> None:
        added = added_in_a_graph(self.cp, batch, window)
        parts = ", ".join(f"{name} {seconds * 1e6:.0f}" for name, seconds in added)
        whole = sum(seconds for _, seconds in added)
        self.add(
            f"a step of {window // 2} tokens in a graph, batch {batch}, and what each kernel adds",
            f"{whole * 1e6:.0f} us: {parts}",
        )

    def everything(self) -> None:
        self.part("what it runs on", lambda: self.where.update(describe(self.cp, self.torch)))
        self.part("copy", self.copy)
        for batch in (1, 16, 64):
            self.part(f"step over the sketch, batch {batch}", lambda batch=batch: self.step(batch))  # type: ignore[misc]
        for batch in (1,) if self.quick else (1, 16, 64):
            self.part(f"Decoder, batch {batch}", lambda batch=batch: self.decoder(batch))  # type: ignore[misc]
        tokens = 8192 if self.quick else LONG
        for batch in (1,) if self.quick else (1, 4):
            if self.torch is not None:
                self.part(
                    f"exact causal attention, batch {batch}",
                    lambda batch=batch: self.exact_prompt(batch, tokens),  # type: ignore[misc]
                )
            for window in (256, 512, 1024, 2048):
                self.part(
                    f"AttentionSketch, window {window}, batch {batch}",
                    lambda batch=batch, window=window: self.sketch(batch, tokens, window),  # type: ignore[misc]
                )
        for window in (512, 2048):
            self.part(f"a step, window {window}", lambda window=window: self.in_a_graph(1, window))  # type: ignore[misc]
        for batch in (1,) if self.quick else (1, 64):
            self.part(f"Decoder, int8 means, batch {batch}", lambda batch=batch: self.decoder(batch, "int8"))  # type: ignore[misc]
        self.part("AttentionSketch, int8 means", lambda: self.sketch(1, tokens, 512, "int8"))
        for window in (128, 256, 512):
            self.part(f"an absorption of {window // 2} tokens", lambda window=window: self.apart(1, window))  # type: ignore[misc]
        for batch in () if self.torch is None else (1,) if self.quick else (1, 16):
            self.part(f"torch, batch {batch}", lambda batch=batch: self.tensors(batch, 8192, 512))  # type: ignore[misc]


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
    parser.add_argument("--minutes", type=float, default=7.0, help="no part begins after this")
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
    except Exception as error:  # torch missing, or broken
        print(f"torch: {type(error).__name__}: {error}", file=sys.stderr)
    if torch is None:
        print("without torch on CUDA: nothing to compare with", file=sys.stderr)
    bench = Bench(cupy, torch, options.quick, options.output, options.minutes)
    bench.everything()
    print(markdown(bench.rows, bench.where))
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
