"""A million tokens of one stream through the default sketch and through Algorithm 1: time and memory as it goes.

Run with ``make long-stream``.
"""

from __future__ import annotations

import os
import resource
import time

from benchmarks.paper import HEAD_DIM, sketch, stream
from rich.console import Console
from rich.progress import track
from rich.table import Table

from subgen import AttentionSketch

TOKENS, CALL = 1_000_000, 10_000
SHOWN = (10_000, 100_000, 500_000, 1_000_000)

if __name__ == "__main__":
    console = Console()
    table = Table("sketch", "tokens", "clusters", "bytes held", "of the cache", "peak MiB", "seconds")
    sketches = {"default": AttentionSketch(256, window=128), "Algorithm 1": sketch()}
    for name, streamed in sketches.items():
        seconds = 0.0
        for call in track(range(TOKENS // CALL), description=name, console=console, transient=True):
            keys, values = stream(CALL, seed=call)
            begin = time.perf_counter()
            streamed.update(keys, values)
            seconds += time.perf_counter() - begin
            n = streamed.n_seen
            if n in SHOWN:
                share = streamed.nbytes / (n * (keys.itemsize * keys.shape[-1] + values.itemsize * values.shape[-1]))
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                numbers = f"{streamed.nbytes:,}", f"{share:.3%}", f"{peak:.0f}", f"{seconds:.1f}"
                table.add_row(name, f"{n:,}", str(streamed.n_clusters), *numbers)
    console.print(table)
    console.print(f"head_dim {HEAD_DIM}, float32, threads: {os.environ.get('OMP_NUM_THREADS', 'not set')}")
