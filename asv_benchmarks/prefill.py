"""Error and time of `AttentionSketch.prefill` against `update`: ``python asv_benchmarks/prefill.py [CAPTURE]``.

The first four fifths of a capture are read by `update`, as a whole prompt, and as on a device: in blocks of a quarter
as many tokens as there are clusters. The queries of the rest are answered. The error is relative, in the mean over
queries. Ratios to `update` are geometric means over streams; the worst stream stands beside them.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from subgen import AttentionSketch, attention
from subgen.default import algorithm
from subgen.io.captures import read_capture, sample

ENTRIES = (0.05, 0.1, 0.25)
WAYS = ("update", "prefill", "prefill in blocks")
ROUNDS = 3


def main(capture: Annotated[Path | None, typer.Argument(help="The shipped sample if not given.")] = None) -> None:
    """Print a table."""
    data = sample() if capture is None else read_capture(capture)
    q, k, v = (x.astype(np.float32) for x in (data.q, data.k, data.v))
    n, group = k.shape[1] * 4 // 5, len(q) // len(k)
    exact = attention(q[:, n:], k[:, :n], v[:, :n])
    table = Table("KV entries", "read by", "error", "worst stream", "of update", "seconds")
    for share in ENTRIES:
        entries = round(share * n)
        before: NDArray[np.float64] | None = None
        for way in WAYS:
            seconds = []
            for _ in range(ROUNDS + 1):
                sketch = AttentionSketch(entries - 4 - entries // 6, window=max(2, entries // 6), sink=4)
                read = sketch.update if way == "update" else sketch.prefill
                start = time.perf_counter()
                with patch.object(algorithm, "on_cpu", return_value=way == "prefill"):
                    read(k[:, :n], v[:, :n], queries=q[:, :n])
                seconds.append(time.perf_counter() - start)
            difference = np.linalg.norm((sketch.attend(q[:, n:]) - exact).astype(np.float64), axis=-1)
            error = (difference / np.linalg.norm(exact, axis=-1)).reshape(len(k), group, -1).mean(axis=(1, 2))
            before = error if before is None else before
            ratio = float(np.exp(np.log(error / before).mean()))
            numbers = (error.mean(), error.max(), ratio, statistics.median(seconds[1:]))
            table.add_row(f"{share:.0%}", way, *(f"{x:.3f}" for x in numbers))
    Console(width=100).print(table)


if __name__ == "__main__":
    typer.run(main)
