"""Tables, a plot and a summary of the answers that evaluate.py and presses.py wrote."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer
from protocol import EXACT, Row, read_rows
from rich.console import Console
from rich.table import Table

from subgen.evaluation.scores import wilson_interval

console = Console(width=None if sys.stdout.isatty() else 120)

_OURS = "cluster means"
_TITLES = {"excluded": "question follows", "included": "question compressed too"}

# Protocol, task and length; share kept and method.
Cell = tuple[str, str, int]
Method = tuple[float, str]


def collect(paths: Sequence[Path]) -> dict[Cell, dict[Method, dict[str, Any]]]:
    """Summarize the samples that all methods of a cell have answered, the exact cache first, then by loss."""
    rows: dict[Cell, dict[Method, list[tuple[Row, float]]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        own = read_rows(path)
        # The loss beyond that of an exact cache in the same run: what samples have in common cancels.
        exact = {(row.sample, row.question): row.loss for row in own if row.method == EXACT}
        for row in own:
            rows[row.sample[:3]][row.kept, row.method].append((row, row.loss - exact[row.sample, row.question]))
    found = {}
    for cell, methods in sorted(rows.items()):
        common = set.intersection(*({row.seed for row, _ in own} for own in methods.values()))
        if common:
            each = {key: summarize([x for x in own if x[0].seed in common]) for key, own in methods.items()}
            found[cell] = dict(sorted(each.items(), key=lambda item: (-item[0][0], item[1]["loss"])))
    return found


def summarize(rows: Sequence[tuple[Row, float]]) -> dict[str, Any]:
    """Compute means over answers, and 95% intervals over samples: questions about one context are not independent."""
    by_sample: dict[int, list[float]] = defaultdict(list)
    for row, more in rows:
        by_sample[row.seed].append(more)
    means, n = [statistics.mean(x) for x in by_sample.values()], len(by_sample)
    scores = [row.found for row, _ in rows if row.found is not None]
    tokens = [row.token_seconds for row, _ in rows if row.token_seconds is not None]
    return {
        "samples": n,
        "found": statistics.mean(scores) if scores else None,
        "found_interval": wilson_interval(statistics.mean(scores), n) if scores else None,
        "loss": statistics.mean(row.loss for row, _ in rows),
        "more_loss": statistics.mean(means),
        "more_loss_within": 1.96 * statistics.stdev(means) / math.sqrt(n) if n > 1 else None,
        "bytes": statistics.mean(row.nbytes / row.exact_nbytes for row, _ in rows),
        "prompt_seconds": statistics.median(row.prompt_seconds for row, _ in rows),
        "token_seconds": statistics.median(tokens) if tokens else None,
    }


def tables(found: dict[Cell, dict[Method, dict[str, Any]]]) -> Iterator[Table]:
    """Make a table of each protocol, task and length."""
    for (protocol, task, length), methods in found.items():
        n = next(iter(methods.values()))["samples"]
        table = Table(title=f"{task}, {length} tokens, {_TITLES[protocol]}: {n} samples")
        table.add_column("method")
        for column in ("kept", "bytes held", "found (95%)", "loss", "over exact (95%)", "prompt s", "token ms"):
            table.add_column(column, justify="right")
        for (kept, method), x in methods.items():
            share = "" if x["found"] is None else f"{x['found']:.0%} ({_percent(x['found_interval'])})"
            within = "" if x["more_loss_within"] is None else f" ± {x['more_loss_within']:.3f}"
            token = "" if x["token_seconds"] is None else f"{x['token_seconds'] * 1e3:.0f}"
            table.add_row(
                *(method, f"{kept:.0%}", f"{x['bytes']:.1%}", share, f"{x['loss']:.3f}"),
                *(f"{x['more_loss']:+.3f}{within}", f"{x['prompt_seconds']:.1f}", token),
                style="bold" if method.startswith(_OURS) else None,
            )
        yield table


def _percent(interval: tuple[float, float]) -> str:
    return "-".join(f"{x:.0%}" for x in interval)


def draw(found: dict[Cell, dict[Method, dict[str, Any]]], path: Path) -> None:
    """Plot the loss over exact of each method, a panel for each protocol, task and length."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    height = 0.9 + 0.21 * max(len(methods) for methods in found.values())
    figure, axes = plt.subplots(len(found), 1, figsize=(7, height * len(found)), squeeze=False)
    for axis, ((protocol, task, length), methods) in zip(axes[:, 0], found.items(), strict=True):
        shown = [(key, x) for key, x in methods.items() if key[1] != EXACT][::-1]
        axis.barh(
            [f"{method}, {kept:.0%}" for (kept, method), _ in shown],
            [x["more_loss"] for _, x in shown],
            xerr=[x["more_loss_within"] or 0.0 for _, x in shown],
            color=["tab:red" if method.startswith(_OURS) else "tab:gray" for (_, method), _ in shown],
            error_kw={"lw": 1},
        )
        axis.axvline(0, color="black", lw=1)
        axis.set_title(f"{task}, {length} tokens, {_TITLES[protocol]}", fontsize=10)
        axis.set_xlabel("loss on the right answer over that of an exact cache (nats a token, 95%)", fontsize=9)
        axis.tick_params(labelsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(
    answers: Annotated[list[Path], typer.Argument(help="Files of evaluate.py and presses.py.")],
    plot: Annotated[Path | None, typer.Option(help="Where to write a plot.")] = None,
    summary: Annotated[Path | None, typer.Option(help="Where to write the numbers as JSON.")] = None,
) -> None:
    """Print tables; only samples that all methods have answered count."""
    found = collect([path for path in answers if path.exists()])
    if not found:
        raise typer.BadParameter(f"no answers in {', '.join(map(str, answers))}: run make evaluate")
    for table in tables(found):
        console.print(table)
    if plot is not None:
        draw(found, plot)
    if summary is not None:
        lines = [
            {"protocol": protocol, "task": task, "length": length, "method": method, "kept": kept, **numbers}
            for (protocol, task, length), methods in found.items()
            for (kept, method), numbers in methods.items()
        ]
        summary.parent.mkdir(parents=True, exist_ok=True)
        summary.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
