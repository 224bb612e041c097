"""A million tokens of one stream through the paper's algorithm: time and memory as it goes.

Run with ``make long-stream``.
"""

from __future__ import annotations

import os
import resource
import time

from benchmarks.paper import sketch, stream
from rich.console import Console
from rich.progress import track
from rich.table import Table

TOKENS, CALL = 1_000_000, 10_000

if __name__ == "__main__":
    console = Console()
    streamed = sketch()
    table = Table("tokens", "clusters", "bytes held", "of a float32 cache", "peak memory (MiB)", "seconds")
    seconds = 0.0
    for call in track(range(TOKENS // CALL), description="tokens (in ten thousands)", console=console, transient=True):
        keys, values = stream(CALL, seed=call)
        begin = time.perf_counter()
        streamed.update(keys, values)
        seconds += time.perf_counter() - begin
        n = streamed.n_seen
        if n in (10_000, 100_000, 500_000, 1_000_000):
            full = n * (keys.itemsize * keys.shape[-1] + values.itemsize * values.shape[-1])
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            held, share = f"{streamed.nbytes:,}", f"{streamed.nbytes / full:.3%}"
            table.add_row(
                f"{n:,}",
                str(streamed.n_clusters),
                held,
                f"{streamed.nbytes / full:.3%}",
                f"{peak:.0f}",
                f"{seconds:.1f}",
            )
    console.print(table)
    console.print(f"head_dim 64, threads: {os.environ.get('OMP_NUM_THREADS', 'not set')}")
