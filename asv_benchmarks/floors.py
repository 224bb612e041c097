"""The sketch beside exact attention on the same cores in the same run, and beside what the machine allows.

Run with ``make floors``. Every line is a median; ratios are between medians of calls that took turns, so that other
work on the machine slows both. ``--tokens``, ``--heads`` and so on shrink it.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
from benchmarks._peers import causal_exact, exact_decoders, torch_or_none

from subgen import AttentionSketch
from subgen.default.algorithm import COMPARE_ALL

# Groups of query heads to a key-value head.
GROUP = 4


def seconds(calls: dict[str, Sequence[Callable[[], Any]]], rounds: int, least: float = 0.0) -> dict[str, float]:
    """Median seconds of calls, several of each name; names take turns until ``least`` seconds have gone by."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for own in calls.values():
        own[0]()
    start, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - start < least:
        for name, own in calls.items():
            for call in own:
                begin = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - begin)
        done += 1
    return {name: median(t) for name, t in times.items()}


def machine(size: int) -> tuple[float, float]:
    """Measured bytes a second read from memory, and float32 operations a second of a matrix product: the best seen."""
    x = np.ones(size * size * 16, np.float32)
    a = np.ones((size, size), np.float32)
    calls: dict[str, list[Callable[[], Any]]] = {"read numpy": [lambda: x.max()], "product numpy": [lambda: a @ a]}
    torch = torch_or_none()
    if torch is not None:
        tx, ta = torch.from_numpy(x), torch.from_numpy(a)
        calls |= {"read torch": [lambda: tx.amax()], "product torch": [lambda: ta @ ta]}
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(5):
        for name, taken in seconds(calls, 1).items():
            best[name] = min(best[name], taken)
    read = min(taken for name, taken in best.items() if name.startswith("read"))
    product = min(taken for name, taken in best.items() if name.startswith("product"))
    return x.nbytes / read, 2 * size**3 / product


def arrays(heads: int, n: int, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, keys and values of normal numbers, float32."""
    rng = np.random.default_rng(seed)
    make = rng.standard_normal
    return (
        make((heads * GROUP, n, dim), dtype=np.float32),
        make((heads, n, dim), dtype=np.float32),
        make((heads, n, dim), dtype=np.float32),
    )


def merging_work(clusters: int, passing: int, dim: int) -> float:
    """Operations of an absorption that no program can do without: points in the metric, and the products of pairs.

    New clusters, those that come and those that merged before, are compared with all; every `COMPARE_ALL`-th time all
    are, by a product of which half is computed.
    """
    n = clusters + passing
    some, every = 2 * (2 * passing) * n * 2 * dim, n * n * 2 * dim
    return 2 * n * dim * dim + ((COMPARE_ALL - 1) * some + every) / COMPARE_ALL


def per_step(sketches: Sequence[AttentionSketch], data: tuple[Any, Any, Any], steps: int) -> list[float]:
    """Seconds of each of a number of single-token steps of every sketch; the data starts again when it ends."""
    q, k, v = data
    n, times = k.shape[1], []
    for step in range(steps):
        token = slice(step % n, step % n + 1)
        for sketch in sketches:
            begin = time.perf_counter()
            sketch.update(k[:, token], v[:, token], queries=q[:, token])
            sketch.attend(q[:, token])
            times.append(time.perf_counter() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=8, help="key-value heads; four query heads share each")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--clusters", type=int, default=1024)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--layers", type=int, default=48, help="sketches that are asked one after the other")
    parser.add_argument(
        "--steps", type=int, default=64, help="tokens of each of them, and a sixteenth of those of streams compared"
    )
    parser.add_argument("--contexts", type=int, nargs="*", default=[2**16, 2**20])
    parser.add_argument("--prompt", type=int, default=2**15, help="tokens absorbed at once; 0 skips it")
    parser.add_argument("--flat", type=int, nargs="*", default=[10**4, 10**6], help="lengths to compare steps at")
    parser.add_argument("--seconds", type=float, default=2.0, help="least time for the medians of short calls")
    parser.add_argument("--only", nargs="*", choices=["numpy", "torch"], default=["numpy", "torch"])
    args = parser.parse_args()
    torch = torch_or_none()
    if torch is not None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    libraries = {"numpy": np.asarray}
    if torch is not None:
        libraries["torch"] = torch.from_numpy
    libraries = {name: make for name, make in libraries.items() if name in args.only}
    bandwidth, rate = machine(max(256, 16 * args.dim))
    print(f"threads {os.environ.get('OMP_NUM_THREADS', 'not set')}; memory {bandwidth / 1e9:.1f} GB/s, ", end="")
    print(f"matrix products {rate / 1e9:.0f} GFLOP/s; {args.heads} key-value heads, {args.heads * GROUP} query heads")

    def report(name: str, taken: float, floor: float | None = None, against: float | None = None) -> None:
        line = f"{name:<58} {taken * 1e3:>11.3f} ms"
        line += "" if floor is None else f"   floor {floor * 1e3:>9.3f} ms"
        print(line + ("" if against is None else f"   {against / taken:>7.2f} x as fast as exact"), flush=True)

    sink = 4
    pairs = args.clusters + args.window + sink
    size = 4 * 2 * args.dim * args.heads  # bytes of a token
    q, k, v = arrays(args.heads, pairs + 1024, args.dim, 0)
    sketches = {}
    for name, make in libraries.items():
        sketches[name] = AttentionSketch(args.clusters, window=args.window, sink=sink)
        sketches[name].update(make(k), make(v), queries=make(q))

    # Attending over the sketch, beside exact attention over as many pairs as it holds at that moment: layer after layer
    # as a model does, more of them than the cache has room for.
    filled = next(iter(sketches.values())).state
    held = filled.clusters.counts.shape[1] + filled.exact.n
    layers = {name: [copy.deepcopy(sketch) for _ in range(args.layers)] for name, sketch in sketches.items()}
    calls: dict[str, list[Callable[[], Any]]] = {}
    for _ in range(args.layers):
        for name, call in exact_decoders(q[:, :1], k[:, :held].copy(), v[:, :held].copy()).items():
            calls.setdefault(f"exact {name}", []).append(call)
    # Models come in bfloat16, which NumPy lacks.
    sixteen = {"numpy": ("float16", lambda x: x.astype(np.float16)), "torch": ("bfloat16", lambda x: x.bfloat16())}
    if torch is not None:
        rows = torch.from_numpy(q[:, :1].reshape(1, args.heads, GROUP, args.dim)).bfloat16()
        pairs16 = [torch.from_numpy(x[None, :, :held]).bfloat16() for x in (k, v)]
        calls["exact torch, bfloat16, fused"] = [
            lambda own=own: torch.nn.functional.scaled_dot_product_attention(rows, *own)
            for own in [[x.clone() for x in pairs16] for _ in range(args.layers)]
        ]
    for name, make in libraries.items():
        query = make(q[:, :1])
        calls[f"sketch {name}"] = [lambda sketch=sketch, query=query: sketch.attend(query) for sketch in layers[name]]
        dtype, narrow = sixteen[name]
        for what, cast, storage in (
            ("int8 clusters", lambda x: x, "int8"),
            (dtype, narrow, "input"),
            (f"{dtype}, int8 clusters", narrow, "int8"),
        ):
            sketch = AttentionSketch(args.clusters, window=args.window, sink=sink, storage=storage)
            sketch.update(cast(make(k)), cast(make(v)), queries=cast(make(q)))
            copies, own = [copy.deepcopy(sketch) for _ in range(args.layers)], cast(query)
            calls[f"sketch {name}, {what}"] = [
                lambda sketch=sketch, query=own: sketch.attend(query) for sketch in copies
            ]
    taken = seconds(calls, 3, args.seconds)
    yardstick = min(t for name, t in taken.items() if name.startswith("exact torch")) if torch else None
    print(f"\none token's queries over {held} pairs, in each of {args.layers} layers")
    for name, t in taken.items():
        pair = size // 2 if "float16" in name else size
        # A quarter of the bytes of a mean in float32, and two scales.
        mean = size / 4 + 8 * args.heads * pair / size if name.endswith("int8 clusters") else pair
        report(name, t, (args.clusters * mean + (held - args.clusters) * pair) / bandwidth, yardstick)
    del calls

    # A whole step, absorption included: as many steps of every layer as lie between two absorptions, and then the exact
    # answers of one layer, and so on.
    passing = max(1, args.window // 2)
    data = {name: tuple(make(x) for x in arrays(args.heads, 512, args.dim, 2)) for name, make in libraries.items()}
    for n in args.contexts:
        rng = np.random.default_rng(3)
        keys, values = (rng.standard_normal((args.heads, n, args.dim), dtype=np.float32) for _ in range(2))
        calls = {f"exact {name}": [call] for name, call in exact_decoders(q[:, :1], keys, values).items()}
        for name in libraries:
            calls[f"sketch {name}"] = [lambda name=name: per_step(layers[name], data[name], passing)]
        taken = seconds(calls, max(3, args.steps // passing))
        best = min(t for name, t in taken.items() if name.startswith("exact"))
        print(f"\none token at {n} tokens, in one of the layers; of the sketch, its update too, absorption included")
        for name, t in taken.items():
            if name.startswith("exact"):
                report(name, t, n * size / bandwidth)
                continue
            work = args.heads * merging_work(args.clusters, passing, args.dim) / passing
            report(name, t / passing / args.layers, held * size / bandwidth + work / rate, best)
        del keys, values, calls
    layers.clear()

    if args.prompt:
        # An eighth of the work of either, times eight: in so long a run the machine would do much else.
        print(f"\n{args.prompt} tokens absorbed; an eighth of it measured, times eight")
        causal = arrays(1, args.prompt, args.dim, 4)
        eighth = arrays(args.heads, max(1, args.prompt // 8), args.dim, 4)
        exact = "exact causal torch (one key-value head of all)"
        calls = {exact: [lambda: causal_exact(*causal)]} if torch else {}
        # Products of coordinates: half windows compare all clusters again, a whole prompt compares new tokens with all.
        work = {
            "update": args.heads * args.prompt / passing * merging_work(args.clusters, passing, args.dim),
            "prefill": args.heads * args.prompt * 2 * args.clusters * 2 * args.dim,
        }
        for name, make in libraries.items():
            block = [make(x) for x in (eighth[1], eighth[2], eighth[0])]

            def prefill(block: Sequence[Any] = block) -> None:
                empty = AttentionSketch(args.clusters, window=args.window, sink=sink)
                empty.prefill(*block[:2], queries=block[2])

            calls[f"sketch {name}, update (an eighth of the tokens)"] = [
                lambda name=name, block=block: sketches[name].update(*block[:2], queries=block[2])
            ]
            calls[f"sketch {name}, prefill (an eighth of the tokens)"] = [prefill]
        taken = seconds(calls, 3)
        factor = {name: args.heads if name == exact else args.prompt / eighth[1].shape[1] for name in taken}
        whole = {name: t * factor[name] for name, t in taken.items()}
        for name, t in whole.items():
            if name == exact:
                report(name, t, 2 * args.heads * GROUP * args.prompt**2 * args.dim / rate)
            else:
                report(name, t, work["prefill" if "prefill" in name else "update"] / rate, whole.get(exact))
        del causal, eighth, calls

    if len(args.flat) > 1:
        print("\nsteps of one key-value head along a stream; both ends of it take turns")
        for name, make in libraries.items():
            block = tuple(make(x) for x in arrays(1, 10**4, args.dim, 5))
            sketch = AttentionSketch(args.clusters // 8, window=args.window, sink=sink)
            at = {}
            for n in sorted(args.flat):
                while sketch.n_seen < n:
                    few = min(n - sketch.n_seen, block[1].shape[1])
                    sketch.update(block[1][:, :few], block[2][:, :few], queries=block[0][:, :few])
                at[n] = copy.copy(sketch)
            times: dict[int, list[float]] = {n: [] for n in at}
            for _ in range(max(1, 16 * args.steps // passing)):
                for n, there in at.items():
                    times[n] += per_step([there], block, passing)
            slow = {n: median(sorted(t)[-max(1, len(t) // 10) :]) for n, t in times.items()}
            for n, t in slow.items():
                report(f"{name}: slowest decile at {n}", t)
            print(f"{'':<58} last over first {slow[max(slow)] / slow[min(slow)]:.2f}")


if __name__ == "__main__":
    main()
