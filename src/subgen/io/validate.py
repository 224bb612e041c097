"""Whether what a file says is a sketch that can go on: sizes that fit each other, numbers that a stream leaves behind.

A checksum proves that a file is unchanged, not that a sketch wrote it. What passes here can answer and go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._checks import MOST_TOKENS
from ..default.algorithm import FEW_CLUSTERS, ClusterMeans
from ..default.state import State
from ..leaders import padded_capacity
from ..paper.algorithm import Algorithm1
from ..paper.state import PaperState
from ..reservoirs import last_count
from .captures import FileError

__all__ = ["check_sizes", "check_state"]

Arrays = Mapping[str, NDArray[Any]]


def check_sizes(
    arrays: Mapping[str, tuple[int, ...]],
    method: Algorithm1 | ClusterMeans,
    streams: int,
    head_dim: int,
    value_dim: int,
) -> None:
    """Check the sizes that a file states against the shapes of its arrays, before anything is made to them.

    Parameters
    ----------
    arrays : mapping of str to tuple of int
        Shapes of what the file holds.
    method : Algorithm1 or ClusterMeans
        With the parameters that the file states.
    streams, head_dim, value_dim : int
        As the file states them.

    Raises
    ------
    FileError
        If an array is missing or does not have its size.
    """
    if isinstance(method, Algorithm1):
        least = {"clusters.samples": 0}
        expected: dict[str, tuple[int | None, ...]] = {
            "clusters.samples": (streams, None, method.t, head_dim),
            "reservoir.keys": (streams, method.s, head_dim),
            "reservoir.values": (streams, method.s, value_dim),
        }
    else:
        least = {}
        capacity = method.sink + method.window
        expected = {
            "exact.keys": (streams, capacity, head_dim),
            "exact.values": (streams, capacity, value_dim),
            "exact.queries.codes": (streams, capacity, head_dim),
        }
        if method.residual_samples:
            expected["residual.keys"] = (streams, method.residual_samples, head_dim)
            expected["residual.values"] = (streams, method.residual_samples, value_dim)
    for name, shape in expected.items():
        if name not in arrays:
            raise FileError(f"holds no sketch: {name} is missing")
        got = arrays[name]
        fits = len(got) == len(shape) and all(b in (a, None) for a, b in zip(got, shape, strict=True))
        if not fits or got[1] < least.get(name, 0):
            words = ", ".join("places" if size is None else str(size) for size in shape)
            raise FileError(f"{name} has shape {got}, expected ({words}) by the parameters beside it")


def check_state(state: Any, arrays: Arrays, method: Any, *, finite: bool) -> None:
    """Check that the parts of a state fit each other.

    Parameters
    ----------
    state : State or PaperState
    arrays : mapping of str to NumPy array
        What it holds, by name.
    method : Algorithm1 or ClusterMeans
    finite : bool
        Whether the stream was checked for NaN and infinity: what was copied from it has none. What was computed may
        have overflowed, and a sketch that goes on with that can be saved as well.

    Raises
    ------
    FileError
        If a sketch could not have left such a state behind.
    """
    _need(1 <= state.n_seen <= MOST_TOKENS, "no token seen, or more than can be counted")
    if isinstance(state, PaperState) and isinstance(method, Algorithm1):
        _check_paper(state, arrays, method)
        copied = [
            arrays[name] for name in ("clusters.centres", "clusters.samples", "reservoir.keys", "reservoir.values")
        ]
    elif isinstance(state, State) and isinstance(method, ClusterMeans):
        _check_means(state, arrays, method)
        copied = [arrays[name][:, : state.exact.n] for name in ("exact.keys", "exact.values")]
        copied += [arrays[name] for name in ("clusters.leaders", "residual.keys", "residual.values") if name in arrays]
    else:
        raise FileError("holds a state of another kind")
    _need(not finite or all(np.isfinite(x).all() for x in copied), "NaN or infinity, of a stream that was checked")


def _need(condition: Any, words: str) -> None:
    if not condition:
        raise FileError(f"holds a state that contradicts itself: {words}")


def _need_counts(counts: NDArray[np.int64], total: int) -> None:
    """Check that the members of the clusters of each stream add up to a total."""
    _need((counts >= 0).all() and (counts <= total).all(), "counts")
    # Where no sum of the first few is beyond the total, none is beyond 64 bits either.
    _need((np.cumsum(counts, axis=-1) <= total).all() and (counts.sum(axis=-1) == total).all(), "counts")


def _check_paper(state: PaperState, arrays: Arrays, method: Algorithm1) -> None:
    counts, due = arrays["clusters.counts"], arrays["clusters.due"]
    _need(len({arrays[f"clusters.{name}"].shape[1] for name in ("centres", "counts", "samples", "due")}) == 1, "places")
    _need(counts.shape[1] >= padded_capacity(0), "places")
    _need(due.shape[2] == arrays["clusters.samples"].shape[2] == method.t, "samples")
    _need_counts(counts, state.n_seen)
    _need((np.diff((counts > 0).astype(int), axis=-1) <= 0).all(), "clusters with gaps")
    most = np.where(counts > 0, np.int64(last_count(state.n_seen)), 1)
    _need((due > counts[..., None]).all() and (due <= most[..., None]).all(), "moments of the samples")
    weight, due = arrays["reservoir.weight"], arrays["reservoir.due"]
    _need({arrays[f"reservoir.{name}"].shape[1] for name in ("keys", "values", "due")} == {method.s}, "slots")
    # An infinite weight would be due for ever.
    _need((weight >= 0).all() and np.isfinite(weight).all() and (due > weight[:, None]).all(), "weights")


def _check_means(state: State, arrays: Arrays, method: ClusterMeans) -> None:
    clusters = {name: x for name, x in arrays.items() if name.startswith("clusters.")}
    counts, cached = clusters["clusters.counts"], clusters.get("clusters.nearest")
    _need(len({x.shape[1] for x in clusters.values()}) == 1, "places of clusters")
    exact = {x.shape[1] for name, x in arrays.items() if name.startswith("exact.")}
    _need(exact == {method.sink + method.window}, "places of tokens")
    _need(0 < state.exact.n <= method.sink + method.window, "exact tokens")
    absorbed = state.n_seen - state.exact.n
    _need_counts(counts, absorbed)
    _need(not (clusters["clusters.key_variance"] < 0).any(), "key variance below zero")
    importance = clusters["clusters.importance"]
    _need((importance >= 0).all() and np.isfinite(importance).all(), "importance")
    _need((cached is None) == (method.delta is not None or counts.shape[1] <= FEW_CLUSTERS), "nearest clusters")
    if cached is not None:
        _check_nearest(cached.astype(np.int64), counts > 0)
    if state.residual is not None:
        place, due = arrays["residual.cluster"], arrays["residual.due"]
        slots = {arrays[f"residual.{name}"].shape[1] for name in ("keys", "values", "due", "cluster")}
        _need(slots == {method.residual_samples}, "slots of the sample")
        _need((place >= 0).all() and (place < max(1, counts.shape[1])).all(), "clusters of the sample")
        if absorbed:
            _need((np.take_along_axis(counts, place.astype(np.int64), axis=1) > 0).all(), "clusters of the sample")
        _need((due > absorbed).all() and (due <= last_count(absorbed)).all(), "moments of the sample")


def _check_nearest(nearest: NDArray[np.int64], live: NDArray[np.bool_]) -> None:
    """Check that cached neighbours are live clusters, or -1: else clusters of a stream may be left without a pair."""
    some = nearest >= 0
    _need((nearest >= -1).all() and (nearest < live.shape[1]).all(), "nearest clusters")
    _need(not (some & (nearest == np.arange(live.shape[1]))).any(), "nearest clusters")
    _need(
        (live | ~some).all() and (np.take_along_axis(live, np.where(some, nearest, 0), axis=1) | ~some).all(),
        "nearest clusters",
    )
