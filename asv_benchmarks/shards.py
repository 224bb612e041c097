"""Shards that were sketched apart and merged, beside one pass: ``make shards``.

The prefix of a capture is cut into equal parts, each goes through a sketch of its own with the budget of the whole, and
the sketches are merged from left to right or as a tree. The error of the answers to later queries is that of
`subgen compare`, averaged over prefixes of several lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

import subgen
from subgen.evaluation.baselines import Prefix
from subgen.evaluation.compare import compare
from subgen.io.captures import read_capture, sample

BUDGETS = (0.05, 0.1, 0.25)
SHARDS = (1, 2, 4, 16, 64)
LENGTHS = (1.0, 0.9, 0.8, 0.7, 0.6)

Sketches = list[subgen.AttentionSketch]
Merge = Callable[[Sketches], subgen.AttentionSketch]


def fold(sketches: Sketches) -> subgen.AttentionSketch:
    return functools.reduce(subgen.merge, sketches)


def tree(sketches: Sketches) -> subgen.AttentionSketch:
    while len(sketches) > 1:
        pairs = [sketches[i : i + 2] for i in range(0, len(sketches), 2)]
        sketches = [subgen.merge(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return sketches[0]


@dataclass(frozen=True)
class Merged:
    """A sketch that `subgen.compare` can ask."""

    sketch: subgen.AttentionSketch

    @property
    def nbytes(self) -> int:
        return self.sketch.nbytes

    def answer(self, rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        return self.sketch.method.attend(self.sketch.state, rows)


def sharded(shards: int, merged: Merge) -> Callable[[Prefix, int, np.random.Generator], Merged]:
    def compress(prefix: Prefix, budget: int, rng: np.random.Generator) -> Merged:
        sketches = []
        for rank, part in enumerate(np.array_split(np.arange(prefix.n), shards)):
            sketch = subgen.AttentionSketch(
                budget - prefix.sinks - prefix.window,
                window=prefix.window,
                sink=prefix.sinks,
                scale=prefix.scale,
                seed=rank,
            )
            sketch.update(prefix.keys[:, part], prefix.values[:, part], queries=prefix.queries[:, part])
            sketches.append(sketch)
        return Merged(merged(sketches))

    return compress


def main(
    path: Annotated[Path | None, typer.Argument(help="A capture; the sample that is shipped if not given.")] = None,
) -> None:
    """Print the error of shards that were merged, and in brackets in units of that of one pass."""
    console = Console()
    capture = sample() if path is None else read_capture(path)
    ways = {f"{n} {how.__name__}": sharded(n, how) for n in SHARDS for how in (fold, tree) if n > 2 or how is fold}
    longest = capture.k.shape[1] * 375 // 512
    lengths = [round(share * longest) for share in LENGTHS]
    error = np.mean(
        [
            compare(capture, BUDGETS, prefix=length, methods=ways).error
            for length in track(lengths, "comparing", console=console, transient=True)
        ],
        axis=0,
    )
    title = f"prefixes of {', '.join(map(str, lengths))} tokens"
    table = Table("shards", "merged", *(f"{budget:.0%} of pairs" for budget in BUDGETS), title=title)
    for name, row in zip(ways, error, strict=True):
        shards, how = name.split()
        label = {"1": "one pass", "2": "once"}.get(shards, {"fold": "left to right", "tree": "as a tree"}[how])
        table.add_row(shards, label, *(f"{x:.4f} ({x / one:.2f})" for x, one in zip(row, error[0], strict=True)))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
