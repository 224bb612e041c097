"""The picture of a run: error and memory over the number of tokens."""

from __future__ import annotations

from pathlib import Path

from .files import FileError
from .report import Report

__all__ = ["plot_report"]


def plot_report(report: Report, path: str | Path, title: str) -> None:
    """Write a PNG with the error and the bytes held, over n.

    Parameters
    ----------
    report : Report
    path : str or Path
        Its folder is made if need be.
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

    error_axes.plot(report.n, report.error, marker="o", markersize=3, color="tab:orange", label="mean")
    error_axes.plot(report.n, report.block_median, marker="o", markersize=3, color="tab:blue", label="median token")
    error_axes.set(xlabel="tokens seen", ylabel="relative error of the answers")
    if report.block_median.min() > 0.0:
        error_axes.set_yscale("log")
    error_axes.legend(frameon=False)
    mebi = 2.0**20
    bytes_axes.plot(report.n, report.full_nbytes / mebi, label="full cache", color="tab:gray", linestyle="--")
    bytes_axes.plot(report.n, report.nbytes / mebi, label="sketch", color="tab:blue")
    bytes_axes.set(xlabel="tokens seen", ylabel="memory held (MiB)", ylim=(0.0, None))
    bytes_axes.legend(frameon=False)
    for axes in (error_axes, bytes_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error}") from error
