"""The command line: ``subgen run FILE``, ``subgen demo``, ``subgen backends``."""

from __future__ import annotations

import math
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import __version__, backends
from .files import Capture, FileError, read_capture, sample, write_arrays
from .kcenter import delta_for_clusters
from .plot import plot_report
from .report import Report, stream_capture
from .sketch import AttentionSketch

__all__ = ["app"]

# Keys that delta is chosen from: their pairwise distances are held at once.
_SAMPLED_KEYS = 2048

app = typer.Typer(
    help="Attention over long contexts from a sublinear summary of the KV cache (SubGen, arXiv 2402.06082).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Delta = Annotated[float | None, typer.Option(help="Radius of a cluster, in the units of the keys.")]
Clusters = Annotated[
    int | None,
    typer.Option(help="Choose delta so that at most this many clusters open; sqrt(n) if neither is given."),
]
PerCluster = Annotated[int, typer.Option(help="Keys sampled from each cluster (the paper's t).")]
ValueSamples = Annotated[int, typer.Option(help="Pairs sampled by the norm of the value (the paper's s).")]
Scale = Annotated[float | None, typer.Option(help="Factor of the logits; head_dim ** -0.5 if not given.")]
Seed = Annotated[int, typer.Option(help="Seed of the samples.")]
Block = Annotated[int, typer.Option(min=1, help="Tokens in a call.")]
Output = Annotated[Path | None, typer.Option(help="Write the outputs to this .npz or .safetensors file.")]
Plot = Annotated[Path | None, typer.Option(help="Write error and memory over n to this PNG file.")]


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help=".npz or .safetensors with q, k, v: (streams, tokens, head_dim).")],
    delta: Delta = None,
    clusters: Clusters = None,
    samples_per_cluster: PerCluster = 4,
    value_samples: ValueSamples = 256,
    scale: Scale = None,
    seed: Seed = 0,
    block: Block = 128,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Stream a file through a sketch; report its error against exact attention, memory, clusters and time."""
    with _clear_errors():
        capture = read_capture(file)
        _run(
            file.name,
            capture,
            delta,
            clusters,
            samples_per_cluster,
            value_samples,
            scale,
            seed,
            block,
            output,
            plot,
        )


@app.command()
def demo(
    delta: Delta = None,
    clusters: Clusters = None,
    samples_per_cluster: PerCluster = 4,
    value_samples: ValueSamples = 256,
    seed: Seed = 0,
    block: Block = 128,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Run on the real sample that the package ships: two heads of a small language model reading Python source."""
    with _clear_errors():
        name = "the shipped sample"
        _run(
            name,
            sample(),
            delta,
            clusters,
            samples_per_cluster,
            value_samples,
            None,
            seed,
            block,
            output,
            plot,
        )


@app.command("backends")
def list_backends() -> None:
    """List the installed backends, where they come from and which operations they replace."""
    origins = {point.name: point.value for point in entry_points(group="subgen.backends")}
    table = Table("array library", "from", "replaces", title=f"Backends of subgen {__version__}")
    for name in backends.names():
        try:
            replaces = ", ".join(sorted(backends.get(name).operations)) or "nothing"
        except backends.BackendError as error:
            replaces = f"[red]{error}[/red]"
        table.add_row(name, origins.get(name, "registered"), replaces)
    console = Console()
    console.print(table)
    console.print("Arrays of any other array API library run on the portable code.")


class _clear_errors:  # noqa: N801 - reads as a verb in a with statement
    """Turn the errors of bad input into one line and exit status 2; anything else is a bug and keeps its trace."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (FileError, ValueError, TypeError)):
            Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(2) from None


def _run(
    name: str,
    capture: Capture,
    delta: float | None,
    clusters: int | None,
    samples_per_cluster: int,
    value_samples: int,
    scale: float | None,
    seed: int,
    block: int,
    output: Path | None,
    plot: Path | None,
) -> None:
    console = Console()
    n, head_dim = capture.k.shape[1:]
    if delta is not None and clusters is not None:
        raise ValueError("give --delta or --clusters, not both: --clusters is a way to choose delta")
    if output is not None and output.suffix.lower() not in (".npz", ".safetensors"):
        raise ValueError(f"--output must end in .npz or .safetensors, got {output}")
    if delta is None:
        clusters = math.isqrt(n) if clusters is None else clusters
        delta = delta_for_clusters(capture.k[:, :_SAMPLED_KEYS], clusters)
    scale = head_dim**-0.5 if scale is None else scale
    sketch = AttentionSketch.paper(
        delta=delta,
        samples_per_cluster=samples_per_cluster,
        value_samples=value_samples,
        scale=scale,
        seed=seed,
    )
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("tokens", total=n)
        report = stream_capture(
            sketch,
            capture,
            scale=scale,
            block=block,
            on_block=lambda done: progress.update(task, completed=done),
        )
    console.print(_table(name, capture, report, delta, samples_per_cluster, value_samples))
    if output is not None:
        write_arrays(output, {"outputs": report.outputs})
        console.print(f"outputs written to {output}")
    if plot is not None:
        plot_report(report, plot, f"SubGen, Algorithm 1, on {name}")
        console.print(f"plot written to {plot}")


def _table(name: str, capture: Capture, report: Report, delta: float, t: int, s: int) -> Table:
    streams, n, head_dim = capture.k.shape
    spread = report.n_clusters
    held, full = int(report.nbytes[-1]), int(report.full_nbytes[-1])
    table = Table(title=f"SubGen, Algorithm 1, on {name}: every answer against exact attention", show_header=False)
    rows: list[tuple[str, Any]] = [
        ("streams, tokens, head_dim", f"{streams} x {n} x {head_dim} {capture.k.dtype}"),
        ("delta, samples a cluster, of values", f"{delta:.4g}, {t}, {s}"),
        ("relative error, median token", f"{report.median_error:.4g}"),
        ("relative error, mean", f"{report.mean_error:.4g}"),
        ("  of the best and the worst stream", f"{report.stream_error.min():.4g}, {report.stream_error.max():.4g}"),
        ("bytes held", f"{held:,} ({held / full:.1%} of the full cache)"),
        ("clusters: fewest, median, most", f"{spread.min()}, {np.median(spread):g}, {spread.max()}"),
        ("time", f"{report.seconds:.2f} s (exact: {report.exact_seconds:.2f} s)"),
    ]
    for label, value in rows:
        table.add_row(label, value)
    return table
