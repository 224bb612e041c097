"""Stream a capture through a sketch and hold every answer against exact attention."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._array import chunks
from ..io.captures import Capture, check_capture
from ..sketch import AttentionSketch
from ..softmax import attention

__all__ = ["Report", "relative_error", "stream_capture"]

# Tokens that a copy of the sketch takes in first, so that nothing is compiled while the time is measured.
_WARM_UP = 512


@dataclass(frozen=True)
class Report:
    """What a run showed.

    Attributes
    ----------
    n : int array, shape (blocks,)
        Tokens seen after each block.
    error : float array, shape (blocks,)
        Mean over streams and tokens of the block of ``||output - exact|| / ||exact||``.
    median_error : float
        Median over streams and tokens: where the paper's estimator has heavy tails, the mean is that of its tails.
    stream_error : float array, shape (q_streams,)
        The same mean, over all tokens, for each stream of queries.
    nbytes, full_nbytes : int array, shape (blocks,)
        Bytes held by the sketch, and by a cache of every key and value in the dtype of the file.
    n_clusters : int array, shape (streams,)
        Live clusters at the end.
    seconds, exact_seconds : float
        Time of the sketch and of exact attention, all tokens, after a first run of a few.
    outputs : array, shape (q_streams, n, value_dim)
        The answers of the sketch.
    """

    n: NDArray[np.int64]
    error: NDArray[np.float64]
    median_error: float
    stream_error: NDArray[np.float64]
    nbytes: NDArray[np.int64]
    full_nbytes: NDArray[np.int64]
    n_clusters: NDArray[np.int64]
    seconds: float
    exact_seconds: float
    outputs: NDArray[Any]

    @property
    def mean_error(self) -> float:
        """Mean relative error over all streams and tokens."""
        return float(self.stream_error.mean())


def stream_capture(
    sketch: AttentionSketch,
    capture: Capture,
    *,
    scale: float | None = None,
    block: int = 128,
    on_block: Callable[[int], object] | None = None,
) -> Report:
    """Feed a capture to an empty sketch, block by block, and compare each token's answer with exact attention.

    Parameters
    ----------
    sketch : AttentionSketch
        Empty, and with the same scale.
    capture : Capture
    scale : float, optional
        Softmax scale of exact attention; ``None`` means ``head_dim ** -0.5``.
    block : int
        Tokens in a call.
    on_block : callable, optional
        Called with the number of tokens done; for a progress bar.

    Returns
    -------
    Report

    Raises
    ------
    TypeError
        If the sketch is not an AttentionSketch or the capture not a Capture.
    ValueError
        If the sketch has seen tokens already, or the arrays of the capture do not fit.
    """
    if not isinstance(sketch, AttentionSketch):
        raise TypeError(f"sketch must be an AttentionSketch, got {type(sketch).__name__}")
    capture = check_capture(capture)
    if sketch.n_seen:
        raise ValueError(f"the sketch has seen {sketch.n_seen} tokens already; pass a new one")
    q, k, v = capture.q, capture.k, capture.v
    pair_bytes = k.itemsize * k.shape[0] * (k.shape[2] + v.shape[2])
    total = k.shape[1]
    ends = [min(total, start + block) for start in range(0, total, block)]
    # Loops are compiled, or loaded, at their first use: by a copy, which is not measured.
    warm = copy.deepcopy(sketch)
    for part in chunks(min(total, _WARM_UP), block):
        warm.step(q[:, part], k[:, part], v[:, part])
    outputs, errors, sizes = [], [], []
    seconds = exact_seconds = 0.0
    for start, end in zip([0, *ends], ends, strict=False):
        part = slice(start, end)
        begin = time.perf_counter()
        output = sketch.step(q[:, part], k[:, part], v[:, part])
        middle = time.perf_counter()
        exact = attention(q[:, part], k[:, :end], v[:, :end], scale=scale, causal=True)
        exact_seconds += time.perf_counter() - middle
        seconds += middle - begin
        outputs.append(output)
        errors.append(relative_error(output, exact))
        sizes.append(sketch.nbytes)
        if on_block is not None:
            on_block(end)
    per_token = np.concatenate(errors, axis=1)
    return Report(
        n=np.asarray(ends),
        error=np.asarray([error.mean() for error in errors]),
        median_error=float(np.median(per_token)),
        stream_error=per_token.mean(axis=1),
        nbytes=np.asarray(sizes),
        full_nbytes=np.asarray(ends) * pair_bytes,
        n_clusters=np.asarray(sketch.n_clusters),
        seconds=seconds,
        exact_seconds=exact_seconds,
        outputs=np.concatenate(outputs, axis=1),
    )


def relative_error(output: NDArray[Any], exact: NDArray[Any]) -> NDArray[np.float64]:
    """Relative error ``||output - exact|| / ||exact||`` per token; 0 where both are zero.

    Parameters
    ----------
    output, exact : NumPy array, shape (..., n, value_dim)

    Returns
    -------
    float64 array, shape (..., n)
    """
    wide = exact.astype(np.float64)
    missed = np.linalg.norm(output.astype(np.float64) - wide, axis=-1)
    norm = np.linalg.norm(wide, axis=-1)
    tiny = np.finfo(np.float64).tiny
    relative: NDArray[np.float64] = missed / np.maximum(norm, tiny)
    return relative
