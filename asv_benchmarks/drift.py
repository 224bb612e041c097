"""Do means in 16 bits and int8 follow a long stream, or stall? Does memory stay? ``make drift`` and ``make soak``.

The keys and values of each stream wander, and jump back when it is measured: later tokens are not like earlier ones,
and what is measured later is of the same kind. Merging keeps the sum of all members, so ``sum of n * mean`` over the
clusters must be the sum of the tokens; how far it is off, in units of the root mean square of a value, is what rounding
has lost. Beside it, the error of answers against exact attention over the whole stream, the bytes of the sketch, and
the memory of the process.

``make soak`` streams ten million tokens and fails where bytes, memory, drift or error grow along the way.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import subgen
from subgen.backends import PORTABLE
from subgen.default.absorb import upcast_clusters
from subgen.softmax import merge_attention

BLOCK = 10_000
# Of the root mean square of a value: what dithered rounding may lose, far below the error of merging.
_MOST_OFF = 0.1
CASES = (("float32", "input"), ("float16", "input"), ("float32", "int8"), ("float16", "int8"))


@dataclass(frozen=True)
class Measured:
    """One way to hold the means, after so many tokens."""

    case: tuple[str, str]
    tokens: int
    key_off: float
    value_off: float
    error: float
    nbytes: int
    resident: int


def run(
    tokens: int, streams: int, clusters: int, window: int, head_dim: int, shown: tuple[int, ...]
) -> Iterator[Measured]:
    """Stream, and measure every case at the numbers of tokens shown: multiples of the first, and that of a block."""
    sketches = {case: subgen.AttentionSketch(clusters, window=window, storage=case[1]) for case in CASES}
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(streams, 40, head_dim))
    queries = (3.0 * rng.normal(size=(streams, 50, head_dim))).astype(np.float32)
    exact = None
    total, squares = np.zeros((2, streams, head_dim)), 0.0
    for start in range(0, tokens, BLOCK):
        drift = 0.5 * (start % shown[0]) / shown[0]
        keys = centres[:, rng.integers(0, 40, BLOCK)] + 0.5 * rng.normal(size=(streams, BLOCK, head_dim)) + drift
        values = rng.normal(size=(streams, BLOCK, head_dim)) + drift
        # What a float16 stream holds, for every case: only the means differ.
        keys, values = keys.astype(np.float16), values.astype(np.float16)
        total += np.stack([keys.sum(axis=1, dtype=np.float64), values.sum(axis=1, dtype=np.float64)])
        squares += float((values.astype(np.float64) ** 2).mean()) * BLOCK
        bias = np.zeros((1, 1, BLOCK), np.float32)
        part = PORTABLE["weighted_attention"](queries / np.float32(head_dim**0.5), keys, values, bias)
        exact = part if exact is None else merge_attention(exact, part)
        for (dtype, _), sketch in sketches.items():
            sketch.update(keys.astype(dtype), values.astype(dtype))
        seen = start + BLOCK
        if seen in shown:
            gc.collect()
            for case, sketch in sketches.items():
                off = _off(sketch, total) / seen / np.sqrt(squares / seen)
                answers = sketch.attend(queries.astype(case[0])).astype(np.float32)
                error = np.linalg.norm(answers - exact[0], axis=-1) / np.linalg.norm(exact[0], axis=-1)
                yield Measured(case, seen, off[0], off[1], float(error.mean()), sketch.nbytes, resident())


def _off(sketch: subgen.AttentionSketch, total: Any) -> Any:
    """Largest difference between what is held, times its counts, and the sum of all tokens: of keys and of values."""
    state: Any = sketch.state
    clusters, exact = upcast_clusters(state.clusters, np.float32), state.exact
    counts = clusters.counts[..., None].astype(np.float64)
    kept = [
        (counts * held).sum(axis=1) + tokens[:, : exact.n].sum(axis=1, dtype=np.float64)
        for held, tokens in ((clusters.keys, exact.keys), (clusters.values, exact.values))
    ]
    return np.abs(np.stack(kept) - total).max(axis=(1, 2))


def resident() -> int:
    """Bytes of this process in memory now; 0 where the system does not say."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pages.exists() else 0


def grown(measured: list[Measured]) -> list[str]:
    """What grew along the way that must not, in words: against the first that was measured."""
    found = []
    for case in CASES:
        own = [one for one in measured if one.case == case]
        first, name = own[0], " ".join(case)
        for one in own:
            at = f"{name} at {one.tokens:,} tokens:"
            if one.nbytes != first.nbytes:
                found.append(f"{at} {one.nbytes:,} bytes, were {first.nbytes:,}")
            if one.resident > 1.05 * first.resident:
                found.append(f"{at} {one.resident:,} bytes in memory, were {first.resident:,}")
            if max(one.key_off, one.value_off) > _MOST_OFF:
                found.append(f"{at} keys off by {one.key_off:.1e} and values by {one.value_off:.1e}")
            if one.error > 1.1 * first.error:
                found.append(f"{at} error {one.error:.4f}, was {first.error:.4f}")
    return found


def main(
    tokens: Annotated[int, typer.Option(help="Length of the stream: a multiple of 10,000 times the rows.")] = 10**6,
    streams: Annotated[int, typer.Option()] = 2,
    clusters: Annotated[int, typer.Option(help="Clusters of each stream.")] = 64,
    window: Annotated[int, typer.Option()] = 128,
    head_dim: Annotated[int, typer.Option()] = 64,
    rows: Annotated[int, typer.Option(help="How often to measure; more than once fails on growth.")] = 1,
) -> None:
    """Print the drift of the means for each way to hold them."""
    if tokens % (BLOCK * rows):
        raise typer.BadParameter(f"--tokens must be a multiple of {BLOCK:,} times --rows, got {tokens:,}")
    shown = tuple(tokens * (row + 1) // rows for row in range(rows))
    console = Console()
    table = Table(
        "tokens",
        "input",
        "storage",
        "mean key off by",
        "mean value off by",
        "error",
        "bytes",
        "MiB in memory",
        title=f"{clusters} clusters, window {window}, head_dim {head_dim}, streams: {streams}",
    )
    measured = []
    steps = run(tokens, streams, clusters, window, head_dim, shown)
    for one in track(steps, "streaming", total=len(shown) * len(CASES), console=console, transient=True):
        measured.append(one)
        table.add_row(
            f"{one.tokens:,}",
            *one.case,
            f"{one.key_off:.1e}",
            f"{one.value_off:.1e}",
            f"{one.error:.4f}",
            f"{one.nbytes:,}",
            f"{one.resident / 2**20:.0f}",
        )
    console.print(table)
    for words in grown(measured):
        console.print(words, style="red")
    raise typer.Exit(1 if grown(measured) else 0)


if __name__ == "__main__":
    typer.run(main)
