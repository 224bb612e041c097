"""Pictures: a run (error and memory over n), and a comparison (error of each method, by budget)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..io.captures import FileError, write_file
from .compare import Comparison
from .stream import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_comparison", "plot_reports"]

# Methods that a reader could take for one another, by their full names.
_LABELS = {
    "subgen": "cluster means (the default)",
    "subgen-int8": "cluster means, int8",
    "algorithm1": "SubGen Algorithm 1 (the paper)",
    "Algorithm 1": "SubGen Algorithm 1 (the paper)",
}


def plot_reports(reports: Mapping[str, Report], path: str | Path, title: str) -> None:
    """Write a PNG or SVG with the error and the bytes held over n, a line for each report.

    Parameters
    ----------
    reports : mapping of str to Report
        By name of the method; all of one capture.
    path : str or Path
        Its folder is made if need be. One that ends in ``.svg`` gets an SVG, any other a PNG.
    title : str

    Raises
    ------
    FileError
        If the file cannot be written.
    """
    # The object interface: no global figure, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    error_axes, bytes_axes = figure.subplots(1, 2)
    figure.suptitle(title)
    mebi = 2.0**20
    any_report = next(iter(reports.values()))
    bytes_axes.plot(any_report.n, any_report.full_nbytes / mebi, label="full cache", color="tab:gray", linestyle="--")
    for name, report in reports.items():
        label = _LABELS.get(name, name)
        error_axes.plot(report.n, report.error, marker="o", markersize=3, label=label)
        bytes_axes.plot(report.n, report.nbytes / mebi, label=label)
    error_axes.set(xlabel="tokens seen", ylabel="mean relative error")
    # Algorithm 1 is off by orders of magnitude where its theorem does not apply: one scale for both needs logarithms.
    if all(report.error.min() > 0.0 for report in reports.values()):
        error_axes.set_yscale("log")
    bytes_axes.set(xlabel="tokens seen", ylabel="memory held (MiB)", ylim=(0.0, None))
    for axes in (error_axes, bytes_axes):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    _save(figure, path)


def plot_comparison(result: Comparison, path: str | Path) -> None:
    """Write a PNG or SVG with the error of each method, a bar for each budget, best method first.

    Parameters
    ----------
    result : Comparison
    path : str or Path
        Its folder is made if need be. One that ends in ``.svg`` gets an SVG, any other a PNG.

    Raises
    ------
    FileError
        If the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 0.8 + 0.42 * len(result.methods)), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    order = result.error.mean(axis=1).argsort()[::-1]
    height = 0.8 / len(result.budgets)
    for j, share in enumerate(result.budgets):
        places = [i + (len(result.budgets) / 2 - j - 0.5) * height for i in range(len(order))]
        bars = axes.barh(places, result.error[order, j], height=height, label=f"{share:.0%} of the KV entries")
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=7)
    axes.set_yticks(range(len(order)), [_LABELS.get(name, name) for name in (result.methods[i] for i in order)])
    axes.set(xlabel="mean relative error against exact attention")
    axes.margins(x=0.1)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Figure, path: str | Path) -> None:
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error}") from error
    kind = "svg" if path.suffix.lower() == ".svg" else "png"
    write_file(path, lambda file: figure.savefig(file, format=kind))
