"""A small Llama with its cache as sketches: what is lost on unseen text, and on numbers stated far away.

``make examples`` runs it beside the methods of kvpress, after ``make examples-baselines``. With ``--stream 100000`` it
reads a long text instead, in memory that does not grow.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib
import torch
import typer
from adjustText import adjust_text
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from subgen_torch.transformers import SubGenCache, enable
from task import MODEL, Score, evaluate, read, samples, source
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar

from subgen.default.algorithm import Storage

console = Console()

Dtype = Literal["float32", "bfloat16"]


def load(dtype: str = "float32") -> Any:
    """Load the model that comes with the project, with SubGen switched on."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=getattr(torch, dtype)).eval()
    enable(model)
    return model


def bar() -> Progress:
    """Return the progress bar of every part of this script."""
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def score(model: Any, drawn: Any, make: Any, progress: Progress, name: str) -> Score:
    """Score a cache; prompts are read at once, and what follows against what the cache holds."""

    def answer(prompt: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        cache = make()
        first = read(model, prompt, cache)[:, -1:]
        return torch.cat([first, read(model, rest, cache)[:, :-1]], dim=1)

    job = progress.add_task(name, total=len(drawn))
    return evaluate(drawn, answer, tell=lambda done: progress.update(job, completed=done))


def show(scores: dict[str, dict[str, Score]], exact: Score) -> None:
    """Print a table, best digits first."""
    for budget, methods in scores.items():
        table = Table("method", title=f"{float(budget):.0%} of the pairs")
        for column in ("loss on text", "to exact", "loss on digits", "right digits"):
            table.add_column(column, justify="right")
        for name, it in sorted({"exact cache": exact, **methods}.items(), key=lambda pair: pair[1].digit_loss):
            change = it.text_loss / exact.text_loss - 1.0
            style = "bold" if name == "subgen" else None
            numbers = (f"{it.text_loss:.4f}", f"{change:+.1%}", f"{it.digit_loss:.3f}", f"{it.right_digits:.3f}")
            table.add_row(name, *numbers, style=style)
        console.print(table)


def draw_plot(scores: dict[str, dict[str, Score]], exact: Score, path: Path) -> None:
    """Plot loss on digits against loss on text, a panel a budget."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(scores), figsize=(7 * len(scores), 6), squeeze=False, sharey=True)
    labels: dict[Any, list[Any]] = {}
    for axis, (budget, methods) in zip(axes[0], scores.items(), strict=True):
        # One label for methods at one place; those that keep every later token have bytes of their own.
        places: dict[tuple[float, float], list[str]] = {}
        for name, it in methods.items():
            if not name.endswith("(growing)"):
                places.setdefault((round(it.text_loss, 3), round(it.digit_loss, 2)), []).append(name)
        axis.set_yscale("log")
        axis.margins(0.08)
        colors = ["tab:red" if "subgen" in names else "tab:gray" for names in places.values()]
        axis.scatter(*zip(*places, strict=True), color=colors, s=25)
        labels[axis] = [axis.text(*place, ", ".join(names), fontsize=7) for place, names in places.items()]
        axis.axvline(exact.text_loss, linestyle=":", color="black")
        axis.axhline(exact.digit_loss, linestyle=":", color="black", label="exact cache")
        axis.set(title=f"{float(budget):.0%} of the pairs", xlabel="loss on text (nats a byte)")
    axes[0, 0].set_ylabel("loss on digits (nats a digit)")
    axes[0, 0].legend()
    figure.tight_layout()
    for axis, texts in labels.items():
        adjust_text(texts, ax=axis, expand=(1.2, 1.7), arrowprops={"arrowstyle": "-", "color": "tab:gray", "lw": 0.5})
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def stream(model: Any, tokens: int, block: int = 500) -> None:
    """Read a long text in memory that does not grow."""
    cache = SubGenCache(model.config, max_clusters=128, window=64, prefill="streaming")
    ids = torch.tensor(list(source(tokens + 1)))[None]
    every, held, loss = max(1, tokens // block // 10), [], 0.0
    with bar() as progress, torch.inference_mode():
        for start in progress.track(range(0, tokens, block), description="reading"):
            stop = min(tokens, start + block)
            logits = read(model, ids[:, start:stop], cache)[0]
            loss += float(torch.nn.functional.cross_entropy(logits, ids[0, start + 1 : stop + 1], reduction="sum"))
            if (start // block + 1) % every == 0:
                total = cache.report().total
                held.append((total.n_seen, total.nbytes, total.exact_nbytes))
    table = Table("tokens", "bytes held", "an exact cache", title="cache memory along the stream")
    for row in held:
        table.add_row(*(f"{x:,}" for x in row))
    console.print(table)
    console.print(f"loss {loss / tokens:.3f} nats a byte over all {tokens:,}")


def main(
    count: Annotated[int, typer.Option("--samples", help="Samples; 16 digits each.")] = 32,
    budgets: Annotated[str, typer.Option(help="Shares of the pairs kept, with commas.")] = "0.25,0.1",
    window: Annotated[int, typer.Option(help="Last tokens kept exactly, if the budget allows.")] = 128,
    storage: Annotated[Storage, typer.Option(help="What clusters are held in.")] = "input",
    dtype: Annotated[Dtype, typer.Option(help="Of the model, and so of the cache.")] = "float32",
    baselines: Annotated[Path | None, typer.Option(help="Scores of baselines.py.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Where to write a plot.")] = None,
    long: Annotated[int, typer.Option("--stream", help="Instead: read so many tokens in fixed memory.")] = 0,
) -> None:
    """Compare SubGen with an exact cache, and with the methods of kvpress if their scores are there."""
    # Two calls a cache, of which the second is no part of the prompt: the warning about chunks is not for us.
    logging.getLogger("subgen_torch").setLevel(logging.ERROR)
    model = load(dtype)
    if long:
        stream(model, long)
        return
    drawn = samples(count)
    scores: dict[str, dict[str, Score]] = {}
    with bar() as progress:
        exact = score(model, drawn, lambda: DynamicCache(config=model.config), progress, "exact cache")
        for budget in budgets.split(","):
            ratio = 1.0 - float(budget)

            def make(ratio: float = ratio) -> SubGenCache:
                return SubGenCache(model.config, compression_ratio=ratio, window=window, storage=storage)

            scores[budget] = {"subgen": score(model, drawn, make, progress, f"subgen, {float(budget):.0%}")}
    if baselines is not None and baselines.exists():
        read = json.loads(baselines.read_text())
        if read["samples"] != count:
            raise typer.BadParameter(f"{baselines} was made with {read['samples']} samples, not {count}: make it anew")
        for budget, methods in scores.items():
            found = read["scores"].get(budget, {})
            methods.update({name: Score(**numbers) for name, numbers in found.items()})
    elif baselines is not None:
        console.print(f"no {baselines}: run `make examples-baselines` for the methods of kvpress")
    show(scores, exact)
    if plot is not None:
        draw_plot(scores, exact, plot)
        dump = {
            budget: {name: dataclasses.asdict(it) for name, it in methods.items()} for budget, methods in scores.items()
        }
        plot.with_suffix(".json").write_text(json.dumps({"exact": dataclasses.asdict(exact), **dump}, indent=2) + "\n")
        console.print(f"wrote {plot} and {plot.with_suffix('.json')}")


if __name__ == "__main__":
    typer.run(main)
