"""The command line: ``subgen run``, ``demo``, ``compare``, ``plan``, ``capture``, ``backends``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table
except ModuleNotFoundError as error:
    sys.exit(f"the command line needs {error.name}: pip install 'subgen-attention[cli]'")

from . import __version__, backends
from ._checks import check_real
from .default.algorithm import Storage
from .evaluation.compare import METHODS, Comparison, compare
from .evaluation.cover import delta_for_clusters
from .evaluation.plan import Plan, plan
from .evaluation.plot import plot_comparison, plot_reports
from .evaluation.stream import Report, stream_capture
from .io.captures import Capture, FileError, existing_file, read_capture, sample, write_arrays
from .sketch import AttentionSketch

__all__ = ["app"]

# Keys that delta is chosen from: their pairwise distances are held at once.
_SAMPLED_KEYS = 2048
_PAPER = "Algorithm 1"

app = typer.Typer(
    help="Attention over long contexts from a sublinear summary of the KV cache (SubGen, arXiv 2402.06082).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Budget = Annotated[
    float | None,
    typer.Option(help="Pairs to hold, as a share of the tokens: sinks, window and clusters; 0.1 if nothing is given."),
]
MaxClusters = Annotated[int | None, typer.Option(help="Clusters to hold, instead of --budget.")]
Window = Annotated[int, typer.Option(help="Most recent tokens kept exactly.")]
Sink = Annotated[int, typer.Option(help="First tokens kept exactly.")]
HeldIn = Annotated[Storage, typer.Option(help="What means are held in: the dtype of the input, or int8.")]
WithPaper = Annotated[bool, typer.Option("--paper", help="Run the paper's Algorithm 1 beside it.")]
Delta = Annotated[float | None, typer.Option(help="Algorithm 1: radius of a cluster, in the units of the keys.")]
Clusters = Annotated[
    int | None,
    typer.Option(help="Algorithm 1: choose delta so that about this many clusters open; sqrt(n) if nothing is given."),
]
PerCluster = Annotated[int, typer.Option(help="Algorithm 1: keys sampled from each cluster (its t).")]
ValueSamples = Annotated[int, typer.Option(help="Algorithm 1: pairs sampled by the norm of the value (its s).")]
Scale = Annotated[float | None, typer.Option(help="Softmax scale; head_dim ** -0.5 if not given.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Block = Annotated[int, typer.Option(min=1, help="Tokens in a call.")]
Output = Annotated[Path | None, typer.Option(help="Write the outputs to this .npz or .safetensors file.")]
Plot = Annotated[Path | None, typer.Option(help="Write error and memory over n to this PNG file.")]


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help=".npz or .safetensors with q, k, v: (streams, tokens, head_dim).")],
    budget: Budget = None,
    max_clusters: MaxClusters = None,
    window: Window = 32,
    sink: Sink = 4,
    storage: HeldIn = "input",
    paper: WithPaper = False,
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
        _check_output(output)
        sketches = {"subgen": _default(capture, budget, max_clusters, window, sink, storage, scale, seed)}
        if paper:
            sketches[_PAPER] = _paper(capture, delta, clusters, samples_per_cluster, value_samples, scale, seed)
        elif delta is not None or clusters is not None:
            raise ValueError("--delta and --clusters are options of Algorithm 1: add --paper")
        _run(file.name, capture, sketches, scale, block, output, plot)


@app.command()
def demo(
    budget: Budget = None,
    window: Window = 32,
    seed: Seed = 0,
    block: Block = 128,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Run the default and the paper's algorithm on the real sample that the package ships.

    Queries, keys and values of two heads of a small language model that reads Python source.
    """
    with _clear_errors():
        capture = sample()
        _check_output(output)
        sketches = {
            "subgen": _default(capture, budget, None, window, 4, "input", None, seed),
            _PAPER: _paper(capture, None, None, 4, 256, None, seed),
        }
        _run("the shipped sample", capture, sketches, None, block, output, plot)


@app.command("compare")
def compare_methods(
    file: Annotated[
        Path | None, typer.Argument(help=".npz or .safetensors with q, k, v; the shipped sample if not given.")
    ] = None,
    budget: Annotated[
        list[float] | None, typer.Option(help="Share of the pairs to hold; repeat for several. 0.1 and 0.25.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="Method to compare; repeat for several. All of them.")
    ] = None,
    prefix: Annotated[int | None, typer.Option(help="Tokens to compress; 375 of each 512 if not given.")] = None,
    stride: Annotated[int, typer.Option(help="Every how many later tokens a query is answered.")] = 20,
    window: Annotated[int | None, typer.Option(help="Last tokens of the prefix that every method keeps.")] = None,
    sink: Sink = 4,
    scale: Scale = None,
    seed: Seed = 0,
    plot: Plot = None,
) -> None:
    """Compare the default sketch with other methods on your own capture, at equal numbers of pairs."""
    with _clear_errors():
        capture = sample() if file is None else read_capture(file)
        budgets = budget or [0.1, 0.25]
        console = Console()
        with _progress(console) as progress:
            task = progress.add_task("methods", total=len(budgets) * len(method or METHODS))
            result = compare(
                capture,
                budgets,
                prefix=prefix,
                stride=stride,
                scale=scale,
                sinks=sink,
                window=window,
                methods=method or None,
                seed=seed,
                on_done=lambda name, share: progress.update(task, advance=1, description=name),
            )
        console.print(_comparison_table("the shipped sample" if file is None else file.name, result))
        if plot is not None:
            plot_comparison(result, plot)
            console.print(f"plot written to {plot}")


def _comparison_table(name: str, result: Comparison) -> Table:
    table = Table(
        "method",
        title=f"Mean relative error of later answers: {name}",
        caption=f"{result.prefix} tokens compressed, {result.sinks} sinks and {result.window} recent tokens included; "
        f"{len(result.positions)} later queries",
    )
    for share, pairs in zip(result.budgets, result.pairs, strict=True):
        table.add_column(f"{share:.0%}, {pairs} pairs", justify="right")
        table.add_column("worst head", justify="right")
        table.add_column("bytes", justify="right")
    best = result.error.argmin(axis=0)
    for i, method in enumerate(result.methods):
        cells = []
        for j in range(len(result.budgets)):
            error = f"{result.error[i, j]:.4f}"
            cells += [f"[bold]{error}[/bold]" if i == best[j] else error]
            cells += [f"{result.worst_error[i, j]:.3f}", f"{result.held_nbytes[i, j] / result.full_nbytes:.1%}"]
        table.add_row(method, *cells)
    return table


@app.command("plan")
def plan_sketch(
    file: Annotated[
        Path | None, typer.Argument(help=".npz or .safetensors with q, k, v; the shipped sample if not given.")
    ] = None,
    eps: Annotated[float, typer.Option(help="Error allowed.")] = 0.1,
    n: Annotated[int | None, typer.Option(help="Tokens to plan for; those of the file if not given.")] = None,
    window: Window = 32,
    sink: Sink = 4,
    scale: Scale = None,
    seed: Seed = 0,
) -> None:
    """Say from a capture how large a sketch must be: by the theorem, and by measuring the default."""
    with _clear_errors():
        capture = sample() if file is None else read_capture(file)
        console = Console()
        with _progress(console) as progress:
            task = progress.add_task("planning", total=None)
            found = plan(
                eps,
                keys=capture.k,
                values=capture.v,
                queries=capture.q,
                n=n,
                scale=scale,
                window=window,
                sink=sink,
                seed=seed,
                on_done=lambda word, number: progress.update(task, advance=1, description=f"{word} {number:.3g}"),
            )
        for table in _plan_tables("the shipped sample" if file is None else file.name, found):
            console.print(table)
        console.print(found.words)


def _plan_tables(name: str, found: Plan) -> tuple[Table, Table]:
    theorem = Table(
        "clusters m",
        "delta",
        "t, samples per cluster",
        "s, value samples",
        f"of a cache of {found.n:,}",
        title=f"Algorithm 1 at the sizes of the theorem, eps {found.eps:g}: {name}",
        caption=f"largest query norm times the softmax scale: {found.query_norm:.3g}",
    )
    for size in found.theorem:
        theorem.add_row(
            f"{size.clusters:,}",
            f"{size.delta:.3g}",
            f"{size.samples_per_cluster:.3g}",
            f"{size.value_samples:.3g}",
            f"{size.share:.3g} times" if size.share >= 1 else f"{size.share:.1%}",
        )
    default = Table(
        "clusters",
        "of the pairs",
        "mean relative error",
        title="The default sketch, measured",
        caption=f"{found.sink} sinks and {found.window} recent tokens beside the clusters",
    )
    for row in found.measured:
        default.add_row(f"{row.clusters:,}", f"{row.share:.1%}", f"{row.error:.4f}")
    return theorem, default


@app.command("capture")
def capture_model(
    model: Annotated[str, typer.Argument(help="Folder or name of a model of transformers, with its tokenizer.")],
    text: Annotated[Path, typer.Argument(help="Text file, in UTF-8.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write q, k and v: .npz or .safetensors.")],
    layers: Annotated[str, typer.Option(help="Indices with commas; all that attend to all tokens if not given.")] = "",
    length: Annotated[int, typer.Option(help="Tokens read: the first of the text.")] = 2048,
    dtype: Annotated[
        str, typer.Option(help="Of the arrays: float16 or float32. The model runs in float32.")
    ] = "float16",
) -> None:
    """Write the queries, keys and values of a model that reads a text, for the commands run, compare and plan."""
    with _clear_errors():
        _check_output(output)
        indices = _indices(layers)
        try:
            from subgen_torch.transformers.recording import capture_text
        except ImportError as error:
            raise ValueError(f"{error}") from error
        try:
            words = existing_file(text, "expected a text file").read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise FileError(f"{text}: is not text in UTF-8: {error}") from error
        console = Console()
        with console.status("reading the text"):
            found = capture_text(model, words, length=length, layers=indices, dtype=dtype)
        write_arrays(output, {"q": found.q, "k": found.k, "v": found.v})
        streams, n, head_dim = found.k.shape
        console.print(f"{streams} streams, {n} tokens, head_dim {head_dim}, {dtype}: written to {output}")


def _indices(layers: str) -> list[int] | None:
    try:
        return [int(x) for x in layers.split(",")] if layers.strip() else None
    except ValueError as error:
        raise ValueError(f"--layers takes indices with commas, such as 0,4,8: got {layers!r}") from error


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


def _progress(console: Console) -> Progress:
    """Make a progress bar that leaves nothing behind."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


def _check_output(output: Path | None) -> None:
    if output is not None and output.suffix.lower() not in (".npz", ".safetensors"):
        raise ValueError(f"--output must end in .npz or .safetensors, got {output}")
    if output is not None and not output.parent.is_dir():
        raise FileError(f"{output}: cannot be written: there is no folder {output.parent}, make it first")


def _default(
    capture: Capture,
    budget: float | None,
    max_clusters: int | None,
    window: int,
    sink: int,
    storage: Storage,
    scale: float | None,
    seed: int,
) -> AttentionSketch:
    if budget is not None and max_clusters is not None:
        raise ValueError("give --budget or --max-clusters, not both")
    if max_clusters is None:
        n = capture.k.shape[1]
        share = check_real("--budget", 0.1 if budget is None else budget, minimum=0.0, strict=True, maximum=1.0)
        max_clusters = round(share * n) - window - sink
        if max_clusters < 1:
            raise ValueError(
                f"--budget {share:g} of {n} tokens is {round(share * n)} pairs, which leaves no cluster beside "
                f"{window} recent tokens and {sink} sinks; raise it, or lower --window"
            )
    return AttentionSketch(max_clusters, window=window, sink=sink, scale=scale, storage=storage, seed=seed)


def _paper(
    capture: Capture,
    delta: float | None,
    clusters: int | None,
    samples_per_cluster: int,
    value_samples: int,
    scale: float | None,
    seed: int,
) -> AttentionSketch:
    if delta is not None and clusters is not None:
        raise ValueError("give --delta or --clusters, not both: --clusters is a way to choose delta")
    n, head_dim = capture.k.shape[1:]
    if delta is None:
        clusters = math.isqrt(n) if clusters is None else clusters
        delta = delta_for_clusters(capture.k[:, :_SAMPLED_KEYS], clusters)
    return AttentionSketch.paper(
        delta=delta,
        samples_per_cluster=samples_per_cluster,
        value_samples=value_samples,
        scale=head_dim**-0.5 if scale is None else scale,
        seed=seed,
    )


def _run(
    name: str,
    capture: Capture,
    sketches: dict[str, AttentionSketch],
    scale: float | None,
    block: int,
    output: Path | None,
    plot: Path | None,
) -> None:
    console = Console()
    reports = {}
    with _progress(console) as progress:
        for method, sketch in sketches.items():
            task = progress.add_task(f"{method}: tokens", total=capture.k.shape[1])
            reports[method] = stream_capture(
                sketch,
                capture,
                scale=scale,
                block=block,
                on_block=lambda done, task=task: progress.update(task, completed=done),  # type: ignore[misc]
            )
    console.print(_table(name, capture, reports))
    if output is not None:
        write_arrays(output, {method.replace(" ", "_"): report.outputs for method, report in reports.items()})
        console.print(f"outputs written to {output}")
    if plot is not None:
        plot_reports(reports, plot, f"Every answer against exact attention: {name}")
        console.print(f"plot written to {plot}")


def _table(name: str, capture: Capture, reports: dict[str, Report]) -> Table:
    streams, n, head_dim = capture.k.shape
    table = Table(
        "",
        *reports,
        title=f"Every answer against exact attention: {name}",
        caption=f"{streams} streams, {n} tokens, head_dim {head_dim}, {capture.k.dtype}; "
        f"exact attention took {next(iter(reports.values())).exact_seconds:.2f} s",
    )

    def row(label: str, show: Callable[[Report], str]) -> None:
        table.add_row(label, *map(show, reports.values()))

    row("relative error, mean", lambda r: f"{r.mean_error:.4g}")
    row("  best and worst stream", lambda r: f"{r.stream_error.min():.4g}, {r.stream_error.max():.4g}")
    row("  median token", lambda r: f"{r.median_error:.4g}")
    row("bytes held", lambda r: f"{r.nbytes[-1]:,}")
    row("  of the full cache", lambda r: f"{r.nbytes[-1] / r.full_nbytes[-1]:.1%}")
    row("clusters: fewest, most", lambda r: f"{r.n_clusters.min()}, {r.n_clusters.max()}")
    row("time", lambda r: f"{r.seconds:.2f} s")
    return table


if __name__ == "__main__":
    app()
