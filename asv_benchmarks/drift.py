"""Do means in 16 and 8 bits follow a stream of a million tokens, or stall? ``make drift``.

The keys and values of two streams wander: the mean of the second half differs from that of the first. Merging keeps
the sum of all members, so `sum of n * mean` over the clusters must be the sum of the tokens; how far it is off, in
units of the root mean square of a value, is what rounding has lost. Beside it, the error of answers against exact
attention over the whole stream.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import subgen
from subgen.weighted import merge_attention, weighted_attention

BLOCK = 10_000


def main(
    tokens: Annotated[int, typer.Option(help="Length of the stream.")] = 10**6,
    clusters: Annotated[int, typer.Option(help="Clusters of each stream.")] = 64,
    head_dim: Annotated[int, typer.Option()] = 64,
) -> None:
    """Print the drift of the means for each way to hold them."""
    console = Console()
    cases = [("float32", "input"), ("float16", "input"), ("float32", "int8"), ("float16", "int8")]
    sketches = {case: subgen.AttentionSketch(clusters, window=128, storage=case[1]) for case in cases}
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(2, 40, head_dim))
    queries = (3.0 * rng.normal(size=(2, 50, head_dim))).astype(np.float32)
    exact = None
    total, squares = np.zeros((2, 2, head_dim)), 0.0
    for start in track(range(0, tokens, BLOCK), "streaming", console=console, transient=True):
        n = min(BLOCK, tokens - start)
        drift = 0.5 * start / tokens
        keys = centres[:, rng.integers(0, 40, n)] + 0.5 * rng.normal(size=(2, n, head_dim)) + drift
        values = rng.normal(size=(2, n, head_dim)) + drift
        # What a float16 stream holds, for every case: only the means differ.
        keys, values = keys.astype(np.float16), values.astype(np.float16)
        total += np.stack([keys.sum(axis=1, dtype=np.float64), values.sum(axis=1, dtype=np.float64)])
        squares += float((values.astype(np.float64) ** 2).mean()) * n
        bias = np.zeros((1, 1, n), np.float32)
        part = weighted_attention(queries / np.float32(head_dim**0.5), keys, values, bias)
        exact = part if exact is None else merge_attention(exact, part)
        for (dtype, _), sketch in sketches.items():
            sketch.update(keys.astype(dtype), values.astype(dtype))
    unit = np.sqrt(squares / tokens)
    table = Table(
        "input", "storage", "mean key off by", "mean value off by", "error", "bytes", title=f"{tokens:,} tokens"
    )
    for (dtype, storage), sketch in sketches.items():
        state = sketch.state
        means = sketch.method.means(state, np.float32)
        counts = state.counts[..., None].astype(np.float64)
        written = slice(state.n_means, state.n_means + state.n_exact)
        off = []
        for i, (held, buffer) in enumerate(((means.keys, state.keys), (means.values, state.values))):
            kept = (counts * held).sum(axis=1) + buffer[:, written].sum(axis=1, dtype=np.float64)
            off.append(float(np.abs(kept - total[i]).max()) / tokens / unit)
        answers = sketch.attend(queries.astype(dtype)).astype(np.float32)
        error = np.linalg.norm(answers - exact[0], axis=-1) / np.linalg.norm(exact[0], axis=-1)
        table.add_row(dtype, storage, f"{off[0]:.1e}", f"{off[1]:.1e}", f"{error.mean():.4f}", f"{sketch.nbytes:,}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
